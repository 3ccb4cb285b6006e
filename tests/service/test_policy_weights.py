"""No fusion that the policy lets through undercuts a floor, leaves a range or joins what is kept apart: for random
recipes of every form, their weights are computed without the policy's own arithmetic.
"""

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings, strategies as st

from adapters import METHODS, PROMPT, FusionError, Gate, LoraAdapter, Recipe, Term, tabulate
from adapters.recipes.weights import MAX_PHASES, ByModule, Components, Fade, Ramp, Weight, list_starts
from service.callers import Caller
from service.policy import Policy
from service.records import AdapterRecord
from service.registry import Registry
from service.resolve import Fusion
from tests.adapters import samples
from tests.adapters.recipe_strategies import steps
from tests.service.conftest import adapter_info, fill
from tests.service.policies import MODULES, RANK, TOKENS, list_weights, make_policy, weigh

ADAPTERS = {"safety": 1, "twin": 1, "task": 2, "polite": 3, "rude": 4}
"""Names, and the number of their content: two have one."""
DIGESTS = {name: f"{number}" * 64 for name, number in ADAPTERS.items()} | {"risk": "9" * 64}
FLOOR, LEAST, MOST, ROUNDING = 0.3, 0.0, 1.2, 1e-9

numbers = st.sampled_from([0.3, 0.6, 1.0]) | st.sampled_from([0.0, 0.3, 0.4, 1.2]) | st.floats(-0.5, 1.6)
ramps = st.builds(Ramp, numbers, numbers)
globs = st.sampled_from(["*.mlp.*", "*q_proj", "model.layers.1.*", "*"])


def courses(*, answer: bool) -> st.SearchStrategy[Weight]:
    return steps(numbers | ramps, answer=answer) | st.builds(Fade, numbers, numbers, st.integers(2, 20))


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    often = ["sum"] * 5 + [
        "slerp",
        "safe_merge",
        "safe_merge",
    ]  # the number is drawn, since equal names would count once
    chosen = draw(st.integers(0, len(often)))
    method = METHODS[often[chosen] if chosen < len(often) else draw(st.sampled_from(list(METHODS)))]
    least, most = method.terms
    answer = method.linear and draw(st.integers(0, 3)) == 0
    forms: st.SearchStrategy[Any] = numbers | ramps
    if method.linear:
        functions = courses(answer=answer)
        rules = st.dictionaries(globs, numbers | ramps | functions, min_size=1, max_size=3)
        components = st.lists(numbers, min_size=RANK, max_size=RANK)
        forms |= functions | rules.map(lambda r: ByModule(tuple(r.items())))  # type: ignore[arg-type]  # courses are given
        forms |= components.map(lambda c: Components(tuple(c)))
        forms = numbers | forms
    names = draw(st.lists(st.sampled_from(sorted(ADAPTERS)), min_size=least, max_size=min(4, most), unique=True))
    if "safety" not in names and draw(st.integers(0, 3)):
        names[0] = "safety"
    weights = {name: draw(forms) for name in names}
    assume(len(list_starts(weights.values(), answer=answer)) <= MAX_PHASES)
    options: dict[str, Any] = {}
    for option in method.options:
        if option.kind == "term":
            options[option.name] = draw(st.sampled_from(names))
        elif option.kind == "adapter":
            free = sorted(ADAPTERS.keys() - weights)
            options[option.name] = draw(st.sampled_from(free))
        elif option.default is None or option.name == "share":
            options[option.name] = 4 if option.kind == "int" else draw(st.sampled_from([0.2, 0.6, 1]) | st.floats(0, 1))
    gate = None
    plain = sorted(name for name, weight in weights.items() if isinstance(weight, float))
    if method.name == "sum" and plain and draw(st.booleans()):
        bounded = draw(st.lists(st.sampled_from(plain), min_size=1, unique=True))
        widths = st.sampled_from([0.0, 0.1, 0.3]) | st.floats(0, 0.5)
        gate = Gate("risk", tuple((n, (weights[n] - draw(widths), weights[n] + draw(widths))) for n in bounded))
    return Recipe(method.name, tuple(Term(*pair) for pair in weights.items()), tuple(options.items()), answer, gate)


def bind(recipe: Recipe) -> Fusion:
    parents = {name: DIGESTS[name] for name in recipe.parents}
    return Fusion(recipe, parents, "f" * 64, "(inline)", ranks=dict.fromkeys(parents.values(), RANK))


def measure(recipe: Recipe, adapters: Mapping[str, LoraAdapter]) -> Iterator[tuple[int, dict[str, float]]]:
    """What acts at each token, in each module and component: plainly for sums, with real tensors for methods."""
    if recipe.method == "sum":
        yield from list_weights(recipe)
        return
    for start, phase in recipe.phases():
        table = tabulate(phase, adapters, same_base=True)
        for row in table.weights.tolist():
            for component in range(RANK):
                yield (
                    start,
                    {
                        name: weight * table.components.get(name, (1.0,) * RANK)[component]
                        for name, weight in zip(table.adapters, row, strict=True)
                    },
                )


def find_breach(recipe: Recipe, adapters: Mapping[str, LoraAdapter]) -> str:
    """What is wrong with a recipe, in the plain words of the rules below."""
    if {"polite", "rude"} <= {*recipe.parents}:
        return "polite and rude meet"
    for token, weights in measure(recipe, adapters):
        safety = sum(weights.get(name, 0.0) for name in ("safety", "twin"))
        if safety < FLOOR - ROUNDING:
            return f"safety has {safety} at {token}"
        if "task" in recipe.adapters and not LEAST - ROUNDING <= weights.get("task", 0.0) <= MOST + ROUNDING:
            return f"task has {weights.get('task')} at {token}"
    return ""


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Policy]:
    registry = Registry(f"sqlite:///{tmp_path_factory.mktemp('policy') / 'registry.sqlite'}", timeout_s=5)
    fill(registry, *(AdapterRecord(name, DIGESTS[name], adapter_info(rank=RANK), "") for name in ADAPTERS))
    yield make_policy(
        registry,
        floor=[{"adapter": "safety", "at_least": FLOOR}],
        range=[{"adapter": "task", "at_least": LEAST, "at_most": MOST}],
        apart=[{"adapters": ["polite", "rude"]}],
    )
    registry.close()


def judge(policy: Policy, recipe: Recipe) -> str:
    """The rule that refuses a recipe; no rule of these needs to wait for anything."""
    coroutine = policy.judge(bind(recipe), Caller(role="user"))
    try:
        coroutine.send(None)
    except StopIteration as done:
        return str(done.value.rule)
    raise AssertionError("it waits")


def test_no_fusion_that_is_served_undercuts_a_floor(policy: Policy) -> None:
    adapters = {name: samples.adapter(number, RANK) for name, number in ADAPTERS.items()}
    verdicts: dict[str, list[str]] = {}
    exact: list[bool] = []

    @settings(max_examples=1000, suppress_health_check=list(HealthCheck))
    @given(recipes())
    def check(recipe: Recipe) -> None:
        rule = judge(policy, recipe)
        verdicts.setdefault(rule, []).append(recipe.method)
        try:
            breach = find_breach(recipe, adapters) if recipe.is_linear else "it cannot be shown"
        except FusionError:  # a pattern that matches no module: refused elsewhere
            return
        assert rule or not breach, f"{recipe} is served, but {breach}"
        if recipe.method == "sum" and all(isinstance(weight, float) for weight in recipe.weights.values()):
            exact.append(bool(rule) == bool(breach))

    check()
    total = sum(map(len, verdicts.values()))
    assert {"", "floor-1", "range-1", "apart-1", "base"} == verdicts.keys()
    assert len(verdicts[""]) > total / 20, "hardly anything is served, so that this shows little"
    assert {"sum", "slerp", "safe_merge"} == {*verdicts[""]}
    assert len(exact) > total / 20
    assert all(exact), "numbers alone, with and without a gate, are refused only when they break a rule"


def test_what_is_computed_here_is_what_the_engine_gets() -> None:
    """The plain arithmetic of this test, beside that of the tables of weights that are served."""
    adapters = {name: samples.adapter(number, RANK) for name, number in ADAPTERS.items()}
    compared: list[int] = []

    @settings(max_examples=100, suppress_health_check=list(HealthCheck))
    @given(recipes())
    def check(recipe: Recipe) -> None:
        assume(recipe.method == "sum" and recipe.gate is None)
        try:
            tables = [(start, tabulate(phase, adapters, same_base=True)) for start, phase in recipe.phases()]
        except FusionError:
            return
        for name, weight in recipe.weights.items():
            for token, module, component in itertools.product(range(PROMPT, TOKENS), MODULES, range(RANK)):
                table = next(table for start, table in reversed(tables) if start <= token)
                served = table.at(module).get(name, 0.0) * table.components.get(name, (1.0,) * RANK)[component]
                assert served == pytest.approx(weigh(weight, module, component, token, answer=recipe.answer))
                compared.append(token)

    check()
    assert len(compared) > 10_000
