"""Points of a sweep: recipes made from a template and a grid, `{1-l}*task + {l}*safety` with `l=0:1:0.1`."""

import ast
import itertools
import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from adapters.recipes import Fade, Recipe, RecipeError, Steps, list_parts, parse
from eval_clients.errors import TemplateError

Kind = Literal["sweep", "search", "control"]
"""Why a point is measured: it is on the grid, the search chose it, or others are compared with it."""
Form = Literal["sum", "module", "position", "answer", "gate", "method", "other"]
"""What the weights depend on: nothing, the module, the position, that it is an answer's token, the prompt; or another
method than the sum, or a model that is not a recipe.
"""

HOLE = re.compile(r"\{([^{}:]*)\}")
"""An expression in a template; a brace with a colon is a recipe's own `{pattern: weight}`."""
OPERATORS: Mapping[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
}
MAX_POINTS = 10_000


@dataclass(frozen=True, slots=True)
class Point:
    """One model to measure, usually a recipe."""

    model: str
    kind: Kind
    series: str
    """The template it comes from, or which control it is."""
    values: Mapping[str, float] = field(default_factory=dict)
    """The variables of the grid."""

    @property
    def recipe(self) -> Recipe | None:
        """The model as a recipe of whatever weights; None for other names, such as a profile's version."""
        try:
            return parse(self.model, max_weight=math.inf)
        except RecipeError:
            return None

    @property
    def form(self) -> Form:
        """What the weights depend on, the first that applies of: prompt, answer, position, module."""
        recipe = self.recipe
        if recipe is None:
            return "other"
        if recipe.gate is not None:
            return "gate"
        if recipe.answer:
            return "answer"
        if any(isinstance(part, Steps | Fade) for term in recipe.terms for part in list_parts(term.weight)):
            return "position"
        if recipe.is_sum:
            return "sum"
        return "module" if recipe.method == "sum" else "method"


def parse_number(text: str, grid: str) -> float:
    """A finite number of a grid; TemplateError for anything else."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise TemplateError(f"{grid!r}: expected a finite number, got {text!r}")
    return value


def parse_grid(text: str) -> tuple[str, list[float]]:
    """`l=0:1:0.1` (both ends, by a step) or `l=0,0.25,1` as the variable and its values."""
    name, sign, span = text.partition("=")
    name = name.strip()
    if not sign or not name.isidentifier():
        raise TemplateError(f"{text!r} is not a grid; write it as l=0:1:0.1 or l=0,0.5,1")
    if ":" not in span:
        return name, [parse_number(part, text) for part in span.split(",")]
    parts = [parse_number(part, text) for part in span.split(":")]
    if len(parts) != 3 or parts[2] == 0 or (parts[1] - parts[0]) * parts[2] < 0:
        raise TemplateError(f"{text!r} is not a grid; write FIRST:LAST:STEP, with a step that leads from first to last")
    first, last, step = parts
    count = math.floor((last - first) / step + 1e-9) + 1
    if count > MAX_POINTS:
        raise TemplateError(f"{text!r} has {count} points; expected at most {MAX_POINTS}, so take a larger step")
    return name, [round(first + step * index, 10) for index in range(count)]


def evaluate(expression: str, values: Mapping[str, float]) -> float:
    """The value of an expression of numbers, grid variables, + - * / ** and brackets; TemplateError for any other."""

    def visit(node: ast.expr) -> float:
        if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
            return float(node.value)
        if isinstance(node, ast.Name):
            if node.id not in values:
                raise TemplateError(f"{node.id!r} in {{{expression}}} has no grid; give --grid {node.id}=0:1:0.1")
            return values[node.id]
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -visit(node.operand)
        if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
            return OPERATORS[type(node.op)](visit(node.left), visit(node.right))
        raise TemplateError(f"{{{expression}}} may only contain numbers, grid variables, + - * / ** and brackets")

    try:
        result = visit(ast.parse(expression.strip(), mode="eval").body)
    except (SyntaxError, ZeroDivisionError, OverflowError, TypeError) as error:
        raise TemplateError(f"{{{expression}}} cannot be computed: {error}") from None
    if not isinstance(result, float) or not math.isfinite(result):
        raise TemplateError(f"{{{expression}}} is not a finite number for {dict(values)}; change one of them")
    return result


def fill_template(template: str, values: Mapping[str, float]) -> str:
    """The template with every expression replaced by its value, to ten decimals."""
    return HOLE.sub(lambda hole: f"{round(evaluate(hole[1], values), 10) + 0.0:.10g}", template)


def expand(templates: Sequence[str], grids: Sequence[str]) -> list[Point]:
    """Every template at every point of the grid it uses; the same recipe only once."""
    axes = dict(parse_grid(text) for text in grids)
    if len(axes) < len(grids):
        raise TemplateError(f"a grid variable is given twice in {', '.join(grids)}; keep one --grid for each")
    points: dict[str, Point] = {}
    used: set[str] = set()
    for template in templates:
        names = [name for name in axes if any(re.search(rf"\b{name}\b", hole) for hole in HOLE.findall(template))]
        used.update(names)
        if math.prod(len(axes[name]) for name in names) > MAX_POINTS:
            raise TemplateError(f"{template!r} has more than {MAX_POINTS} points; use larger steps or fewer variables")
        for combination in itertools.product(*(axes[name] for name in names)):
            values = dict(zip(names, combination, strict=True))
            recipe = fill_template(template, values)
            points.setdefault(recipe, Point(recipe, "sweep", template, values))
    unused = sorted(set(axes) - used)
    if unused:
        raise TemplateError(
            f"no recipe uses the grid variable {unused[0]!r}; write it in braces: {{{unused[0]}}}*safety"
        )
    return list(points.values())
