"""What weights that are functions must fulfill, in text and JSON."""

from collections.abc import Mapping

from adapters.errors import RecipeError, quote
from adapters.recipes.gates import Gate
from adapters.recipes.method import Method
from adapters.recipes.methods import DEFAULT_METHOD, METHODS
from adapters.recipes.weights import (
    MAX_PHASES,
    PROMPT,
    Components,
    Course,
    Fade,
    Level,
    Steps,
    Weight,
    list_parts,
    list_starts,
)

MAX_RULES = 64
MAX_COMPONENTS = 2048
MAX_TOKENS = 1_000_000
"""The last token of an answer at which a weight may change."""


def add_rule(rules: dict[str, Course], pattern: str, weight: Course, position: int | None) -> None:
    """Check one rule of a schedule and add it to `rules`."""
    if pattern in rules:
        raise RecipeError(f"the pattern {pattern!r} appears twice: keep one", position)
    if len(rules) >= MAX_RULES:
        raise RecipeError(f"a weight has at most {MAX_RULES} patterns", position)
    rules[pattern] = weight


def add_component(numbers: list[float], number: float, position: int | None) -> None:
    """Add the weight of one more component to `numbers`, if there may be one more."""
    if len(numbers) >= MAX_COMPONENTS:
        raise RecipeError(f"a weight has at most {MAX_COMPONENTS} components", position)
    numbers.append(number)


def add_step(rules: dict[int, Level], start: int, level: Level, position: int | None) -> None:
    """Check one step of `steps(…)` and add it to `rules`."""
    name = "'prompt'" if start == PROMPT else f"token {start}"
    if start in rules:
        raise RecipeError(f"{name} appears twice: keep one", position)
    if rules and start < (last := max(rules)):
        raise RecipeError(f"{name} comes after token {last}: put the prompt first, then tokens in order", position)
    if len(rules) >= MAX_PHASES:
        raise RecipeError(f"steps(…) has at most {MAX_PHASES} weights", position)
    rules[start] = level


def check_start(token: int, position: int | None) -> int:
    """`token` if a phase may begin there."""
    if not 0 <= token <= MAX_TOKENS:
        raise RecipeError(
            f"no phase begins at token {quote(token)}: expected 'prompt', or 0 (the first token) to {MAX_TOKENS}",
            position,
        )
    return token


def check_tokens(count: int, position: int | None) -> int:
    """`count` if a fade may go over so many tokens."""
    if not 2 <= count <= MAX_TOKENS:
        raise RecipeError(f"a fade goes over 2 to {MAX_TOKENS} tokens, got {quote(count)}", position)
    return count


def check_positions(
    method: Method,
    weights: Mapping[str, Weight],
    *,
    answer: bool,
    places: Mapping[str, int] | None = None,
    answer_at: int | None = None,
) -> None:
    """RecipeError when the method does not take functions of the position or component, an `answer` has weights for the
    prompt, or all weights together have too many phases. `places` says where each weight begins.
    """
    if answer and not method.linear:
        expected = f"expected one of {_list_linear()}, whose weights can change with position"
        raise RecipeError(f"answer(…) around {method.name!r}: {expected}", answer_at)
    at = {} if places is None else places
    for name, weight in weights.items():
        for part in () if isinstance(weight, float) else list_parts(weight):
            if not method.linear and isinstance(part, (Steps, Fade, Components)):
                raise RecipeError(
                    f"the weight of {name!r} changes with position or component: expected one of {_list_linear()} "
                    f"instead of {method.name!r}, or numbers, ramps and patterns",
                    at.get(name),
                )
            if answer and isinstance(part, Steps) and part.rules[0][0] == PROMPT:
                raise RecipeError(f"{name!r} has a weight for the prompt inside answer(…): begin at 0", at.get(name))
    if (count := len(list_starts(weights.values(), answer=answer))) > MAX_PHASES:
        known = list(weights)
        counts = (len(list_starts([weights[k] for k in known[: i + 1]], answer=answer)) for i in range(len(known)))
        first = next(name for name, number in zip(known, counts, strict=True) if number > MAX_PHASES)
        raise RecipeError(
            f"the weights change so often that there are {count} phases, the prompt among them: expected at most "
            f"{MAX_PHASES}, so let the weights change at the same tokens, or at fewer",
            at.get(first),
        )


def check_chosen(weights: Mapping[str, Weight], gate: Gate, *, answer: bool, position: int | None = None) -> None:
    """RecipeError when the weights that the gate may choose have too many phases: inside `answer(…)`, a weight that is
    0 by default begins a phase at the answer's first token where it is chosen to be another.
    """
    largest = {name: max(span, key=abs) for name, span in gate.bounds}
    places = {} if position is None else dict.fromkeys(weights, position)
    check_positions(METHODS[DEFAULT_METHOD], {**weights, **largest}, answer=answer, places=places)


def _list_linear() -> str:
    return ", ".join(name for name, row in METHODS.items() if row.linear)
