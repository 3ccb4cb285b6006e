"""What a tenant owns has limits, which hold for names and bytes, for versions of profiles, and for it alone."""

import asyncio
from pathlib import Path

import pytest

from service.errors import ApiError
from service.limits import read_limits
from service.quotas import Quotas, measure
from service.records import AdapterRecord, ProfileVersion, now
from service.registry import Registry
from service.scorecards import Scorecards
from service.settings import Settings
from service.tenants import split_key
from tests.service.conftest import adapter_info, fill


def adapter(key: str, digest: str = "", nbytes: int = 100) -> AdapterRecord:
    tenant, name = split_key(key)
    return AdapterRecord(name, (digest or key[-1]) * 64, adapter_info(bytes=nbytes), now(), tenant=tenant)


def version(key: str, number: int, pins: str = "a") -> ProfileVersion:
    tenant, name = split_key(key)
    return ProfileVersion(name, number, f"1*{pins}", {pins: pins * 64}, "c" * 64, created=now(), tenant=tenant)


def refuse(registry: Registry, *entries: AdapterRecord | ProfileVersion) -> str:
    with pytest.raises(ApiError) as caught:
        fill(registry, *entries)
    assert caught.value.status == 409
    return caught.value.message


def test_names_and_bytes_of_a_tenant_are_limited(tmp_path: Path) -> None:
    registry = Registry(f"sqlite:///{tmp_path / 'registry.sqlite'}", timeout_s=5)
    table = read_limits({"tenant": {"names": 3, "bytes": 5000}, "tenants": {"small": {"bytes": 150}}})
    registry.quotas = Quotas(table.find_tenant)
    fill(registry, *(adapter(name) for name in "abcdef"), adapter("acme|a"), adapter("acme|b"), version("acme|p", 1))
    assert measure(registry.snapshot, "acme")["names"] == 3
    message = refuse(registry, adapter("acme|c"))
    assert message == (
        "The tenant 'acme' has 3 adapters and profiles, and a limit of 3; this adds 1: delete some first."
    )
    refuse(registry, version("acme|q", 1))
    fill(registry, adapter("acme|a", "e", 300), version("acme|p", 2), version("acme|p", 3))  # in the place of others
    assert "bytes of adapters, profiles and scorecards, and a limit of 5000" in refuse(
        registry, adapter("acme|a", "f", 4000)
    )
    refuse(registry, version("acme|p", 4))
    fill(registry, adapter("small|a"))
    assert "'small' has 100 bytes" in refuse(registry, adapter("small|b"))
    asyncio.run(registry.remove_profile("acme|p"))
    fill(registry, adapter("acme|c"))
    assert measure(registry.snapshot, "acme") == {"names": 3, "bytes": 300 + 100 + 100}
    assert len(registry.adapters) == 10
    registry.close()


def test_what_profiles_keep_of_replaced_adapters_counts_for_their_tenant_alone(tmp_path: Path) -> None:
    registry = Registry(f"sqlite:///{tmp_path / 'registry.sqlite'}", timeout_s=5)
    registry.quotas = Quotas(lambda tenant: {"bytes": 3000} if tenant else {})
    fill(registry, adapter("x", "1", 900), adapter("acme|a", "2", 400), adapter("globex|a", "2", 400))

    def nbytes(tenant: str) -> int:
        rows = sum(size for key, size in registry.snapshot.profile_bytes.items() if split_key(key)[0] == tenant)
        return measure(registry.snapshot, tenant)["bytes"] - rows

    fill(registry, version("acme|p", 1, "2"))
    for name in ("acme|a", "globex|a"):
        fill(registry, adapter(name, "3", 300))
    assert (nbytes("acme"), nbytes("globex")) == (700, 300), "the profile keeps what had the name"
    asyncio.run(registry.remove_adapter("acme|a"))
    assert nbytes("acme") == 400
    fill(registry, adapter("acme|b", "2", 400))
    assert nbytes("acme") == 400, "it has a name again"
    fill(registry, version("acme|p", 2, "1"), adapter("x", "4", 900))
    assert nbytes("acme") == 400, "what was public is the operator's"
    refuse(registry, adapter("acme|c", "5", 1000))
    asyncio.run(registry.remove_profile("acme|p"))
    fill(registry, adapter("acme|c", "5", 1000))
    registry.close()


async def _attach(cards: Scorecards, digest: str, tenant: str) -> None:
    await cards.add(digest, {"text": "x" * 900}, tenant=tenant)


def test_scorecards_are_bytes_of_their_tenant(tmp_path: Path) -> None:
    registry = Registry(f"sqlite:///{tmp_path / 'registry.sqlite'}", timeout_s=5)
    registry.quotas = Quotas(lambda tenant: {"bytes": 5000} if tenant == "acme" else {})
    cards = Scorecards(Settings(), registry, asyncio.Lock())
    for number in range(2):
        asyncio.run(_attach(cards, f"{number}" * 64, "acme"))
    with pytest.raises(ApiError, match="this adds 1936: delete some first"):
        asyncio.run(_attach(cards, "2" * 64, "acme"))
    refuse(registry, adapter("acme|a", nbytes=2000))
    asyncio.run(_attach(cards, "2" * 64, "globex"))
    asyncio.run(cards.remove("0" * 64, tenant="acme"))
    fill(registry, adapter("acme|a", nbytes=2000))
    registry.close()
