"""What a row of the method table says."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Value = float | int | str


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One named option of a method.

    `kind` is "int", "float", "choice" (one of `choices`), "term" (the name of one of the recipe's terms)
    or "adapter" (the name of a further adapter, which plays a role instead of being a term). An option whose `default`
    is None is required; numbers lie in [minimum, maximum].
    """

    name: str
    kind: Literal["int", "float", "choice", "term", "adapter"]
    default: Value | None = None
    minimum: float = float("-inf")
    maximum: float = float("inf")
    choices: tuple[str, ...] = ()
    help: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """One row: how the weighted updates become one.

    `on` says what the row's functions see: "factors" (low-rank all the way, exact before the rank limit),
    "update" (the true dense update of one module at a time, truncated to `rank` afterwards) or "factorwise" (A
    and B as if each were an update, as PEFT does: approximate). `version` is part of every fusion digest: raise it
    whenever the result changes.
    """

    name: str
    summary: str
    reference: str
    version: int = 1
    on: Literal["factors", "update", "factorwise"] = "factors"
    sparsify: Literal["none", "magnitude", "random", "magprune", "breadcrumbs"] = "none"
    consensus: Literal["none", "sign", "peft_sign"] = "none"
    combine: Literal["sum", "slerp", "safe_merge", "safe_project", "knots"] = "sum"
    default_rank: Literal["sum", "max"] = "sum"
    terms: tuple[int, int] = (1, 64)
    options: tuple[Option, ...] = ()

    @property
    def kinds(self) -> dict[str, str]:
        """The kind of each option by its name."""
        return {option.name: option.kind for option in self.options}

    @property
    def linear(self) -> bool:
        """Whether the result is, module by module, a weighted sum of the recipe's adapters as they are."""
        return self.on == "factors" and self.combine in ("sum", "slerp", "safe_merge") and "rank" not in self.kinds

    def fill(self, options: Mapping[str, Value]) -> dict[str, Value]:
        """All options by name: `options`, and the defaults of the others."""
        defaults = {option.name: option.default for option in self.options if option.default is not None}
        return {**defaults, **options}
