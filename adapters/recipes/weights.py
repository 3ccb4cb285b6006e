"""A term's weight: one number for the whole adapter, or a function of the layer, the module, the adapter's own rank
components, or the position of a token.
"""

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import lru_cache

from adapters.errors import FusionError, clip
from adapters.recipes.globs import select

_LAYER = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")
PROMPT = -1
"""Where the phase begins that a prompt is in; the answer's first token is at 0."""
MAX_PHASES = 8
MAX_MODULES = 8192
"""Whose layers are remembered."""


@dataclass(frozen=True, slots=True)
class Ramp:
    """`ramp(first..last)`: linear in the layer's number, from the first to the last layer that any of the
    recipe's adapters has.
    """

    first: float
    last: float

    def at(self, module: str, layers: tuple[int, int]) -> float:
        """The weight in `module`, `layers` being the lowest and the highest number."""
        number = find_layer(module)
        if number is None:
            raise FusionError(f"module {module!r} has no layer number, so {self} gives it no weight")
        low, high = layers
        share = (number - low) / (high - low) if high > low else 0.0
        return self.first + share * (self.last - self.first)

    def __str__(self) -> str:
        return f"ramp({number_text(self.first)}..{number_text(self.last)})"


Level = float | Ramp
"""What a weight by position has in one phase."""


@dataclass(frozen=True, slots=True)
class Steps:
    """`steps(prompt: weight, 0: weight, 4: weight)`: each weight from its start on, which is the prompt or a token of
    the answer (0 is the first); before the first start the weight is 0.
    """

    rules: tuple[tuple[int, Level], ...]

    def at(self, token: int) -> Level:
        """The weight at a token of the answer, or in the prompt."""
        return next((level for start, level in reversed(self.rules) if start <= token), 0.0)

    def __str__(self) -> str:
        rules = (f"{'prompt' if start == PROMPT else start}: {weight_text(level)}" for start, level in self.rules)
        return f"steps({', '.join(rules)})"


@dataclass(frozen=True, slots=True)
class Fade:
    """`fade(first..last, tokens)`: a straight line over the first `tokens` tokens of the answer. The prompt has the
    weight of the first token, everything after them that of the last.
    """

    first: float
    last: float
    tokens: int

    def steps(self, levels: int) -> Steps:
        """The line as steps: one for each token, or `levels` of equal height when there are more tokens."""
        count = min(self.tokens, levels)
        shares = [index / (count - 1) for index in range(count)]
        values = [self.first * (1 - share) + self.last * share for share in shares]
        starts = [PROMPT, *(index * self.tokens // count for index in range(1, count))]
        return Steps(tuple(zip(starts, values, strict=True)))

    def __str__(self) -> str:
        return f"fade({number_text(self.first)}..{number_text(self.last)}, {self.tokens})"


Course = Level | Steps | Fade


@dataclass(frozen=True, slots=True)
class ByModule:
    """`{pattern: weight, …}`: the first pattern that matches a module's whole name (`*` and `?` as in file
    names) gives its weight.
    """

    rules: tuple[tuple[str, Course], ...]

    def at(self, modules: Iterable[str], layers: tuple[int, int]) -> dict[str, float]:
        """The weight in each of the modules; FusionError when no pattern matches one."""
        left, weights = dict.fromkeys(modules), dict[str, float]()
        for pattern, weight in self.rules:
            for module in (own := select(pattern, left)):
                del left[module]
            weights |= weights_at(weight, own, layers)
        for module in left:
            raise FusionError(f"no pattern of {clip(str(self))} matches the module {module!r}: add '*' as the last one")
        return weights

    def __str__(self) -> str:
        return "{" + ", ".join(f"{pattern}: {weight_text(weight)}" for pattern, weight in self.rules) + "}"


@dataclass(frozen=True, slots=True)
class Components:
    """`[weight, …]`: one weight for each rank component, a row of A with its column of B. There are as many as the
    adapter's largest rank; a module of a lower rank uses the first of them.
    """

    numbers: tuple[float, ...]

    def __str__(self) -> str:
        return f"[{', '.join(map(number_text, self.numbers))}]"


Weight = Course | ByModule | Components


def simplify(weight: Weight, *, answer: bool) -> Weight:
    """The simplest weight that is the same function, so that both have one digest: steps that change nothing, patterns
    behind one that matches all, and those before it with the same weight are left out. With `answer` all weights are 0
    in the prompt.
    """
    match weight:
        case Steps(rules):
            kept = tuple(rule for before, rule in zip(((0, 0.0), *rules), rules, strict=False) if before[1] != rule[1])
            if not kept:
                return 0.0
            return kept[0][1] if len(kept) == 1 and kept[0][0] <= (0 if answer else PROMPT) else Steps(kept)
        case Fade(first, last) if first == last:
            return first
        case ByModule(rules):
            return _simplify_rules([(pattern, _simplify_course(course, answer)) for pattern, course in rules])
        case int() | float():
            return float(weight) + 0.0  # no negative zero
    return weight


def _simplify_course(course: Course, answer: bool) -> Course:
    simple = simplify(course, answer=answer)
    assert not isinstance(simple, ByModule | Components)
    return simple


def _simplify_rules(rules: list[tuple[str, Course]]) -> Weight:
    patterns = [pattern for pattern, _ in rules]
    if "*" in patterns:
        del rules[patterns.index("*") + 1 :]
        course = rules[-1][1]
        while len(rules) > 1 and rules[-2][1] == course:
            del rules[-2]
        if len(rules) == 1:
            return course
    return ByModule(tuple(rules))


def weights_at(weight: Weight, modules: Iterable[str], layers: tuple[int, int]) -> dict[str, float]:
    """The weight in each of the modules, `layers` being the lowest and the highest layer number; 1 for `Components`,
    which scale the adapter's factors. ValueError for a weight that changes with position: see `freeze`.
    """
    match weight:
        case Steps() | Fade():
            raise ValueError(f"{weight} changes with position: expected the weight of one phase")
        case Components():
            return dict.fromkeys(modules, 1.0)
        case Ramp():
            return {module: weight.at(module, layers) for module in modules}
        case ByModule():
            return weight.at(modules, layers)
    return dict.fromkeys(modules, weight)


def freeze(weight: Weight, token: int, levels: int = MAX_PHASES) -> Weight:
    """The weight at one token of the answer, or in the prompt, as a weight that is the same at every position;
    `levels` is what `Fade.steps` takes.
    """
    match weight:
        case Steps() | Fade():
            return _freeze(weight, token, levels)
        case ByModule(rules):
            return ByModule(tuple((pattern, _freeze(course, token, levels)) for pattern, course in rules))
    return weight


def _freeze(course: Course, token: int, levels: int) -> Level:
    match course:
        case Steps():
            return course.at(token)
        case Fade():
            return course.steps(levels).at(token)
    return course


def list_starts(weights: Collection[Weight], *, answer: bool) -> tuple[int, ...]:
    """Where a phase begins: PROMPT, and every token of the answer at which a weight is another than before. With
    `answer` all weights are 0 in the prompt.
    """
    if not answer and all(isinstance(weight, float) for weight in weights):
        return (PROMPT,)
    levels = count_levels(answer=answer)
    starts = {PROMPT}.union(*(_list_changes(weight, levels) for weight in weights))
    if answer and any(freeze(weight, 0, levels) != 0.0 for weight in weights):
        starts.add(0)
    return tuple(sorted(starts))


def count_levels(*, answer: bool) -> int:
    """Into how many steps a fade is divided at most, so that it alone does not need too many phases."""
    return MAX_PHASES - answer


def _list_changes(weight: Weight, levels: int) -> set[int]:
    match weight:
        case Fade():
            return _list_changes(weight.steps(levels), levels)
        case Steps(rules):
            changes, before = set(), weight.at(PROMPT)
            for start, level in rules:
                if start != PROMPT and level != before:
                    changes.add(start)
                before = level
            return changes
        case ByModule(rules):
            return set().union(*(_list_changes(course, levels) for _, course in rules))
    return set()


def list_parts(weight: Weight) -> tuple[Weight, ...]:
    """What the weight is in each group of modules."""
    return tuple(course for _, course in weight.rules) if isinstance(weight, ByModule) else (weight,)


def list_numbers(weight: Weight) -> Iterable[float]:
    """Every number a weight is made of."""
    match weight:
        case Ramp(first, last) | Fade(first, last):
            return first, last
        case Components(numbers):
            return numbers
        case Steps(rules) | ByModule(rules):
            return [number for _, part in rules for number in list_numbers(part)]
    return (weight,)


def weight_text(weight: Weight) -> str:
    """The canonical text of a weight; the grammar reads it back."""
    return number_text(weight) if isinstance(weight, float) else str(weight)


def weight_json(weight: Weight) -> object:
    """The JSON form: a number, `{"ramp": [first, last]}`, `{"steps": [[start, weight], …]}`,
    `{"fade": [first, last, tokens]}`, `{"components": [number, …]}` or `{pattern: weight, …}`.
    """
    match weight:
        case Ramp(first, last):
            return {"ramp": [first, last]}
        case Fade(first, last, tokens):
            return {"fade": [first, last, tokens]}
        case Components(numbers):
            return {"components": list(numbers)}
        case Steps(rules):
            return {"steps": [["prompt" if start == PROMPT else start, weight_json(level)] for start, level in rules]}
        case ByModule(rules):
            return {pattern: weight_json(course) for pattern, course in rules}
    return weight


def number_text(value: float) -> str:
    """The shortest decimal that reads back as the same float."""
    return str(int(value)) if value.is_integer() and abs(value) < 1e15 else repr(value)


@lru_cache(MAX_MODULES)
def find_layer(module: str) -> int | None:
    """The number in a module's name (`model.layers.7.mlp.up_proj` is 7), None when there is none."""
    match = _LAYER.search(module)
    return int(match[1]) if match else None


def layer_range(modules: Iterable[str]) -> tuple[int, int]:
    """The lowest and the highest layer number among `modules`; (0, 0) when none has one."""
    numbers = [number for module in modules if (number := find_layer(module)) is not None]
    return (min(numbers), max(numbers)) if numbers else (0, 0)
