"""The table of fusion methods: a method is a row, not a class. No torch here: recipes parse without it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

Value = float | int | str
RankLimit = Callable[[Mapping[str, Value]], int | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One named option of a method.

    `kind` is "int", "float" or "adapter" (the name of one of the recipe's adapters); `default` None
    means that the option must be given; numbers lie in [minimum, maximum].
    """

    name: str
    kind: Literal["int", "float", "adapter"]
    default: Value | None = None
    minimum: float = float("-inf")
    maximum: float = float("inf")
    help: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """One row: how the weighted updates become one.

    `function` gets the recipe's options (defaults filled in) and returns the rank above which a
    module's sum is cut to its best approximation, or None for no limit of its own. `version` is
    part of every fusion digest: raise it whenever the result changes.
    """

    name: str
    summary: str
    reference: str
    version: int
    function: RankLimit
    options: tuple[Option, ...] = ()

    def filled(self, given: Mapping[str, Value]) -> dict[str, Value]:
        """All options by name: those given, and the defaults of the others."""
        defaults = {option.name: option.default for option in self.options if option.default is not None}
        return {**defaults, **given}


def _no_limit(options: Mapping[str, Value]) -> int | None:
    return None


def _rank_option(options: Mapping[str, Value]) -> int | None:
    return int(options["rank"])


_ROWS = (
    Method(
        name="sum",
        summary="exact weighted sum of the updates (factors concatenated)",
        reference="https://arxiv.org/abs/2501.06208",
        version=1,
        function=_no_limit,
    ),
    Method(
        name="svd",
        summary="best approximation of the sum in Frobenius norm, at most `rank` in every module",
        reference="Eckart and Young 1936, https://doi.org/10.1007/BF02288367",
        version=1,
        function=_rank_option,
        options=(Option(name="rank", kind="int", minimum=1, maximum=65536, help="largest rank of a module"),),
    ),
)

METHODS: Mapping[str, Method] = MappingProxyType({row.name: row for row in _ROWS})
DEFAULT_METHOD = "sum"

RESERVED_METHODS: tuple[str, ...] = tuple(
    sorted(
        {
            *METHODS,
            *("linear", "cat", "ties", "dare", "dare_linear", "dare_ties", "magnitude_prune", "della"),
            *("della_linear", "breadcrumbs", "breadcrumbs_ties", "knots", "knots_ties", "slerp", "karcher"),
            *("task_arithmetic", "model_stock", "fisher", "regmean", "lorahub", "safe_merge", "safe_project"),
            *("safe_lora", "schedule", "layers", "della_ties", "emr", "iso_c", "tsv", "nuslerp", "sce"),
            *("peft_cat", "peft_linear", "peft_svd", "peft_ties", "peft_dare_linear", "peft_dare_ties"),
            *("peft_magnitude_prune", "peft_ties_svd", "peft_dare_linear_svd", "peft_dare_ties_svd"),
            "peft_magnitude_prune_svd",
        }
    )
)
"""Names of methods, of today and planned: no adapter or profile may have one."""
