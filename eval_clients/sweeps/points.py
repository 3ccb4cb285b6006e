"""Points of a sweep: recipes made from a template and a grid, `{1-l}*task + {l}*safety` with `l=0:1:0.1`."""

import ast
import itertools
import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

Kind = Literal["sweep", "search", "control"]

HOLE = re.compile(r"\{([^{}:]*)\}")
"""An expression in a template; a brace with a colon is a recipe's own `{pattern: weight}`."""
OPERATORS: Mapping[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
}
MOST = 10_000


class TemplateError(ValueError):
    """A recipe template or grid that cannot be read."""


@dataclass(frozen=True, slots=True)
class Point:
    """One model to measure. ``values`` are the grid's variables, ``series`` the template it comes from."""

    model: str
    kind: Kind
    series: str
    values: Mapping[str, float] = field(default_factory=dict)


def number(text: str, what: str) -> float:
    """A finite number; TemplateError says where it stood."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise TemplateError(f"{text!r} in {what!r} is no number")
    return value


def grid(text: str) -> tuple[str, list[float]]:
    """`l=0:1:0.1` (both ends, by a step) or `l=0,0.25,1` as the variable and its values."""
    name, sign, span = text.partition("=")
    name = name.strip()
    if not sign or not name.isidentifier():
        raise TemplateError(f"{text!r} is no grid; write it as l=0:1:0.1 or l=0,0.5,1")
    if ":" not in span:
        return name, [number(part, text) for part in span.split(",")]
    parts = [number(part, text) for part in span.split(":")]
    if len(parts) != 3 or parts[2] == 0 or (parts[1] - parts[0]) * parts[2] < 0:
        raise TemplateError(f"{text!r} is no grid; write FIRST:LAST:STEP, the step leading from first to last")
    first, last, step = parts
    count = math.floor((last - first) / step + 1e-9) + 1
    if count > MOST:
        raise TemplateError(f"{text!r} has {count} points; at most {MOST}")
    return name, [round(first + step * index, 10) for index in range(count)]


def value(expression: str, values: Mapping[str, float]) -> float:
    """An expression of numbers, grid variables, + - * / ** and brackets; TemplateError names what is not known."""

    def of(node: ast.expr) -> float:
        if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
            return float(node.value)
        if isinstance(node, ast.Name):
            if node.id not in values:
                raise TemplateError(f"{node.id!r} in {{{expression}}} has no grid; give --grid {node.id}=0:1:0.1")
            return values[node.id]
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -of(node.operand)
        if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
            return OPERATORS[type(node.op)](of(node.left), of(node.right))
        raise TemplateError(f"{{{expression}}} may hold numbers, grid variables, + - * / ** and brackets only")

    try:
        found = of(ast.parse(expression.strip(), mode="eval").body)
    except (SyntaxError, ZeroDivisionError, OverflowError, TypeError) as error:
        raise TemplateError(f"{{{expression}}} cannot be computed: {error}") from None
    if not isinstance(found, float) or not math.isfinite(found):
        raise TemplateError(f"{{{expression}}} is no finite number for {dict(values)}")
    return found


def filled(template: str, values: Mapping[str, float]) -> str:
    """The template with every expression replaced by its value, to ten decimals."""
    return HOLE.sub(lambda hole: f"{round(value(hole[1], values), 10) + 0.0:.10g}", template)


def expand(templates: Sequence[str], grids: Sequence[str]) -> list[Point]:
    """Every template at every point of the grid it uses; the same recipe only once."""
    axes = dict(grid(text) for text in grids)
    if len(axes) < len(grids):
        raise TemplateError("a grid variable is given twice")
    found: dict[str, Point] = {}
    used: set[str] = set()
    for template in templates:
        names = [name for name in axes if any(re.search(rf"\b{name}\b", hole) for hole in HOLE.findall(template))]
        used.update(names)
        if math.prod(len(axes[name]) for name in names) > MOST:
            raise TemplateError(f"{template!r} has more than {MOST} points")
        for combination in itertools.product(*(axes[name] for name in names)):
            values = dict(zip(names, combination, strict=True))
            recipe = filled(template, values)
            found.setdefault(recipe, Point(recipe, "sweep", template, values))
    unused = sorted(set(axes) - used)
    if unused:
        raise TemplateError(
            f"the grid of {unused[0]!r} is used in no recipe; write it in braces: {{{unused[0]}}}*safety"
        )
    return list(found.values())
