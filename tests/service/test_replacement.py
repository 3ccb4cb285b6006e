"""What training loops do to a name, over and over: replace it, unload it and load it again; and what profiles keep."""

import asyncio

import pytest

from adapters import AdapterError, Store, save
from service.errors import ApiError
from service.registry import Registry
from tests.adapters import samples
from tests.service.shops import Shop
from tests.service.test_catalog import shop  # noqa: F401 - a fixture

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("time_limit")]
STEPS = 12


def digest(shop: Shop, name: str) -> str:  # noqa: F811 - a fixture
    fusion = shop.catalog.names.look_up(name)
    assert fusion is not None
    return fusion.digest


def stored(shop: Shop) -> set[str]:  # noqa: F811 - a fixture
    return {entry.key for entry in shop.sources.entries()}


def builds(shop: Shop) -> int:  # noqa: F811 - a fixture
    return len(Store(shop.catalog.settings.data / "builds", budget_bytes=2**40).entries())


async def settle() -> None:
    for _ in range(50):
        await asyncio.sleep(0.002)


async def test_a_name_is_replaced_and_only_with_leave(shop: Shop) -> None:  # noqa: F811 - a fixture
    first, _ = await shop.catalog.add("wide", shop.root / "wide")
    before = digest(shop, "wide")
    with pytest.raises(ApiError, match="'wide' is already an adapter; choose another name, or pass 'replace': true"):
        await shop.catalog.add("wide", shop.root / "narrow")
    second, new = await shop.catalog.add("wide", shop.root / "narrow", replace=True)  # B1
    assert not new
    assert first.digest != second.digest
    assert digest(shop, "wide") == second.info["fusion_digest"] != before
    assert stored(shop) == {second.digest}
    assert await shop.catalog.add("wide", shop.root / "narrow", replace=True) == (second, False)
    for taken in (samples.BASE, "even"):
        if taken == "even":
            await shop.profiles.put("even", "1*wide")
        with pytest.raises(ApiError, match="is already"):
            await shop.catalog.add(taken, shop.root / "third", replace=True)


async def test_profiles_keep_what_they_pin_over_replacement_unloading_and_restart(shop: Shop) -> None:  # noqa: F811 - a fixture
    old, _ = await shop.catalog.add("wide", shop.root / "wide")
    await shop.profiles.put("even", "0.5*wide")
    pinned = digest(shop, "even")
    new, _ = await shop.catalog.add("wide", shop.root / "narrow", replace=True)
    await shop.catalog.remove("wide", even_pinned=True)  # B4
    assert stored(shop) == {old.digest}, "the second had no profile"
    again, is_new = await shop.catalog.add("wide", shop.root / "narrow")
    assert (again.digest, is_new) == (new.digest, True)
    await shop.catalog.remove("wide")  # no profile names what it is now
    fusion = shop.catalog.names.look_up("even")
    assert fusion is not None
    assert (fusion.digest, fusion.rank) == (pinned, 3)
    assert shop.catalog.names.find_missing(shop.profiles.registry.profiles["even"]) is None
    before = shop.catalog.registry.snapshot
    shop.catalog.registry.close()
    registry = Registry(f"sqlite:///{shop.catalog.settings.data / 'registry.sqlite'}", timeout_s=5)
    assert registry.snapshot == before
    assert registry.snapshot.nameless == {old.digest: old}
    registry.close()


async def test_what_is_kept_goes_with_its_last_profile(shop: Shop) -> None:  # noqa: F811 - a fixture
    old, _ = await shop.catalog.add("wide", shop.root / "wide")
    for profile in ("even", "odd"):
        await shop.profiles.put(profile, "0.5*wide")
    await shop.catalog.remove("wide", even_pinned=True)
    await shop.profiles.remove("even")
    assert stored(shop) == {old.digest}
    async with shop.catalog.pool.lease(shop.catalog.names.look_up("odd")):  # type: ignore[arg-type]  # a profile
        pass
    await shop.profiles.remove("odd")
    await settle()
    snapshot = shop.catalog.registry.snapshot
    assert not snapshot.nameless and not snapshot.ranks and not snapshot.norms  # noqa: PT018 - one state
    assert not stored(shop)
    assert not builds(shop)


async def test_a_second_name_of_what_a_profile_pins_can_go(shop: Shop) -> None:  # noqa: F811 - a fixture
    await shop.catalog.add("wide", shop.root / "wide")
    await shop.profiles.put("even", "0.5*wide")
    pinned = digest(shop, "even")
    await shop.catalog.add("twin", shop.root / "wide")
    await shop.catalog.remove("twin")  # B2
    await shop.catalog.add("wide", shop.root / "narrow", replace=True)
    await shop.catalog.add("twin", shop.root / "wide")
    assert not shop.catalog.registry.snapshot.nameless, "it has a name again"
    await shop.catalog.remove("twin")  # B2: its content has no other name now, but the profile knows it by another
    assert digest(shop, "even") == pinned
    await shop.catalog.add("wide", shop.root / "wide", replace=True)
    with pytest.raises(ApiError, match="'wide' is used by even") as caught:
        await shop.catalog.remove("wide")
    assert caught.value.status == 409


async def test_what_is_kept_counts_as_an_adapter(shop: Shop) -> None:  # noqa: F811 - a fixture
    for number, name in enumerate(("wide", "narrow", "third")):
        await shop.catalog.add("policy", shop.root / name, replace=True)
        await shop.profiles.put(f"step-{number}", "policy")
    with pytest.raises(ApiError, match=r"There are already 3 adapters \(2 without a name, for profiles\), the limit"):
        await shop.catalog.add("policy", shop.root / "fourth", replace=True)


@pytest.mark.parametrize("way", ["replace", "unload"])
async def test_steps_of_a_training_leave_nothing_behind(shop: Shop, way: str) -> None:  # noqa: F811 - a fixture
    await shop.catalog.add("other", shop.root / "third")
    for step in range(STEPS):
        save(samples.adapter(100 + step, 2), shop.root / f"step-{step}")
        await shop.catalog.add("org/policy@rl", shop.root / f"step-{step}", replace=way == "replace")
        for recipe in ("org/policy@rl", "0.5*`org/policy@rl` + 0.5*other", "svd(`org/policy@rl`, rank=1)"):
            async with shop.catalog.pool.lease(shop.catalog.names.look_up(recipe)):  # type: ignore[arg-type]  # no base
                pass
        if way == "unload":
            await shop.catalog.remove("org/policy@rl")
    await shop.catalog.remove("org/policy@rl" if way == "replace" else "other")
    await settle()
    assert len(stored(shop)) == (way == "replace")
    assert builds(shop) <= 1, "the stack of the other alone may stay"
    snapshot = shop.catalog.registry.snapshot
    assert len(snapshot.ranks) == len(snapshot.norms) == len(snapshot.adapters) == (way == "replace")


async def test_whoever_waits_gets_the_content_that_the_name_had(shop: Shop) -> None:  # noqa: F811 - a fixture
    old, _ = await shop.catalog.add("wide", shop.root / "wide")
    await shop.catalog.add("narrow", shop.root / "narrow")
    fusion = shop.catalog.names.look_up("svd(1*wide + 1*narrow, rank=2)")
    assert fusion is not None
    goes_on = shop.engine.hold()

    async def ask() -> str:
        async with shop.catalog.pool.lease(fusion) as lease:
            return lease.resident.key

    asking = asyncio.create_task(ask())
    replacing = asyncio.create_task(shop.catalog.add("wide", shop.root / "third", replace=True))
    await asyncio.sleep(0.3)
    assert old.digest in stored(shop)
    goes_on.set()
    assert await asking
    await replacing
    await settle()
    assert old.digest not in stored(shop)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("wyde", "There is no adapter 'wyde': did you mean 'wide'?"),
        ("0.5*wide", "There is no adapter '0.5*wide'"),
        ("a+", "There is no adapter 'a+'"),
        ("even", "'even' is not an adapter but a profile"),
        (samples.BASE, "is not an adapter but the base model"),
    ],
)
async def test_what_is_no_adapter_is_not_removed(shop: Shop, name: str, words: str) -> None:  # noqa: F811 - a fixture
    await shop.catalog.add("wide", shop.root / "wide")
    await shop.profiles.put("even", "0.5*wide")
    with pytest.raises(ApiError) as caught:
        await shop.catalog.remove(name, even_pinned=True)
    assert (caught.value.status, caught.value.param, words in caught.value.message) == (404, "name", True)


async def test_before_its_first_step_a_training_has_an_adapter_without_effect(shop: Shop) -> None:  # noqa: F811 - a fixture
    shop.engine.effect = 0.0
    with pytest.raises(AdapterError, match="no_effect"):
        await shop.catalog.add("policy", shop.root / "wide")
    record, new = await shop.catalog.add("policy", shop.root / "wide", replace=True)
    assert (new, record.info["effect"]) == (True, 0.0)


async def test_profiles_and_adapters_share_no_form_of_a_name(shop: Shop) -> None:  # noqa: F811 - a fixture
    await shop.catalog.add("sql@v1", shop.root / "wide")
    await shop.catalog.add("sql", shop.root / "narrow")
    with pytest.raises(ApiError, match="is already an adapter"):
        await shop.profiles.put("sql", "1*sql")
    await shop.catalog.remove("sql")
    with pytest.raises(ApiError, match="would have the form of the adapter 'sql@v1'"):
        await shop.profiles.put("sql", "`sql@v1`")
    for name, words in (
        ("a@1", "no name for a profile"),
        ("a/export", "reserved"),
        ("export", ""),
        ("team/7b-sql", ""),
    ):
        if words:
            with pytest.raises(ValueError, match="is not a name for a profile" if "@" in name else words):
                await shop.profiles.put(name, "`sql@v1`")
        else:
            await shop.profiles.put(name, "`sql@v1`")
            with pytest.raises(ApiError, match="the form of a version"):
                await shop.catalog.add(f"{name}@x", shop.root / "third")
            assert digest(shop, f"{name}@1") == digest(shop, "sql@v1")
            await shop.profiles.remove(name)
