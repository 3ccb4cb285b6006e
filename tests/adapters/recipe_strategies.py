"""Recipes drawn at random: every method, option and form of weight."""

from hypothesis import assume, strategies as st

from adapters import (
    MAX_PHASES,
    METHODS,
    NAME_PATTERN,
    PROMPT,
    RESERVED_NAMES,
    ByModule,
    Components,
    Fade,
    Gate,
    Ramp,
    Recipe,
    Steps,
    Term,
)
from adapters.recipes import MAX_NAME
from adapters.recipes.weights import Level, Weight, list_starts
from tests.adapters import samples  # noqa: F401  (loads the hypothesis profile)

free_names = st.from_regex(NAME_PATTERN, fullmatch=True).filter(
    lambda name: name not in RESERVED_NAMES and len(name) <= MAX_NAME
)
free_weights = st.floats(-16, 16, allow_nan=False)
patterns = st.from_regex(r"[A-Za-z0-9_.*?-]{1,20}", fullmatch=True)
ramps = st.builds(Ramp, free_weights, free_weights)
fades = st.builds(Fade, free_weights, free_weights, st.integers(2, 40))


@st.composite
def steps(draw: st.DrawFn, levels: st.SearchStrategy[Level], *, answer: bool) -> Steps:
    starts = draw(st.lists(st.integers(0 if answer else PROMPT, 20), min_size=1, max_size=4, unique=True))
    return Steps(tuple((start, draw(levels)) for start in sorted(starts)))


def by_module(courses: st.SearchStrategy[Weight]) -> st.SearchStrategy[ByModule]:
    rules = st.dictionaries(patterns, courses, min_size=1, max_size=4)
    return rules.map(lambda rules: ByModule(tuple(rules.items())))  # type: ignore[arg-type]  # courses are given


schedules = ramps | by_module(free_weights | ramps)


def functions(*, answer: bool) -> st.SearchStrategy[Weight]:
    """Weights that only linear methods take."""
    courses = steps(free_weights | ramps, answer=answer) | fades
    return (
        courses
        | by_module(free_weights | ramps | courses)
        | st.lists(free_weights, min_size=1, max_size=5).map(lambda numbers: Components(tuple(numbers)))
    )


@st.composite
def recipes(draw: st.DrawFn, *, gated: bool = False) -> Recipe:
    method = METHODS["sum" if gated else draw(st.sampled_from(list(METHODS)))]
    least, most = method.terms
    answer = method.linear and draw(st.booleans())
    forms = free_weights | schedules | functions(answer=answer) if method.linear else free_weights | schedules
    weights = draw(st.dictionaries(free_names, forms, min_size=least, max_size=min(6, most)))
    if gated:
        weights[min(weights)] = draw(free_weights)
    assume(len(list_starts(weights.values(), answer=answer)) <= MAX_PHASES)
    terms = tuple(Term(name, weight) for name, weight in weights.items())
    options: dict[str, int | float | str] = {}
    for option in method.options:
        match option.kind:
            case "int":
                options[option.name] = draw(st.integers(int(option.minimum), int(option.maximum)))
            case "float":
                options[option.name] = draw(st.floats(option.minimum, option.maximum))
            case "choice":
                options[option.name] = draw(st.sampled_from(option.choices))
            case "term":
                options[option.name] = draw(st.sampled_from(sorted(weights)))
            case "adapter":
                options[option.name] = draw(free_names.filter(lambda name: name not in weights))
    numbers = {name: weight for name, weight in weights.items() if isinstance(weight, float)}
    is_gated = gated or (method.name == "sum" and numbers and draw(st.booleans()))
    gate = draw(gates(numbers, weights)) if is_gated else None
    return Recipe(method.name, terms, tuple(options.items()), answer, gate)


@st.composite
def gates(draw: st.DrawFn, numbers: dict[str, float], weights: dict[str, Weight]) -> Gate:
    chosen = draw(st.lists(st.sampled_from(sorted(numbers)), min_size=1, unique=True))
    bounds = tuple((name, (draw(st.floats(-16, numbers[name])), draw(st.floats(numbers[name], 16)))) for name in chosen)
    return Gate(draw(free_names.filter(lambda name: name not in weights)), bounds)
