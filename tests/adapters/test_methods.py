"""Every method against plain dense float64 arithmetic, and the properties each must have."""

import math

import pytest
import torch
from hypothesis import assume, given, strategies as st

from adapters import METHODS, LoraAdapter, Recipe, Term, fuse, parse, plan
from tests.adapters import reference
from tests.adapters.samples import SHAPES, adapter, dense, dense_sum, families, gap, size

Family = dict[str, LoraAdapter]
ON_UPDATE = ("ties", "dare_linear", "dare_ties", "magnitude_prune", "della", "breadcrumbs")
WHOLE = 64  # a rank no module of the samples reaches: nothing is cut
positive = st.floats(0.05, 4)
signed = st.floats(-4, 4).filter(lambda w: abs(w) > 0.05)
densities = st.sampled_from([0.1, 0.3, 0.5, 0.77, 1.0])


@st.composite
def cases(draw: st.DrawFn, methods: tuple[str, ...]) -> tuple[Recipe, Family]:
    family = draw(families())
    method = METHODS[draw(st.sampled_from(methods))]
    options: dict[str, float | int | str] = {"density": draw(densities)}
    for option in method.options:
        match option.name:
            case "rank":
                options["rank"] = WHOLE
            case "seed":
                options["seed"] = draw(st.integers(0, 99))
            case "majority":
                options["majority"] = draw(st.sampled_from(["total", "frequency"]))
            case "epsilon":
                options["epsilon"] = draw(st.sampled_from([0.0, 0.1, 0.3]))
            case "gamma":
                options["gamma"] = draw(st.sampled_from([0.0, 0.01, 0.2]))
    terms = tuple(Term(name, draw(signed)) for name in family)
    return Recipe(method.name, terms, tuple(options.items())), family


def recipe_modules(recipe: Recipe, family: Family) -> list[str]:
    return [module for module in SHAPES if any(module in family[name].modules for name in recipe.weights)]


def filled(recipe: Recipe) -> dict[str, float | int | str]:
    return METHODS[recipe.method].fill(dict(recipe.options))


@given(cases(ON_UPDATE))
def test_methods_on_the_update_equal_the_dense_reference(case: tuple[Recipe, Family]) -> None:
    recipe, family = case
    made = dense(fuse(recipe, family)[0])
    for module in recipe_modules(recipe, family):
        wanted = reference.on_update(recipe, family, module, filled(recipe))
        assert (made[module] - wanted).norm() <= 1e-5 * max(1.0, float(wanted.norm()))


@given(cases(ON_UPDATE), st.integers(1, 5))
def test_the_cut_is_as_good_as_the_dense_best_and_the_report_says_what_it_costs(
    case: tuple[Recipe, Family], rank: int
) -> None:
    recipe, family = case
    fused, report = fuse(recipe, family, max_rank=rank)
    made, whole, lost = dense(fused), {}, 0.0
    for module in recipe_modules(recipe, family):
        whole[module] = reference.on_update(recipe, family, module, filled(recipe))
        lost += float((whole[module] - reference.best(whole[module], rank)).square().sum())
    assume(size(whole) > 1e-3)
    error = gap({module: made[module] for module in whole}, whole)
    assert error <= math.sqrt(lost) + 1e-5 * size(whole)
    assert report.error == pytest.approx(math.sqrt(lost) / size(whole), abs=1e-4)
    assert fused.rank <= rank
    assert report.rank <= rank
    assert plan(recipe, family, max_rank=rank) == report


@given(families(), signed, signed, st.floats(0, 1))
def test_slerp_equals_shoemakes_formula(family: Family, one: float, two: float, t: float) -> None:
    assume(len(family) > 1)
    first, second = list(family)[:2]
    recipe = Recipe("slerp", (Term(first, one), Term(second, two)), (("t", t), ("from", first)))
    made = dense(fuse(recipe, family)[0])
    zero = {module: torch.zeros(shape, dtype=torch.float64) for module, shape in SHAPES.items()}
    for module in SHAPES:
        u = one * dense(family[first]).get(module, zero[module])
        v = two * dense(family[second]).get(module, zero[module])
        wanted = reference.slerp(u, v, t)
        assert (made[module] - wanted).norm() <= 1e-5 * max(1.0, float(u.norm() + v.norm()))


def test_slerp_ends_at_its_adapters_and_keeps_equal_norms() -> None:
    family = {"a": adapter(1, 3), "b": adapter(2, 3)}
    for text, end in (("t=0, from=a", "a"), ("t=1, from=a", "b"), ("t=0, from=b", "b"), ("t=1, from=b", "a")):
        assert gap(dense(fuse(parse(f"slerp(a + b, {text})"), family)[0]), dense(family[end])) < 1e-5
    module = next(iter(SHAPES))
    first, second = (float(dense(one)[module].norm()) for one in family.values())
    halfway = dense(fuse(parse(f"slerp({1 / first!r}*a + {1 / second!r}*b, t=0.5, from=a)"), family)[0])
    assert float(halfway[module].norm()) == pytest.approx(1, rel=1e-6)


@given(families(), signed, st.floats(0.05, 1), st.floats(0, 1))
def test_safe_merge_equals_the_dense_criterion(family: Family, weight: float, threshold: float, share: float) -> None:
    assume(len(family) > 1)
    *tasks, safety = family
    terms = tuple(Term(name, weight + i) for i, name in enumerate(tasks) if weight + i != 0)
    assume(terms)
    options = (("safety", safety), ("threshold", threshold), ("share", share))
    recipe = Recipe("safe_merge", terms, options)
    made = dense(fuse(recipe, family)[0])
    total = dense_sum(Recipe("sum", terms), family)
    for module in recipe_modules(recipe, family):
        wanted = total[module]
        if module in family[safety].modules:
            guard = dense(family[safety])[module]
            drift = reference.cosine(wanted, reference.projector(guard) @ wanted)
            assume(abs(drift - threshold) > 1e-6)
            if drift < threshold:
                wanted = (1 - share) * wanted + share * guard
        assert (made[module] - wanted).norm() <= 1e-5 * max(1.0, float(wanted.norm()))


@given(families(), signed, st.sampled_from([0.0, 0.3, 0.8, 1.0]))
def test_safe_project_equals_the_dense_projection(family: Family, weight: float, threshold: float) -> None:
    assume(len(family) > 1)
    task, direction = list(family)[:2]
    recipe = Recipe("safe_project", (Term(task, weight),), (("direction", direction), ("threshold", threshold)))
    made = dense(fuse(recipe, family)[0])
    for module in family[task].modules:
        whole = weight * dense(family[task])[module]
        projected = reference.projector(dense(family[direction])[module]) @ whole
        drift = reference.cosine(whole, projected) if projected.any() else 0.0
        assume(threshold == 1 or abs(drift - threshold) > 1e-6)
        wanted = projected if threshold == 1 or drift < threshold else whole
        assert (made[module] - wanted).norm() <= 1e-5 * max(1.0, float(whole.norm()))


@given(cases(("knots",)))
def test_knots_equals_the_dense_svd_basis(case: tuple[Recipe, Family]) -> None:
    drawn, family = case
    options = filled(drawn) | {"density": 1.0}  # below it, equal magnitudes may be cut either way
    # Positive: else the votes of twins cancel but for rounding, which would elect the sign.
    terms = tuple(Term(name, abs(float(weight))) for name, weight in drawn.weights.items())  # type: ignore[arg-type]  # no schedules are drawn here
    recipe = Recipe("knots", terms, tuple(options.items()))
    made = dense(fuse(recipe, family)[0])
    for module in recipe_modules(recipe, family):
        found = reference.weighted(recipe, family, module)
        wanted = reference.knots(
            [delta for _, _, delta in found], [w for _, w, _ in found], 1.0, str(options["majority"])
        )
        assert (made[module] - wanted).norm() <= 1e-4 * max(1.0, float(wanted.norm()))


def test_knots_prunes_coordinates_as_the_dense_reference() -> None:
    family = {"a": adapter(1, 3), "b": adapter(2, 2)}
    recipe = parse("knots(0.7*a + 0.4*b, density=0.4)")
    made = dense(fuse(recipe, family)[0])
    for module in SHAPES:
        terms = reference.weighted(recipe, family, module)
        wanted = reference.knots([delta for _, _, delta in terms], [w for _, w, _ in terms], 0.4, "total")
        assert (made[module] - wanted).norm() <= 1e-4 * float(wanted.norm())


@given(families(), st.floats(-2, 2), st.floats(-2, 2))
def test_a_ramp_weighs_every_layer(family: Family, first: float, last: float) -> None:
    name = next(iter(family))
    recipe = parse(f"ramp({first!r}..{last!r})*{name}")
    layers = [int(module.split(".")[2]) for module in family[name].modules]
    low, high = min(layers), max(layers)
    made = dense(fuse(recipe, family)[0])
    for module, delta in dense(family[name]).items():
        share = (int(module.split(".")[2]) - low) / (high - low) if high > low else 0
        wanted = (first + share * (last - first)) * delta
        assert (made[module] - wanted).norm() <= 1e-5 * max(1.0, float(delta.norm()))


def test_patterns_weigh_the_modules_they_match_first() -> None:
    family = {"a": adapter(1, 3)}
    made = dense(fuse(parse("{*.mlp.*: 0.25, model.layers.0.*: -1, *: 2}*a"), family)[0])
    for module, delta in dense(family["a"]).items():
        weight = 0.25 if ".mlp." in module else -1 if ".layers.0." in module else 2
        assert (made[module] - weight * delta).norm() <= 1e-5 * float(delta.norm())


@given(cases(("dare_linear", "dare_ties", "della", "ties")), st.randoms())
def test_masks_go_with_the_adapter_not_with_its_place_or_name(case: tuple[Recipe, Family], random: object) -> None:
    recipe, family = case
    renamed = {name: f"x{i}" for i, name in enumerate(reversed(list(family)))}
    terms = tuple(Term(renamed[name], weight) for name, weight in recipe.weights.items())
    other = fuse(Recipe(recipe.method, terms, recipe.options), {renamed[n]: a for n, a in family.items()})[0]
    made = fuse(recipe, family)[0]
    assert gap(dense(made), dense(other)) <= 1e-5 * max(1.0, size(dense(made)))


@pytest.mark.parametrize("method", [name for name in METHODS if not name.startswith(("svd", "slerp", "safe"))])
def test_same_input_same_bytes_and_another_seed_another_mask(method: str) -> None:
    family = {"a": adapter(1, 3), "b": adapter(2, 2)}
    text = f"{method}(0.6*a + 0.4*b)" if method != "sum" else "0.6*a + 0.4*b"
    first = fuse(parse(text), family)[0]
    assert fuse(parse(text), family)[0].digest == first.digest
    if any(option.name == "seed" for option in METHODS[method].options):
        assert fuse(parse(text.replace(")", ", seed=1)")), family)[0].digest != first.digest


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("method", ["ties", "dare_linear", "della", "breadcrumbs", "knots", "peft_ties", "peft_linear"])
def test_every_dtype_is_taken_and_given_back(method: str, dtype: torch.dtype) -> None:
    family = {"a": adapter(1, 3, dtype=dtype), "b": adapter(2, 2, dtype=dtype)}
    fused, report = fuse(parse(f"{method}(0.6*a + 0.4*b)"), family, max_rank=4)
    assert fused.dtype == dtype
    assert fused.rank <= 4
    assert 0 <= report.error < 1
