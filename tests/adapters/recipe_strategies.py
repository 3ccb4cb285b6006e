"""Recipes drawn at random: every method, option and form of weight."""

from hypothesis import strategies as st

from adapters import METHODS, NAME_PATTERN, RESERVED_NAMES, ByModule, Ramp, Recipe, Term
from adapters.recipes import MAX_NAME
from tests.adapters import samples  # noqa: F401  (loads the hypothesis profile)

free_names = st.from_regex(NAME_PATTERN, fullmatch=True).filter(
    lambda name: name not in RESERVED_NAMES and len(name) <= MAX_NAME
)
free_weights = st.floats(-16, 16, allow_nan=False)
patterns = st.from_regex(r"[A-Za-z0-9_.*?-]{1,20}", fullmatch=True)
schedules = st.builds(Ramp, free_weights, free_weights) | st.dictionaries(
    patterns, free_weights, min_size=1, max_size=4
).map(lambda rules: ByModule(tuple(rules.items())))


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    method = METHODS[draw(st.sampled_from(list(METHODS)))]
    least, most = method.terms
    weights = draw(st.dictionaries(free_names, free_weights | schedules, min_size=least, max_size=min(6, most)))
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
    return Recipe(method.name, terms, tuple(options.items()))
