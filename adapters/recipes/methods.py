"""The table of fusion methods: a method is a row, not a class.

Each row says on what it works, how it makes every update sparse, how it settles their signs, and how it
combines them; `combine`, `sparsify` and `consensus` hold the functions these words stand for.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from adapters.recipes.method import Method, Option

MAX_RANK = 65536
_RANK = Option(name="rank", kind="int", minimum=1, maximum=MAX_RANK, help="largest rank of a module")
_CUT = Option(
    name="rank",
    kind="int",
    default=0,
    minimum=0,
    maximum=MAX_RANK,
    help="rank the result is truncated to; 0: the parents' ranks added up",
)
_PEFT_CUT = Option(
    name="rank",
    kind="int",
    default=0,
    minimum=0,
    maximum=MAX_RANK,
    help="PEFT's svd_rank; 0: the largest of the parents",
)
_DENSITY = Option(name="density", kind="float", default=0.5, minimum=1e-6, maximum=1, help="share of entries kept")
_SEED = Option(name="seed", kind="int", default=0, minimum=0, maximum=2**53 - 1, help="seed of the random masks")
_MAJORITY = Option(
    name="majority",
    kind="choice",
    default="total",
    choices=("total", "frequency"),
    help="a sign is elected by the sum of the entries, or by their number",
)
_TIES = "TIES-Merging, https://arxiv.org/abs/2306.01708"
_DARE = "DARE, https://arxiv.org/abs/2311.03099"
_RANDOM: dict[str, Any] = {"sparsify": "random", "version": 2}  # 1 drew from torch.Generator, on the CPU alone
_PEFT = "PEFT 0.21.2, LoraModel.add_weighted_adapter"


def _peft_rows() -> tuple[Method, ...]:
    """PEFT's own combinations, on A and B separately and as `*_svd` on the update."""
    kinds: tuple[tuple[str, dict[str, Any], tuple[Option, ...]], ...] = (
        ("ties", {"sparsify": "magnitude", "consensus": "peft_sign"}, (_DENSITY, _MAJORITY)),
        ("dare_linear", _RANDOM, (_DENSITY, _SEED)),
        ("dare_ties", {**_RANDOM, "consensus": "peft_sign"}, (_DENSITY, _SEED, _MAJORITY)),
        ("magnitude_prune", {"sparsify": "magnitude"}, (_DENSITY,)),
    )
    rows = [
        Method(
            name="peft_linear", summary="PEFT's linear: A and B summed separately", reference=_PEFT, on="factorwise"
        ),
        Method(
            name="peft_svd",
            summary="PEFT's svd: the sum truncated to a rank",
            reference=_PEFT,
            default_rank="max",
            options=(_PEFT_CUT,),
        ),
    ]
    for name, how, options in kinds:
        words: dict[str, Any] = {**how, "reference": _PEFT}
        rows.append(
            Method(
                name=f"peft_{name}",
                summary=f"PEFT's {name}: A and B separately",
                on="factorwise",
                options=options,
                **words,
            )
        )
        rows.append(
            Method(
                name=f"peft_{name}_svd",
                summary=f"PEFT's {name}_svd: {name} on the update, then the best rank",
                on="update",
                default_rank="max",
                options=(*options, _PEFT_CUT),
                **words,
            )
        )
    return tuple(rows)


ROWS = (
    Method(
        name="sum",
        summary="exact weighted sum of the updates (factors concatenated)",
        reference="https://arxiv.org/abs/2501.06208",
    ),
    Method(
        name="svd",
        summary="best approximation of the sum in Frobenius norm, at most `rank` in every module",
        reference="Eckart and Young 1936, https://doi.org/10.1007/BF02288367",
        options=(_RANK,),
    ),
    Method(
        name="ties",
        summary="trim to the largest entries, elect a sign per entry, mean of those that agree",
        reference=_TIES,
        on="update",
        sparsify="magnitude",
        consensus="sign",
        options=(_DENSITY, _MAJORITY, _CUT),
    ),
    Method(
        name="dare_linear",
        summary="drop entries at random, rescale the others, sum",
        reference=_DARE,
        on="update",
        **_RANDOM,
        options=(_DENSITY, _SEED, _CUT),
    ),
    Method(
        name="dare_ties",
        summary="drop entries at random, rescale the others, elect a sign, mean of those that agree",
        reference=_DARE,
        on="update",
        **_RANDOM,
        consensus="sign",
        options=(_DENSITY, _SEED, _MAJORITY, _CUT),
    ),
    Method(
        name="magnitude_prune",
        summary="trim to the largest entries, sum",
        reference="Han et al. 2015, https://arxiv.org/abs/1506.02626",
        on="update",
        sparsify="magnitude",
        options=(_DENSITY, _CUT),
    ),
    Method(
        name="della",
        version=2,  # as of _RANDOM
        summary="drop small entries of a row more often than large ones, rescale, then as `ties`",
        reference="DELLA-Merging, https://arxiv.org/abs/2406.11617",
        on="update",
        sparsify="magprune",
        consensus="sign",
        options=(
            _DENSITY,
            Option(
                name="epsilon",
                kind="float",
                default=0.1,
                minimum=0,
                maximum=0.5,
                help="a row's keep probabilities span density ± epsilon; cut so that they stay in [density/2, 1]",
            ),
            _SEED,
            _MAJORITY,
            _CUT,
        ),
    ),
    Method(
        name="breadcrumbs",
        summary="drop the largest entries (outliers) and the smallest, sum",
        reference="Model Breadcrumbs, https://arxiv.org/abs/2312.06795",
        on="update",
        sparsify="breadcrumbs",
        options=(
            Option(name="density", kind="float", default=0.9, minimum=1e-6, maximum=1, help="share of entries kept"),
            Option(
                name="gamma", kind="float", default=0.01, minimum=0, maximum=1, help="share of largest entries dropped"
            ),
            _CUT,
        ),
    ),
    Method(
        name="knots",
        summary="TIES on the updates' coordinates in their shared singular basis",
        reference="KnOTS, https://arxiv.org/abs/2410.19735",
        combine="knots",
        sparsify="magnitude",
        consensus="sign",
        options=(
            Option(name="density", kind="float", default=1.0, minimum=1e-6, maximum=1, help="share of entries kept"),
            _MAJORITY,
        ),
    ),
    Method(
        name="slerp",
        summary="from one update to another along the sphere, per module",
        reference="Shoemake 1985, https://doi.org/10.1145/325165.325242",
        combine="slerp",
        terms=(2, 2),
        options=(
            Option(name="t", kind="float", minimum=0, maximum=1, help="0 is `from`, 1 the other"),
            Option(name="from", kind="term", help="the adapter at t=0"),
        ),
    ),
    Method(
        name="safe_merge",
        summary="the safety adapter's share only in modules where the sum drifts from its subspace",
        reference="SafeMERGE, https://arxiv.org/abs/2503.17239",
        combine="safe_merge",
        options=(
            Option(name="safety", kind="adapter", help="the safety adapter"),
            Option(
                name="threshold",
                kind="float",
                minimum=0,
                maximum=1,
                help="a module drifts when the cosine of its update and its projection is below",
            ),
            Option(
                name="share",
                kind="float",
                default=0.5,
                minimum=0,
                maximum=1,
                help="share of the safety adapter in such a module; the sum keeps the rest",
            ),
        ),
    ),
    Method(
        name="safe_project",
        summary="the sum projected onto the subspace of an alignment direction, in modules that drift from it",
        reference="Safe LoRA, https://arxiv.org/abs/2405.16833",
        combine="safe_project",
        options=(
            Option(name="direction", kind="adapter", help="the adapter whose column space is safe"),
            Option(
                name="threshold",
                kind="float",
                default=1.0,
                minimum=0,
                maximum=1,
                help="project modules whose cosine with their projection is below; 1: all",
            ),
        ),
    ),
    *_peft_rows(),
)

METHODS: Mapping[str, Method] = MappingProxyType({row.name: row for row in ROWS})
DEFAULT_METHOD = "sum"
