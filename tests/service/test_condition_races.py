"""Conditional changes by two replicas at once, on a real PostgreSQL: of those that one state allows, one is made."""

import asyncio
import random
from collections.abc import Callable, Coroutine
from types import SimpleNamespace
from typing import Any

import pytest

from service import follower
from service.conditions import Condition
from service.errors import ApiError
from service.routes import get_condition
from tests.service.replicas import Replica, filled_pair as filled_pair, until

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("time_limit")]
ROUNDS = 12
Change = Callable[[Replica, Condition, int], Coroutine[Any, Any, object]]


async def put(replica: Replica, condition: Condition, number: int) -> object:
    return await replica.profiles.put("p", f"0.{number + 1:02}*a + 0.5*b", condition=condition)


async def roll_back(replica: Replica, condition: Condition, number: int) -> object:
    known = replica.registry.versions.get("p", {}).keys() - {replica.serves("p")}  # to that one nothing would change
    if not known:
        return await put(replica, condition, number)
    return await replica.profiles.rollback("p", min(known), condition=condition)


async def remove(replica: Replica, condition: Condition, number: int) -> object:
    await replica.profiles.remove("p", condition=condition)
    return None


async def replace(replica: Replica, condition: Condition, number: int) -> object:
    folder = replica.root / ("c", "d")[number // 4 % 2]  # the same all round, and another than the one before: a change
    return await replica.catalog.add("x", folder, replace=True, condition=condition)


async def unload(replica: Replica, condition: Condition, number: int) -> object:
    await replica.catalog.remove("x", condition=condition)
    return None


async def race(pair: tuple[Replica, Replica], changes: list[Change], condition: Condition, first: int) -> list[str]:
    """What each change was answered when all began at about the same time, on either replica; `first` is the number of
    the first one.
    """

    async def ask(number: int, change: Change) -> str:
        await asyncio.sleep(random.random() * 0.02)
        try:
            await change(pair[number % 2], condition, number)
        except ApiError as error:
            # Whoever comes after a removal finds nothing.
            return "late" if error.status in (404, 412) else error.message
        return "made"

    return await asyncio.gather(*(ask(number, change) for number, change in enumerate(changes, first)))


async def agree(pair: tuple[Replica, Replica], name: str) -> str | None:
    """The tag of a profile or adapter, once both replicas have the same."""
    one, two = (replica.registry for replica in pair)

    def tags() -> list[str | None]:
        return [registry.tag_profile(name) or registry.tag_adapter(name) for registry in (one, two)]

    await until(lambda: one._changes == two._changes and tags()[0] == tags()[1])  # noqa: SLF001 - it shows nowhere else
    return tags()[0]


@pytest.mark.parametrize(("name", "create", "others"), [("p", put, [roll_back, remove]), ("x", replace, [unload])])
async def test_of_changes_that_one_state_allows_exactly_one_is_made(
    pair: tuple[Replica, Replica], name: str, create: Change, others: list[Change]
) -> None:
    random.seed(0)
    before = -1
    for number in range(ROUNDS):
        tag = await agree(pair, name)
        condition = Condition(if_none_match="*") if tag is None else Condition(if_match=tag)
        changes = [create] * 4 if tag is None else [create, create, *random.choices([create, *others], k=2)]
        random.shuffle(changes)
        made = await race(pair, changes, condition, 4 * number)
        assert sorted(made) == ["late", "late", "late", "made"], changes
        await agree(pair, name)
        now = pair[0].registry._changes  # noqa: SLF001 - as above
        assert before in (-1, now - 1), "and nothing else was written"
        before = now


async def test_a_tag_that_another_replica_has_given_out_is_known(
    pair: tuple[Replica, Replica], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = pair
    await one.profiles.put("p", "1*a")
    await until(lambda: two.serves("p") == 1)
    monkeypatch.setattr(follower, "POLL_S", 100)
    app = SimpleNamespace(state=SimpleNamespace(service=SimpleNamespace(registry=two.registry)))
    request: Any = SimpleNamespace(app=app)
    for number in range(5):
        await one.profiles.put("p", f"0.{number + 1}*b")
        tag = one.registry.tag_profile("p")
        condition = await get_condition(request, [str(tag)])
        await two.profiles.put("p", "0.9*a", condition=condition)
        await one.registry.settle()
