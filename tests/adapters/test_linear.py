"""Linear recipes as tables of weights: the table says all of what `fuse` builds."""

from collections.abc import Mapping

import pytest
import torch
from hypothesis import assume, given, strategies as st
from torch import Tensor

from adapters import (
    MAX_PHASES,
    METHODS,
    PROMPT,
    Components,
    FusionError,
    LoraAdapter,
    Recipe,
    RecipeError,
    Term,
    UnknownAdapterError,
    WeightTable,
    fuse,
    parse,
    plan,
    smallest_rank,
    tabulate,
)
from adapters.recipes.weights import Weight, list_starts
from tests.adapters.recipe_strategies import functions, schedules
from tests.adapters.samples import SHAPES, adapter, dense

ADAPTERS = {
    "a": adapter(1, dtype=torch.float64),
    "b": adapter(2, dict.fromkeys(list(SHAPES)[1:], 2), scaling=0.5, dtype=torch.float64),
    "c": adapter(3, dict.fromkeys(list(SHAPES)[:3], 1), dtype=torch.float64),
}
LINEAR = [
    "0.6*a + 0.4*b",
    "1*a + 0*b",
    "0.5*a + ramp(0.2..0.6)*b + -1*c",
    "{*.mlp.*: 0.2, *: 0.6}*a + 1*b",
    "slerp(1*a + 0.5*b, t=0.3, from=b)",
    "slerp(ramp(0..1)*a + 1*c, t=0.7, from=a)",
    "safe_merge(0.7*a + 0.3*b, safety=c, threshold=0.5)",
    "safe_merge(0.7*a + 0.3*b, safety=c, threshold=1, share=0.25)",
]


def add_up(table: WeightTable, adapters: Mapping[str, LoraAdapter], module: str) -> Tensor:
    """Σ w·s·B·diag(c)·A, written plainly."""
    total = torch.zeros(SHAPES[module], dtype=torch.float64)
    for name, weight in table.at(module).items():
        found = adapters[name].modules[module]
        numbers = torch.tensor(table.components.get(name, (1.0,) * found.rank), dtype=torch.float64)[: found.rank]
        total += weight * found.scaling * (found.b.double() @ torch.diag(numbers) @ found.a.double())
    return total


def check_table(recipe: Recipe, adapters: Mapping[str, LoraAdapter]) -> None:
    table, built = tabulate(recipe, adapters), dense(fuse(recipe, adapters)[0])
    assert table.adapters == recipe.adapters
    assert table.modules == tuple(sorted(set().union(*(adapters[name].modules for name in recipe.adapters))))
    for module in table.modules:
        torch.testing.assert_close(add_up(table, adapters, module), built[module], rtol=1e-6, atol=1e-6)
    for module in SHAPES.keys() - set(table.modules):
        assert not built[module].any()


@pytest.mark.parametrize("text", LINEAR)
def test_a_table_of_weights_is_what_fuse_builds(text: str) -> None:
    check_table(parse(text), ADAPTERS)


@st.composite
def linear_recipes(draw: st.DrawFn) -> Recipe:
    """Over ADAPTERS; patterns and components fit."""
    answer = draw(st.booleans())
    numbers = st.floats(-16, 16, allow_nan=False)

    def fit(name: str, weight: Weight) -> Weight:
        if not isinstance(weight, Components):
            return weight
        return Components((*weight.numbers, *(0.5,) * 9)[: ADAPTERS[name].rank])

    plain = numbers | st.just(0.0) | schedules.filter(lambda weight: "{" not in str(weight))
    course = functions(answer=answer).filter(lambda weight: "{" not in str(weight))
    texts = ("{*.mlp.*: 0.2, *: ramp(0..1)}", "{*.1.*: fade(1..0, 3), *q_proj: steps(0: ramp(1..2), 4: 0), *: 0.5}")
    patterned = st.sampled_from(texts).map(lambda text: parse(f"{text}*x").weights["x"])
    names = draw(st.permutations("abc"))
    method = draw(st.sampled_from(["sum", "slerp", "safe_merge"]))
    count = 2 if method == "slerp" else draw(st.integers(1, 3 if method == "sum" else 2))
    terms = tuple(Term(name, fit(name, draw(plain | patterned | course))) for name in names[:count])
    options: dict[str, tuple[tuple[str, float | str], ...]] = {
        "sum": (),
        "slerp": (("t", draw(st.floats(0, 1))), ("from", names[0])),
        "safe_merge": (("safety", names[2]), ("threshold", draw(st.floats(0, 1))), ("share", draw(st.floats(0, 1)))),
    }
    assume(len(list_starts([term.weight for term in terms], answer=answer)) <= MAX_PHASES)
    return Recipe(method, terms, options[method], answer=answer)


@given(linear_recipes())
def test_any_linear_recipe_is_its_tables_phase_by_phase(recipe: Recipe) -> None:
    phases = recipe.phases()
    for _, phase in phases:
        check_table(phase, ADAPTERS)
    prompt = phases[0][1].weights.values()
    if [start for start, _ in phases] == [PROMPT, 0] and not any(weight != 0.0 for weight in prompt):
        assert fuse(recipe, ADAPTERS)[0].answer_only
        with pytest.raises(FusionError, match="fuse one phase, such as the last"):
            tabulate(recipe, ADAPTERS)
    elif len(phases) > 1:
        for carry_out in (fuse, plan, tabulate):
            with pytest.raises(FusionError, match="fuse one phase, such as the last"):
                carry_out(recipe, ADAPTERS)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("1*a + steps(prompt: 0.4, 0: 1, 4: 0.2)*b", "change with position, the last time at token 4"),
        ("answer(steps(0: 0.6, 2: 0.4)*a)", "fuse one phase, such as the last, '0.4\\*a'"),
        ("gate(1*a + 0.5*b, by=risk, b in 0..1)", "the gate 'risk' chooses .* its default, '1\\*a \\+ 0.5\\*b'"),
    ],
)
def test_what_is_no_single_adapter_is_refused_with_a_way_out(text: str, says: str) -> None:
    recipe = parse(text)
    with pytest.raises(FusionError, match=says):
        fuse(recipe, ADAPTERS)
    with pytest.raises(FusionError, match=says):
        smallest_rank(recipe, ADAPTERS, max_error=0.1)


def test_weights_that_do_not_change_after_all_are_fused() -> None:
    fused, report = fuse(parse("steps(prompt: 0.5, 0: 0.5)*a + fade(1..1, 4)*b"), ADAPTERS)
    assert fused.digest == fuse(parse("0.5*a + 1*b"), ADAPTERS)[0].digest
    assert report.recipe == "0.5*a + 1*b"


def test_there_is_one_weight_for_each_component() -> None:
    with pytest.raises(RecipeError, match="'a' has 2 weights by component, but rank 3"):
        fuse(parse("[1, 1]*a"), ADAPTERS)
    with pytest.raises(UnknownAdapterError):
        fuse(parse("[1, 1]*x"), ADAPTERS)


def test_components_of_one_weight_are_that_weight() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        family = {"a": adapter(1, dtype=dtype), "b": adapter(2, dtype=dtype)}
        one, two = (dense(fuse(parse(f"{text}*a + 1*b"), family)[0]) for text in ("[0.5, 0.5, 0.5]", "0.5"))
        for module in SHAPES:
            torch.testing.assert_close(one[module], two[module], rtol=1e-6, atol=1e-6)


def test_phases_have_tables_of_the_same_rows_and_columns() -> None:
    tables = [tabulate(phase, ADAPTERS) for _, phase in parse("answer(steps(0: 1, 2: 0)*b + 1*c)").phases()]
    assert len({(table.modules, table.adapters) for table in tables}) == 1
    assert not tables[0].weights.any()


def test_a_table_of_a_sum_reads_no_factors() -> None:
    class Unread(dict[str, object]):
        def __getitem__(self, key: str) -> object:
            raise AssertionError(f"{key} was read")

    unread = LoraAdapter(Unread(ADAPTERS["a"].modules), ADAPTERS["a"].base)  # type: ignore[arg-type]  # nothing is read
    unread.__dict__["facts"] = ADAPTERS["a"].facts
    assert tabulate(parse("ramp(0..1)*a"), {"a": unread}).weights.any()


def test_an_adapter_has_no_weight_where_it_has_no_module() -> None:
    table = tabulate(parse("1*a + 1*b"), ADAPTERS)
    assert table.at(next(iter(SHAPES))) == {"a": 1.0}


def test_weights_vary_over_layers() -> None:
    table = tabulate(parse("ramp(0.2..0.6)*a"), ADAPTERS)
    assert [table.at(module)["a"] for module in sorted(SHAPES)] == pytest.approx([0.2, 0.2, 0.6, 0.6])


def test_two_names_of_one_adapter_have_a_column_each() -> None:
    twins: dict[str, LoraAdapter] = {"x": ADAPTERS["a"], "y": ADAPTERS["a"]}
    table = tabulate(parse("0.25*x + ramp(1..1)*y"), twins)
    for module in table.modules:
        assert sum(table.at(module).values()) == 1.25


def test_which_methods_are_linear() -> None:
    assert {name for name, method in METHODS.items() if method.linear} == {"sum", "slerp", "safe_merge"}


@pytest.mark.parametrize("text", ["svd(1*a + 1*b, rank=2)", "ties(1*a + 1*b)", "peft_linear(1*a + 1*b)"])
def test_other_methods_have_no_table(text: str) -> None:
    with pytest.raises(ValueError, match="is not linear"):
        tabulate(parse(text), ADAPTERS)
