"""`GET /v1/models`, over and over: what it says follows what has changed, also where the rest is kept."""

import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.testclient import TestClient

from service.front import Front
from service.placement import Home
from service.records import AdapterRecord, ProfileVersion, now
from service.registry import Registry
from service.resolve import Names
from service.settings import Settings
from tests.service.conftest import adapter_info, fill, make_service

A, B = "a" * 64, "b" * 64


class Models:
    """A service with an adapter and two versions of a profile, and what it lists."""

    def __init__(self, registry: Registry, forms: tuple[str, ...] = ()) -> None:
        self.registry = registry
        self.warm = False
        fill(registry, AdapterRecord("a", A, adapter_info(), now()))
        fill(registry, *(ProfileVersion("p", n, f"0.{n}*a", {"a": A}, str(n) * 64, created=now()) for n in (1, 2)))
        names = Names("base", registry, max_weight=16, max_norm=math.inf)
        service = make_service(registry, names, Settings(model_forms=forms))
        service.pool = self.pool = SimpleNamespace(
            groups=[],
            find_home=lambda fusion: Home(fusion.digest, None),
            home_state=lambda _: ("warm" if self.warm else "evicted", None),
        )
        self.damage: dict[str, str] = service.materializer.damage
        front = Front()
        front.start(service)
        self.http = TestClient(front)

    def list(self) -> dict[str, Any]:
        return {card["id"]: card for card in self.http.get("/v1/models").json()["data"]}

    def states(self) -> dict[str, str]:
        return {name: card["fusion"]["state"] for name, card in self.list().items() if card["fusion"]}


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    registry = Registry(f"sqlite:///{tmp_path / 'registry.sqlite'}", timeout_s=5)
    yield registry
    registry.close()


def test_the_list_follows_every_change(registry: Registry) -> None:
    models = Models(registry)
    assert models.states() == {"a": "evicted", "p": "evicted"}
    models.warm = True
    assert models.states() == {"a": "warm", "p": "warm"}
    models.warm, models.damage[A] = False, "gone"
    assert models.states() == {"a": "damaged", "p": "damaged"}
    models.damage.clear()
    registry.snapshot.add_scorecards("2" * 64, 10)
    assert models.list()["p"]["fusion"]["scorecards"] == 1
    registry.snapshot.set_current("p", 1)
    assert (models.list()["p"]["fusion"]["version"], models.list()["p"]["fusion"]["digest"]) == (1, "1" * 64)
    before = models.list()["a"]["fusion"]["digest"]
    registry.snapshot.add_adapter(AdapterRecord("a", B, adapter_info(rank=3), now()))
    after = models.list()
    assert (after["a"]["fusion"]["rank"], after["a"]["fusion"]["digest"] == before) == (3, False)
    assert after["p"]["fusion"]["rank"] == 1, "the profile keeps what it pins"
    models.pool.groups = [{A: 1}]
    models.pool.find_home = lambda _: Home("9" * 64, None)
    assert models.list()["p"]["fusion"]["stack"] == "9" * 64
    registry.snapshot.remove_profile("p")
    assert set(models.list()) == {"base", "a"}


def test_a_profile_without_its_adapter_is_damaged_until_that_is_back(registry: Registry) -> None:
    models = Models(registry)
    assert models.states()["p"] == "evicted"
    rank = registry.snapshot.ranks.pop(A)
    assert models.states()["p"] == "damaged"
    registry.snapshot.ranks[A] = rank
    assert models.states()["p"] == "evicted"


def test_every_other_form_follows_its_name_in_the_list(registry: Registry) -> None:
    models = Models(registry, ("aliases", "versions", "publishers/team"))
    for _ in range(2):  # the second time what is kept
        roots = {card["id"]: card["root"] for card in models.http.get("/v1/models").json()["data"]}
        assert roots == {
            **{"base": "base", "publishers/team/models/base": "base"},
            **{"a": "a", "base:a": "a", "publishers/team/models/a": "a"},
            **{"p": "p", "base:p": "p", "publishers/team/models/p": "p", "p@1": "p", "p@2": "p"},
        }
