"""The policy on combinations: its file, each rule, whom it is about, and that it comes before everything else."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from adapters import parse
from service.__main__ import main
from service.callers import CALLER, Caller
from service.errors import ApiError
from service.policy import Policy
from service.policy_rules import Rules, read_rules
from service.records import AdapterRecord, ProfileVersion
from service.registry import Registry
from service.resolve import Fusion, Names
from service.settings import SettingsError
from tests.conftest import ROOT
from tests.service.conftest import adapter_info, fill
from tests.service.intakes import Setup, make_setup
from tests.service.policies import make_policy

pytestmark = pytest.mark.anyio
DIGESTS = {"safety": "a" * 64, "task": "b" * 64, "polite": "c" * 64, "late": "d" * 64}
USER, DEPLOYER = Caller("k1", "user"), Caller("k2", "deployer")
FLOOR: dict[str, Any] = {"floor": [{"adapter": "safety", "at_least": 0.3}]}


@pytest.fixture
def names(tmp_path: Path) -> Iterator[Names]:
    registry = Registry(f"sqlite:///{tmp_path / 'registry.sqlite'}", timeout_s=5)
    records = [AdapterRecord(name, digest, adapter_info(rank=2), "") for name, digest in DIGESTS.items()]
    records += [AdapterRecord("risk", "e" * 64, adapter_info(gate='{"yes": 1, "no": 2}'), "")]
    records += [AdapterRecord("quiet", "f" * 64, adapter_info(rank=2, answer_only=True), "")]
    records += [AdapterRecord("twin", DIGESTS["task"], adapter_info(rank=2), "")]
    fill(registry, *records)
    yield Names("base", registry, max_weight=16, max_norm=math.inf)
    registry.close()


def policy_for(names: Names, **tables: Any) -> Policy:
    return make_policy(names.registry, **tables)


async def judge(names: Names, text: str, caller: Caller = USER, **tables: Any) -> tuple[str, str]:
    """The rule that refuses a recipe, and why."""
    verdict = await policy_for(names, **tables).judge(names.look_up(text), caller)
    return verdict.rule, verdict.reason


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("1*task", "'safety' is missing"),
        ("1*task + 0.2*safety", "'safety' has 0.2"),
        ("1*task + -0.5*safety", "'safety' has -0.5"),
        ("1*task + steps(prompt: 1, 4: 0.2)*safety", "from token 4 of the answer on, 'safety' has 0.2"),
        ("answer(1*task + 1*safety)", "in the prompt, 'safety' has 0"),
        ("1*task + fade(1..0, 8)*safety", "from token 5 of the answer on, 'safety' has 0.285714"),
        ("1*task + ramp(0.1..1)*safety", "'safety' has 0.1 in some modules or components"),
        ("1*task + {*.mlp.*: 0.1, *: 1}*safety", "'safety' has 0.1 in some modules or components"),
        ("1*task + [1, 0.1]*safety", "'safety' has 0.1 in some modules or components"),
        (
            "gate(1*task + 0.5*safety, by=risk, safety in 0.1..1)",
            "where the gate 'risk' chooses the least, 'safety' has",
        ),
        ("slerp(1*task + 1*safety, t=0.2, from=task)", "'safety' has 0.2"),
        ("safe_merge(1*task, safety=safety, threshold=1, share=1)", "'safety' has 0 in some modules"),
        ("ties(1*task + 1*safety)", "how much of 'safety' is left by the method 'ties' is not known"),
        ("svd(1*task + 1*safety, rank=1)", "how much of 'safety' is left by the method 'svd' is not known"),
    ],
)
async def test_a_floor_holds_at_every_token_module_and_outcome(names: Names, text: str, found: str) -> None:
    rule, reason = await judge(names, text, **FLOOR)
    assert rule == "floor-1"
    assert found in reason
    assert "every fusion needs it with at least 0.3 at every token, in every module" in reason


async def test_what_may_be_truncated_keeps_no_floor(names: Names) -> None:
    rule, reason = await judge(names, "1*task + 1*safety + 1*polite + 1*late", **FLOOR, max_rank=7)
    assert (rule, "ranks add up to 8, over FUSION_MAX_LORA_RANK=7" in reason) == ("floor-1", True)


@pytest.mark.parametrize(
    "text",
    [
        "safety",
        "1*task + 0.3*safety",
        "1*task + steps(prompt: 1, 4: 0.3)*safety",
        "1*task + {*.mlp.*: fade(1..0.3, 8), *: ramp(0.3..1)}*safety",
        "gate(1*task + 0.5*safety, by=risk, safety in 0.3..1, task in 0..1)",
        "slerp(1*task + 1*safety, t=0.3, from=task)",
        "safe_merge(1*task + 0.6*safety, safety=polite, threshold=0.5)",
    ],
)
async def test_what_keeps_the_floor_is_served(names: Names, text: str) -> None:
    assert await judge(names, text, **FLOOR) == ("", "")


async def test_a_floor_may_be_about_the_answer_alone(names: Names) -> None:
    answer: dict[str, Any] = {"floor": [{"adapter": "quiet", "at_least": 0.3, "tokens": "answer"}]}
    assert await judge(names, "answer(1*task + 0.3*quiet)", **answer) == ("", "")
    assert await judge(names, "1*task + steps(0: 0.3)*quiet", **answer) == ("", "")
    rule, reason = await judge(names, "1*task + steps(1: 0.3)*quiet", **answer)
    assert (rule, reason[:30]) == ("floor-1", "in the prompt, 'quiet' has 0; "), "token 0 has the prompt's weight"


async def test_rules_are_about_contents_not_names(names: Names) -> None:
    own = Fusion(parse("1*task + 1*safety"), {"task": "b" * 64, "safety": "9" * 64}, "f" * 64, "(inline)", ranks={})
    assert (await policy_for(names, **FLOOR).judge(own, Caller("k", "user", "acme"))).rule == "floor-1"
    assert (await judge(names, "1*twin", range=[{"adapter": "task", "at_most": 0.9}]))[0] == "range-1"
    both = "0.5*task + 0.5*twin"
    assert (await judge(names, both, range=[{"adapter": "task", "at_most": 0.9}]))[0] == "range-1", "they add up"
    assert (await judge(names, "1*twin + 1*polite", apart=[{"adapters": ["task", "polite"]}]))[0] == "apart-1"
    assert (await judge(names, "1*safety", floor=[{"adapter": "gone", "at_least": 1}])) == (
        "floor-1",
        "'gone' is not registered; every fusion needs it with at least 1 at every token, in every module and at every "
        "outcome of a gate",
    )
    also: dict[str, Any] = {"floor": [{"adapter": "gone", "at_least": 1, "also": [DIGESTS["safety"]]}]}
    assert await judge(names, "1*safety", **also) == ("", "")


async def test_a_pinned_content_that_has_lost_its_name_keeps_no_floor(names: Names) -> None:
    old = {"task": "b" * 64, "safety": "9" * 64}
    await names.registry.add_adapter(AdapterRecord("once", "9" * 64, adapter_info(), ""))
    version = ProfileVersion("old", 1, "1*task + 1*safety", old, "f" * 64)
    verdict = await policy_for(names, **FLOOR).judge(names.resolve_profile(version), USER)
    assert (verdict.rule, "'safety' is missing" in verdict.reason) == ("floor-1", True)


@pytest.mark.parametrize(
    ("text", "tables", "rule"),
    [
        ("1*task + 1*polite", {"apart": [{"id": "no-both", "adapters": ["late", "task", "polite"]}]}, "no-both"),
        ("gate(1*task, by=risk, task in 0..1)", {"apart": [{"adapters": ["risk", "task"]}]}, "apart-1"),
        ("safe_merge(1*task, safety=polite, threshold=1)", {"apart": [{"adapters": ["task", "polite"]}]}, "apart-1"),
        ("1*task", {"range": [{"adapter": "task", "at_least": 0.5, "at_most": 1}]}, ""),
        ("1*polite", {"range": [{"adapter": "task", "at_least": 0.5}]}, ""),
        ("answer(1*task)", {"range": [{"adapter": "task", "at_least": 0.5}]}, "range-1"),
        ("slerp(1*task + 1*safety, t=0.2, from=task)", {"range": [{"adapter": "task", "at_most": 2}]}, "range-1"),
        ("1*task + 1*late", {"adapters": ["task", "safety"]}, "adapters"),
        ("1*twin", {"adapters": ["task", "safety"]}, ""),
        ("gate(1*task, by=risk, task in 0..1)", {"adapters": ["task"]}, "adapters"),
        ("ties(1*task + 1*safety)", {"methods": ["sum", "slerp"]}, "methods"),
        ("0*task", {"base": {"role": "admin"}}, "base"),
        ("1e-300*task", {"base": {"role": "admin"}}, "base"),
        ("1*task + -1*twin", {"base": {"role": "admin"}}, "base"),
        ("0.01*task", {"base": {"role": "admin"}}, ""),
        ("gate(0*task, by=risk, task in 0..0)", {"base": {"role": "admin"}}, "base"),
        ("base", {"base": {"role": "deployer"}}, "base"),
        ("base", FLOOR, "base"),
        ("base", {**FLOOR, "base": {"role": "user"}}, ""),
        ("1*task + 1*polite", {"inline": {"recipes": "deployer"}}, "inline"),
        ("task", {"inline": {"recipes": "nobody"}}, ""),
        ("quiet", {"inline": {"recipes": "nobody", "schedules": "nobody"}}, ""),
        ("answer(task)", {"inline": {"schedules": "nobody"}}, "inline"),
        ("ramp(0..1)*task", {"inline": {"schedules": "deployer"}}, "inline"),
        ("gate(1*task, by=risk, task in 0..1)", {"inline": {"gates": "deployer"}}, "inline"),
        ("gate(1*task, by=risk, task in -1..1)", {"inline": {"negative": "deployer"}}, "inline"),
        ("1*safety + fade(1..-1, 4)*task", {"inline": {"negative": "admin"}}, "inline"),
    ],
)
async def test_each_rule_refuses_what_it_is_about(names: Names, text: str, tables: dict[str, Any], rule: str) -> None:
    assert (await judge(names, text, **tables))[0] == rule
    assert await judge(names, text, Caller("root", "admin"), **tables, exempt="admin") == ("", "")


async def test_a_role_may_what_its_rule_says(names: Names) -> None:
    tables: dict[str, Any] = {"inline": {"recipes": "deployer", "negative": "admin"}}
    assert await judge(names, "1*task + 1*safety", DEPLOYER, **tables) == ("", "")
    rule, reason = await judge(names, "1*task + -1*safety", DEPLOYER, **tables)
    assert (rule, reason) == ("inline", "negative weights of one's own are for admins, and you are deployer")


async def test_refusals_name_the_rule_and_what_is_required(names: Names) -> None:
    with pytest.raises(ApiError, match="rule 'floor-1' refuses this: 'safety' is missing; every fusion") as caught:
        await policy_for(names, **FLOOR).check(names.look_up("1*task"), USER)
    assert (caught.value.status, "GET /v1/policy" in caught.value.message) == (403, True)


async def test_names_that_no_adapter_has_are_told(names: Names) -> None:
    tables: dict[str, Any] = {
        "adapters": ["task", "safty", "polite"],
        "floor": [{"adapter": "safty", "at_least": 0.3}],
        "apart": [{"id": "no-both", "adapters": ["task", "own"]}],
        "evidence": [{"limit": "harm <= 0.05", "keys": ["k1"]}],
    }
    await names.registry.add_adapter(AdapterRecord("own", "9" * 64, adapter_info(), "", "acme"))
    policy = policy_for(names, **tables)
    assert policy.list_warnings() == [
        "no public adapter has the name 'own', which is in the policy's rules 'no-both': register it, or correct the "
        "policy",
        "no public adapter has the name 'safty', which is in the policy's rules 'adapters', 'floor-1': did you mean "
        "'safety'?",
    ]
    for name in ("own", "safty"):
        await names.registry.add_adapter(AdapterRecord(name, "8" * 64, adapter_info(), ""))
    assert not policy.list_warnings()
    assert not policy_for(names).list_warnings()


@pytest.fixture
def setup(tmp_path: Path) -> Setup:
    setup = make_setup(tmp_path)
    setup.intake._policy = make_policy(setup.names.registry, floor=[{"adapter": "b", "at_least": 0.5}])  # noqa: SLF001
    return setup


@pytest.mark.parametrize("body", [{"model": "a"}, {"model": "short"}, {"fusion": "1*a + 0.4*b"}, {"model": "base"}, {}])
def test_a_refused_fusion_reaches_neither_pool_nor_engine(setup: Setup, body: dict[str, Any]) -> None:
    answer = setup.post({**body, "messages": []})
    assert (answer.status_code, answer.json()["error"]["type"]) == (403, "PermissionDeniedError")
    assert "refuses this" in answer.json()["error"]["message"]
    assert (setup.vllm.bodies, setup.pool.leased, setup.pool.strict) == ([], 0, None)


def test_what_asks_no_model_needs_no_leave_for_the_base(setup: Setup) -> None:
    assert setup.post({"model": "base", "prompt": "x"}, "/tokenize").status_code == 200
    assert setup.post({"model": "a", "prompt": "x"}, "/tokenize").status_code == 403
    assert setup.post({"model": "1*a + 0.5*b"}).status_code == 200


def test_the_caller_is_who_the_edge_has_found(setup: Setup) -> None:
    own = setup.intake

    async def edge(scope: Any, receive: Any, send: Any) -> None:
        await own({**scope, CALLER: Caller("k", "user")}, receive, send)

    setup.intake._policy = make_policy(setup.names.registry, inline={"recipes": "deployer"})  # noqa: SLF001
    assert setup.post({"model": "1*a + 1*b"}).status_code == 200, "without keys, everybody is the operator"
    setup.intake = edge  # type: ignore[assignment]  # as it stands before the intake
    assert setup.post({"model": "1*a + 1*b"}).status_code == 403


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("[[floor]", "cannot be read"),
        ("[[flor]]", "flor: unknown key; known keys are name, exempt"),
        ('[[floor]]\nadapter = "safety"', "floor 1, at_least: Field required"),
        ('[[floor]]\nid = "keep"\nadapter = "a"\nat_least = -1', "floor 1 ('keep'), at_least: Input should be greater"),
        ('[[floor]]\nadapter = "a b"\nat_least = 1', "floor 1, adapter: "),
        ('[[range]]\nadapter = "a"', "range 1: expected 'at_least', 'at_most' or both"),
        ('[[range]]\nadapter = "a"\nat_least = 2\nat_most = 1', "'at_least' = 2 is over 'at_most' = 1"),
        ('[[apart]]\nadapters = ["a"]', "apart 1, adapters: List should have at least 2"),
        ('methods = ["tiess"]', "methods: unknown method 'tiess': did you mean 'ties'?"),
        ('exempt = "root"', "exempt"),
        ('[[evidence]]\nlimit = "harm < 5%"\nkeys = ["k"]', "evidence 1, limit: String should match"),
        ('[[evidence]]\nlimit = "harm <= 0.05"\nkeys = []', "evidence 1, keys"),
        ('[[apart]]\nid = "x"\nadapters = ["a", "b"]\n[[apart]]\nid = "x"\nadapters = ["a", "c"]', "'x' is taken"),
    ],
)
def test_a_policy_that_is_at_fault_ends_the_start(
    tmp_path: Path, text: str, fault: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "policy.toml"
    path.write_text(text)
    with pytest.raises(SettingsError) as caught:
        read_rules(str(path))
    assert str(caught.value).startswith(f"FUSION_POLICY='{path}'")
    assert fault in str(caught.value)
    monkeypatch.setenv("FUSION_POLICY", str(path))
    assert main([]) == 2
    assert fault in capsys.readouterr().err


def test_limits_are_no_part_of_the_policy_and_its_id_is_of_its_content(tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    path.write_text('[limits]\nanything = 1\n[[floor]]\nadapter = "a"\nat_least = 1\n')
    rules = read_rules(str(path))
    path.write_text('floor = [{at_least = 1.0, adapter = "a"}] # the same\n')
    assert read_rules(str(path)).digest() == rules.digest()
    path.write_text('floor = [{at_least = 1.5, adapter = "a"}]\n')
    assert read_rules(str(path)).digest() != rules.digest()
    assert (read_rules("").ids(), Rules().ids()) == ([], [])


def test_the_example_of_the_documentation_is_a_policy(tmp_path: Path) -> None:
    page = (ROOT / "docs/policy.md").read_text()
    path = tmp_path / "policy.toml"
    path.write_text(page.split("```text\n# policy.toml")[1].split("```")[0])
    rules = read_rules(str(path))
    kinds = {rule["kind"] for rule in rules.list_rules()}
    assert kinds == {"floor", "apart", "range", "inline", "base", "evidence", "methods", "adapters"}
