"""Evidence: which scorecards let a profile answer, who may have measured them, and how often the database is asked."""

import asyncio
import math
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from service.callers import Caller
from service.errors import ApiError
from service.evidence import read_measures
from service.policy import Policy
from service.policy_rules import EvidenceRule
from service.scorecards import Scorecards
from service.settings import Settings
from tests.service.policies import make_policy
from tests.service.replicas import Replica, filled_pair as filled_pair, until
from tests.service.rings import make_keys

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("time_limit")]
TRUSTED, OTHER, USER = Caller("k1", "deployer"), Caller("k2", "deployer"), Caller("k3", "user")
RULE = {"limit": "harm <= 0.05", "keys": ["k1"], "profiles": "orders-*"}
GOOD, BAD = {"harm": {"value": 0.04, "total": 100}}, {"harm": 0.2}
RECIPE = "0.6*a + 0.4*b"


async def attach(cards: Scorecards, digest: str, card: dict[str, Any], caller: Caller) -> int:
    """Add a card as `caller` would."""
    return await cards.add(digest, card, tenant=caller.tenant, key=caller.key)


def open_parts(replica: Replica, **rule: Any) -> tuple[Policy, Scorecards, Any]:
    """A policy with one rule on evidence, and scorecards and profiles under it."""
    policy = make_policy(replica.registry, evidence=[{**RULE, **rule}])
    lock = replica.profiles.write_lock
    return (
        policy,
        Scorecards(Settings(), replica.registry, lock, policy.evidence),
        replace(replica.profiles, policy=policy),
    )


async def test_a_profile_needs_a_trusted_card_of_exactly_its_fusion(pair: tuple[Replica, Replica]) -> None:
    policy, cards, profiles = open_parts(pair[0])
    fusion, other = pair[0].names.look_up(RECIPE), pair[0].names.look_up("0.5*a + 0.5*b")
    assert fusion is not None
    assert other is not None

    async def refused(words: str) -> None:
        with pytest.raises(ApiError, match=words) as caught:
            await profiles.put("orders-eu", RECIPE, caller=TRUSTED)
        assert (caught.value.status, "orders-eu" in pair[0].registry.profiles) == (403, False)

    await refused(
        "no scorecard with 'harm' by a trusted key; the profile 'orders-eu' needs 'harm <= 0.05' on the fusion"
    )
    await attach(cards, fusion.digest, GOOD, OTHER)
    await attach(cards, fusion.digest, {**GOOD, "key": "k1", "tenant": ""}, OTHER)
    await attach(cards, other.digest, GOOD, TRUSTED)
    await attach(cards, fusion.digest, {"safe": 1.0, "harm": "0.01"}, TRUSTED)
    await attach(cards, fusion.digest, GOOD, Caller("k1", "deployer", "acme"))  # of a tenant that is not the caller's
    await refused("no scorecard with 'harm' by a trusted key")
    first = await attach(cards, fusion.digest, GOOD, TRUSTED)
    assert (await policy.judge(fusion, USER, profile="orders-eu")).scorecards == (first,)
    version, _ = await profiles.put("orders-eu", RECIPE, caller=TRUSTED)
    served = pair[0].names.resolve_profile(version)
    bad = await attach(cards, fusion.digest, BAD, TRUSTED)
    verdict = await policy.judge(served, USER)
    assert (verdict.rule, f"scorecard {bad} has harm = 0.2" in verdict.reason) == ("evidence-1", True)
    await cards.remove(fusion.digest, bad)
    assert (await policy.judge(served, USER)).allowed
    await cards.remove(fusion.digest, first)
    assert not (await policy.judge(served, USER)).allowed
    assert (await policy.judge(fusion, USER)).allowed, "a recipe of one's own is for other rules"
    await profiles.put("free", RECIPE, caller=TRUSTED)


async def test_cards_of_a_key_that_was_revoked_count_no_more(pair: tuple[Replica, Replica]) -> None:
    fusion, keys = pair[0].names.look_up(RECIPE), make_keys(pair[0].registry, Settings())
    assert fusion is not None
    await keys.create("admin")
    made, rotated, other = [(await keys.create("deployer"))[0] for _ in range(3)]
    policy, cards, _ = open_parts(pair[0], keys=[made.id, rotated.id])
    far, _, _ = open_parts(pair[1], keys=[made.id, rotated.id])

    async def allowed(judge: Policy = policy) -> bool:
        return (await judge.judge(fusion, USER, profile="orders-eu")).allowed

    first = await attach(cards, fusion.digest, GOOD, made.caller)
    assert await allowed()
    await keys.revoke(other.id)
    await keys.rotate(made.id, timedelta(hours=1))
    assert await allowed(), "another key's end, or a new secret of this one, changes nothing"
    await keys.revoke(made.id)
    assert not await allowed()
    await until(lambda: pair[1].registry.snapshot.keys[made.id].revoked is not None)
    assert not await allowed(far)
    del pair[1].registry.snapshot.keys[made.id]
    assert not await allowed(far), "nor when its row has made room for another key"
    assert first in [card["scorecard_id"] for card in (await cards.read(fusion.digest, limit=9, after=0))[0]]
    await attach(cards, fusion.digest, GOOD, rotated.caller)
    assert await allowed()


async def test_a_version_without_evidence_leaves_the_one_before_current(pair: tuple[Replica, Replica]) -> None:
    _, cards, profiles = open_parts(pair[0])
    fusion = pair[0].names.look_up(RECIPE)
    assert fusion is not None
    await profiles.put("free", "1*a")
    old = await replace(profiles, policy=make_policy(pair[0].registry)).put("orders-us", "1*b")
    await attach(cards, fusion.digest, GOOD, TRUSTED)
    await profiles.put("orders-us", RECIPE)
    for change in (profiles.put("orders-us", "0.5*a"), profiles.rollback("orders-us", old[0].version)):
        with pytest.raises(ApiError, match="rule 'evidence-1' refuses"):
            await change
    assert pair[0].registry.profiles["orders-us"].recipe == "0.6*a + 0.4*b"


async def test_a_card_has_the_server_s_time_and_is_not_for_ever(pair: tuple[Replica, Replica]) -> None:
    fusion = pair[0].names.look_up(RECIPE)
    assert fusion is not None
    policy, cards, _ = open_parts(pair[0], max_age_days=1e-6)
    await attach(cards, fusion.digest, {**GOOD, "created": "2999-01-01T00:00:00+00:00"}, TRUSTED)
    await asyncio.sleep(1.1)
    verdict = await policy.judge(fusion, USER, profile="orders-eu")
    assert (verdict.rule, "older than 1e-06 days" in verdict.reason) == ("evidence-1", True)


async def test_no_fusion_s_cards_are_read_twice_until_something_changes(
    pair: tuple[Replica, Replica], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = pair
    (policy, cards, _), (_, far, _) = open_parts(one), open_parts(two)
    fusion = one.names.look_up(RECIPE)
    assert fusion is not None
    asked: list[Any] = []
    own = one.registry.transact

    def transact(call: Any) -> Any:
        asked.append(call)
        return own(call)

    async def judge() -> tuple[str, int]:
        verdicts = [await policy.judge(fusion, USER, profile="orders-eu") for _ in range(5)]
        return verdicts[-1].rule, len(asked)

    monkeypatch.setattr(one.registry, "transact", transact)
    assert await judge() == ("evidence-1", 0), "no card is known of without asking"
    await attach(cards, fusion.digest, GOOD, TRUSTED)
    assert await judge() == ("", 1)
    await attach(far, fusion.digest, BAD, TRUSTED)
    await until(lambda: one.registry.snapshot.scorecard_counts[fusion.digest] == 2)
    assert await judge() == ("evidence-1", 2)


@pytest.mark.parametrize(
    ("body", "found"),
    [
        ('{"harm": 0.1, "safe": 2}', {"harm": 0.1}),
        ('{"harm": {"value": 1}}', {"harm": 1.0}),
        ('{"harm": true}', {}),
        ('{"harm": {"value": "1"}}', {}),
        ('{"harm": {}}', {}),
        (f'{{"harm": -1{"0" * 400}}}', {"harm": math.nan}),
        ("[1]", {}),
        ("{", {}),
    ],
)
async def test_only_numbers_are_measures(body: str, found: dict[str, float]) -> None:
    assert read_measures(body, {"harm"}) == pytest.approx(found, nan_ok=True)
    for limit in ("harm <= 0.05", "harm >= 0.05"):  # neither holds for a value that is not a number
        rule = EvidenceRule.model_validate({**RULE, "limit": limit})
        assert not any(math.isnan(value) and rule.holds(value) for value in found.values())
