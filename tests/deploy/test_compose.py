"""compose.yaml by the schema of compose files, and what it provisions: Prometheus, Grafana, a dashboard of series."""

import json
import re
from importlib.resources import files
from typing import Any

import httpx
import jsonschema
import promql_parser
import pytest
import yaml

from service.__main__ import KILL_AFTER_S
from service.settings import read_settings
from tests.conftest import ROOT, Server
from tests.deploy.dockerfile import last, parse

DEPLOY = ROOT / "deploy"
SCHEMA = json.loads((files("check_jsonschema") / "builtin_schemas/vendor/compose-spec.json").read_text())
SERIES = re.compile(r"\b(?:fusion_|vllm:)\w+")
DASHBOARD = json.loads((DEPLOY / "observability/grafana/lora-fusion.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
QUERIES = [target["expr"] for panel in PANELS for target in panel["targets"]]


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    loaded = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    assert isinstance(loaded, dict)
    return loaded


def read(name: str) -> Any:
    return yaml.safe_load((DEPLOY / "observability" / name).read_text())


def test_the_compose_file_is_valid_by_the_compose_specification(compose: dict[str, Any]) -> None:
    validator = jsonschema.validators.validator_for(SCHEMA)(SCHEMA)
    assert [error.message for error in validator.iter_errors(compose)] == []
    compose["services"]["database"]["healthchek"] = compose["services"]["database"].pop("healthcheck")
    assert [error.message for error in validator.iter_errors(compose)] != []


def test_all_that_is_mounted_lies_beside_the_compose_file(compose: dict[str, Any]) -> None:
    mounts = [mount for service in compose["services"].values() for mount in service.get("volumes", ())]
    sources = [mount.split(":")[0] for mount in mounts if mount.startswith("./")]
    assert len(sources) == 5
    assert all((DEPLOY / source).is_file() for source in sources)
    named = {mount.split(":")[0] for mount in mounts if mount[0] not in ".$"}
    assert named == set(compose["volumes"])


def test_only_loopback_is_published_and_only_the_service_reaches_the_database(compose: dict[str, Any]) -> None:
    services = compose["services"]
    ports = [port for service in services.values() for port in service.get("ports", ())]
    assert ports
    assert all(port.startswith("127.0.0.1:") for port in ports)
    assert [name for name, service in services.items() if "registry" in service.get("networks", ())] == [
        "lora-fusion",
        "database",
    ]
    assert compose["networks"]["registry"]["internal"]


def test_the_service_is_confined_as_the_documented_command_confines_it(compose: dict[str, Any]) -> None:
    service = compose["services"]["lora-fusion"]
    text = (DEPLOY / "README.md").read_text()
    assert service["read_only"]
    assert f"--tmpfs {service['tmpfs'][0]}" in text
    assert f"--shm-size {service['shm_size']}" in text
    assert f"--cap-drop {service['cap_drop'][0]}" in text
    assert f"--security-opt {service['security_opt'][0]}" in text
    assert f"--pids-limit {service['pids_limit']}" in text
    assert f"--memory {service['mem_limit']} --memory-swap {service['memswap_limit']}" in text
    # Compose kills later than the server itself.
    assert int(service["stop_grace_period"].removesuffix("s")) > read_settings({}).stop_timeout_s + KILL_AFTER_S


def test_settings_are_valid_and_no_password_is_written_down(compose: dict[str, Any]) -> None:
    environment = compose["services"]["lora-fusion"]["environment"]
    settings = read_settings(environment)
    assert settings.database == "postgresql+psycopg://fusion@database/fusion"
    environments = [service.get("environment", {}) for service in compose["services"].values()]
    secrets = [value for each in environments for name, value in each.items() if re.search("PASSWORD|KEY", name)]
    assert len(secrets) == 4
    assert all(re.fullmatch(r"\$\{\w+:\?[\w' ]+\}", secret) for secret in secrets)


def test_prometheus_asks_the_service_by_a_name_that_it_answers(compose: dict[str, Any]) -> None:
    (job,) = read("prometheus.yaml")["scrape_configs"]
    (target,) = job["static_configs"][0]["targets"]
    name, port = target.split(":")
    assert name in compose["services"]
    assert name in read_settings(compose["services"][name]["environment"]).allowed_hosts
    assert port == last(parse((DEPLOY / "Dockerfile").read_text()), "EXPOSE")


def test_grafana_asks_prometheus_and_shows_the_dashboard(compose: dict[str, Any]) -> None:
    (source,) = read("grafana/datasource.yaml")["datasources"]
    assert source["url"].removeprefix("http://").split(":")[0] in compose["services"]
    (provider,) = read("grafana/provider.yaml")["providers"]
    mounts = compose["services"]["grafana"]["volumes"]
    assert any(mount.split(":")[1] == f"{provider['options']['path']}/lora-fusion.json" for mount in mounts)
    assert {panel["datasource"]["uid"] for panel in PANELS} == {source["uid"]}


def test_panels_do_not_overlap() -> None:
    cells = [
        (grid["x"] + x, grid["y"] + y)
        for grid in (panel["gridPos"] for panel in DASHBOARD["panels"])
        for x in range(grid["w"])
        for y in range(grid["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24


@pytest.mark.parametrize("query", QUERIES)
def test_queries_are_promql(query: str) -> None:
    promql_parser.parse(query)


def test_the_series_of_dashboard_and_autoscalers_are_the_service_s_own(server: Server) -> None:
    text = httpx.get(f"{server.url}/metrics").text
    ours = set(re.findall(r"^# TYPE (\S+)", text, re.MULTILINE))
    alerts = (DEPLOY / "observability/alerts.yaml").read_text()
    manifests = "".join(path.read_text() for path in (DEPLOY / "kubernetes/components").rglob("*.yaml"))
    asked = {name for query in [*QUERIES, manifests, alerts] for name in SERIES.findall(query)}
    assert len(asked) > 15
    assert {name for name in asked if re.sub("_bucket$", "", name) not in ours} == set()
