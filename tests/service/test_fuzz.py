"""Schemathesis over the API's description, statefully and as each role: `make soak`, docs/reliability.md."""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.conftest import ROOT, stop, wait_ready
from tests.service.proofs import IS_SHORT, SEED, Limit, record, size
from tests.service.tiny import NAME, make_tiny

pytestmark = pytest.mark.soak

CASES = size(20_000, 1_000)
EXAMPLES = size(15, 2)
"""Of each operation in one run of schemathesis; runs with further seeds follow until there are enough cases."""
OPERATOR = "operators-own-key-of-the-fuzz"
ROLES = ("user", "deployer", "admin")
CHECKS = ("not_a_server_error", "response_schema_conformance", "content_type_conformance", "errors_have_one_shape")
RUN_S = 1800


@dataclass(frozen=True)
class Target:
    """A server with keys."""

    url: str
    folder: Path

    def make_key(self, role: str) -> str:
        """A key that requests as an admin have not revoked yet; the operator's own, which none can, for an admin."""
        if role == "admin":
            return OPERATOR
        headers = {"authorization": f"Bearer {OPERATOR}"}
        answer = httpx.post(f"{self.url}/v1/keys", json={"role": role}, headers=headers, timeout=60)
        return str(answer.raise_for_status().json()["key"])


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    folder = tmp_path_factory.mktemp("fuzz")
    process, url = make_tiny(folder).serve(folder / "data", folder / "log", VLLM_API_KEY=OPERATOR)
    try:
        wait_ready(process, url, folder / "log")
        yield Target(url, folder)
    finally:
        stop(process)


def run(target: Target, role: str, seed: int) -> tuple[Counter[str], list[str]]:
    """One run of schemathesis: how often each operation was answered with each status, and what failed."""
    counts = target.folder / "counts.json"
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "SCHEMATHESIS_HOOKS": "tests.service.fuzz_hooks",
        "FUZZ_COUNTS": str(counts),
        "FUZZ_MODEL": NAME,
    }
    command = [str(Path(sys.executable).parent / "schemathesis"), "run", f"{target.url}/openapi.json"]
    options = {
        "header": f"Authorization: Bearer {target.make_key(role)}",
        "phases": "fuzzing,stateful" if IS_SHORT else "examples,coverage,fuzzing,stateful",
        "checks": ",".join(CHECKS),
        "max-examples": EXAMPLES,
        "seed": seed,
        "mode": "all",
        "suppress-health-check": "all",
        "warnings": "off",
        "request-timeout": 60,
    }
    flags = [f"--{name}={value}" for name, value in options.items()]
    done = subprocess.run(
        [*command, *flags, "--continue-on-failure", "--no-color", "--no-shrink"],
        env=environment,
        cwd=target.folder,
        capture_output=True,
        text=True,
        timeout=RUN_S + 300,
    )
    (target.folder / f"{role}-{seed}.txt").write_text(done.stdout + done.stderr)
    assert counts.exists(), done.stdout[-3000:] + done.stderr[-3000:]
    failures = re.findall(r"^_{5,} (.+?) _{5,}$", done.stdout, re.MULTILINE) if done.returncode else []
    found = Counter(json.loads(counts.read_text()))
    counts.unlink()
    assert done.returncode in (0, 1), done.stdout[-3000:] + done.stderr[-3000:]
    return found, [f"{role}, seed {seed}: {failure}" for failure in failures or ["see the output"] * done.returncode]


def describe(counts: dict[str, Counter[str]], failures: list[str], limit: Limit) -> dict[str, Any]:
    """The figures of the runs so far."""
    statuses = Counter[str]()
    for of_role in counts.values():
        for operation, count in of_role.items():
            statuses[operation.rpartition(" ")[2]] += count
    return {
        "cases": sum(statuses.values()),
        "cases_by_role": {role: sum(of_role.values()) for role, of_role in counts.items()},
        "operations": len({operation.rpartition(" ")[0] for of_role in counts.values() for operation in of_role}),
        "statuses": dict(sorted(statuses.items())),
        "server_errors": sum(count for status, count in statuses.items() if status >= "500"),
        "breaches": len(failures),
        "failures": failures[:20],
        "checks": CHECKS,
        "seconds": round(limit.seconds),
    }


def test_nothing_that_the_description_leads_to_is_a_server_error(target: Target) -> None:
    limit, counts, failures = Limit(), {role: Counter[str]() for role in ROLES}, list[str]()
    turn = 0
    while turn < len(ROLES) or (sum(map(Counter.total, counts.values())) < CASES and not limit.is_over):
        role = ROLES[turn % len(ROLES)]
        found, failed = run(target, role, SEED + turn // len(ROLES))
        counts[role] += found
        failures += failed
        turn += 1
        record("fuzz", "test_fuzz.py", describe(counts, failures, limit))
    assert httpx.get(f"{target.url}/livez").status_code == 200
    assert not failures
