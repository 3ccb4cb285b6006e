"""Debian's Prometheus with the rules and the dashboard that are shipped, on a real server."""

import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from benchmarks import servers
from tests.conftest import BASE_NAME, ROOT, Server

SHIPPED = ROOT / "deploy/observability"
DASHBOARD = json.loads((SHIPPED / "grafana/lora-fusion.json").read_text())
PANELS = {panel["title"]: panel["targets"] for panel in DASHBOARD["panels"] if panel["type"] != "row"}
WITH_DATA = {
    *("Requests", "First token", "Tokens", "In the engine", "Key-value cache", "Fusions asked for, by where they were"),
    *("Warm in the engine", "Builds and loads", "Builds, by outcome", "Between tokens, 99 %", "End to end, 95 %"),
    *("Until the engine, 95 %", "Built against mixed", "Vectors of weights within a minute", "Resident, and unloaded"),
}
"""Panels that show something on any server that answers; the others need a policy, limits or trouble."""
LIMIT_S = 60


def find(program: str) -> str:
    path = shutil.which(program)
    assert path is not None, f"there is no {program}; apt-get install prometheus (make test does it for root)"
    return path


def test_alert_rules_hold_by_prometheus_own_tool() -> None:
    for check in (["check", "rules", "alerts.yaml"], ["test", "rules", "alerts.test.yaml"]):
        result = subprocess.run([find("promtool"), *check], cwd=SHIPPED, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr


def test_every_alert_is_tested_to_come_and_to_stay_away() -> None:
    alerts = {
        rule["alert"]
        for group in yaml.safe_load((SHIPPED / "alerts.yaml").read_text())["groups"]
        for rule in group["rules"]
    }
    tests = yaml.safe_load((SHIPPED / "alerts.test.yaml").read_text())["tests"]
    come = {case["alertname"] for test in tests for case in test["alert_rule_test"] if case["exp_alerts"]}
    assert come == alerts


@pytest.fixture(scope="module")
def prometheus(small_server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A Prometheus with the shipped configuration, which asks the server every second."""
    folder = tmp_path_factory.mktemp("prometheus")
    configuration = yaml.safe_load((SHIPPED / "prometheus.yaml").read_text())
    configuration["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    configuration["rule_files"] = [str(SHIPPED / name) for name in configuration["rule_files"]]
    configuration["scrape_configs"][0]["static_configs"][0]["targets"] = [small_server.url.removeprefix("http://")]
    path = folder / "prometheus.yml"
    path.write_text(yaml.safe_dump(configuration))
    command = [find("prometheus"), f"--config.file={path}", f"--storage.tsdb.path={folder / 'series'}"]
    command += ["--web.listen-address=127.0.0.1:{port}", "--log.level=warn"]
    process, url = servers.start(command, {}, Path(folder), folder / "log")
    try:
        servers.wait_ready(process, url, folder / "log", "/-/ready")
        with httpx.Client(base_url=f"{url}/api/v1", timeout=30) as client:
            yield client
    finally:
        servers.stop(process)


def ask(prometheus: httpx.Client, query: str) -> list[dict[str, Any]]:
    answer = prometheus.get("/query", params={"query": query}).json()
    assert answer["status"] == "success", (query, answer)
    found: list[dict[str, Any]] = answer["data"]["result"]
    return found


def wait_for(prometheus: httpx.Client, query: str) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not ask(prometheus, query):
        assert time.monotonic() < deadline, f"Prometheus has nothing for {query!r}"
        time.sleep(0.5)


def test_every_panel_is_answered_and_the_important_ones_show_something(
    small_server: Server, prometheus: httpx.Client
) -> None:
    body = {"prompt": "The oak stool", "max_tokens": 4, "min_tokens": 4}
    wait_for(prometheus, 'up{job="lora-fusion"} == 1')
    with small_server.http() as http:
        for weight in ("0.3", "0.4"):  # a rate needs two readings
            for model in (BASE_NAME, f"{weight}*task + 0.2*safety", f"ties({weight}*task + 0.5*safety, density=0.5)"):
                while (answer := http.post("/v1/completions", json={**body, "model": model})).status_code == 503:
                    time.sleep(0.2)  # it is still being made
                answer.raise_for_status()
            count = ask(prometheus, "max(timestamp(fusion_resident))")[0]["value"][1]
            wait_for(prometheus, f"max(timestamp(fusion_resident)) > {count} + 1")
    answered = {title: [ask(prometheus, t["expr"]) for t in targets] for title, targets in PANELS.items()}
    assert {title for title, results in answered.items() if any(results)} >= WITH_DATA
    (built, mixed) = sorted(answered["Built against mixed"][0], key=lambda row: row["metric"]["mode"])
    assert (built["metric"]["mode"], mixed["metric"]["mode"]) == ("built", "mixed")


def test_the_shipped_alerts_are_evaluated_without_errors(prometheus: httpx.Client) -> None:
    deadline = time.monotonic() + 2 * LIMIT_S
    while True:
        (group,) = prometheus.get("/rules").json()["data"]["groups"]
        health = {rule["name"]: rule["health"] for rule in group["rules"]}
        if "unknown" not in health.values() or time.monotonic() > deadline:
            break
        time.sleep(1)
    assert set(health.values()) == {"ok"}, group
    firing = {rule["name"] for rule in group["rules"] if rule["state"] == "firing"}
    assert "LoraFusionDown" not in firing
