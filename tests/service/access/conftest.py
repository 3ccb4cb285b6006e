"""A real server with keys: three tenants that have the same things by the same names, and one with limits."""

import itertools
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from service.callers import ROLES
from tests.conftest import ROOT, launch, stop, wait_ready

OPERATOR = secrets.token_hex(16)
TENANTS = ("acme", "globex", "initech")
LIMITED, TOKENS = "limited", 3000
GUARD, LEAST = "guard", 0.3
"""A public adapter, which only the tests of the policy register, and what fusions that have it must have of it."""
POLICY = f"""
range = [{{adapter = "{GUARD}", at_least = {LEAST}}}]

[limits.tenants.{LIMITED}]
tokens = {TOKENS}
requests = 1000
concurrent = 8
"""
ASK = {"messages": [{"role": "user", "content": "Name three rivers."}], "max_tokens": 4, "temperature": 0}


@dataclass
class Served:
    """A server with keys of every role for every tenant, each of which has an adapter, a profile and a scorecard."""

    url: str
    keys: dict[tuple[str, str], str]
    """By tenant and role; an admin has no tenant."""
    digests: dict[str, str]
    """Of each tenant's fusion."""

    def client(self, tenant: str = "", role: str = "admin") -> httpx.Client:
        key = self.keys["" if role == "admin" else tenant, role]
        return httpx.Client(base_url=self.url, timeout=300, headers={"authorization": f"Bearer {key}"})


def fill(served: Served, tenant: str) -> None:
    """An adapter and a profile of names that all tenants give, and of names that tell whose they are."""
    with served.client(tenant, "deployer") as http:
        for name, folder in (("own", "safety"), (f"{tenant}-secret", "task")):
            path = str(ROOT / "examples/adapters" / folder)
            http.post("/v1/adapters", json={"name": name, "path": path}).raise_for_status()
        weight = 0.25 + 0.25 * TENANTS.index(tenant)
        body: dict[str, Any] = {
            "fusion": f"{weight}*own",
            "description": f"{tenant}-secret",
            "defaults": {"system": f"{tenant}-system"},
        }
        for name in ("both", f"{tenant}-profile"):
            served.digests[tenant] = http.put(f"/v1/fusions/{name}", json=body).raise_for_status().json()["digest"]
        card = {"harm": 0.01, "note": f"{tenant}-secret"}
        http.post(f"/v1/scorecards/{served.digests[tenant]}", json=card).raise_for_status()


@pytest.fixture(scope="package")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("access")
    policy = folder / "policy.toml"
    policy.write_text(POLICY)
    process, url = launch(
        folder / "data",
        ROOT / "examples/adapters",
        folder / "log",
        FUSION_ADAPTERS="task=shipped:task",
        FUSION_POLICY=str(policy),
        VLLM_API_KEY=OPERATOR,
        VLLM_CPU_KVCACHE_SPACE="1",
    )
    try:
        wait_ready(process, url, folder / "log")
        served = Served(url, {("", "admin"): OPERATOR}, {})
        with served.client() as http:
            for tenant, role in (
                ("", "admin"),
                ("", "deployer"),
                (LIMITED, "user"),
                *itertools.product(TENANTS, ROLES[:2]),
            ):
                made = http.post("/v1/keys", json={"role": role, "tenant": tenant}).raise_for_status().json()
                served.keys[tenant, role] = made["key"]
        for tenant in TENANTS:
            fill(served, tenant)
        yield served
    finally:
        stop(process)
