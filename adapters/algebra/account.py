"""The account of a fusion: what was kept and lost in each module, and how its parents stand to each other."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from adapters.algebra.combine import Part
from adapters.algebra.compare import Kinship
from adapters.algebra.job import Job
from adapters.algebra.report import FusionReport, ModuleReport


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one module.

    `kept` and `lost` are squared norms (kept only where it was needed); `gap` and `plain` those of the
    difference from the exact weighted sum and of that sum, for methods that take A and B apart.
    """

    rank_before: int
    rank: int
    kept: float = 0.0
    lost: float = 0.0
    gap: float = 0.0
    plain: float = 0.0


@dataclass(slots=True)
class Account:
    """Grows module by module; `report` closes it."""

    job: Job
    rows: dict[str, ModuleReport] = field(default_factory=dict)
    outcomes: dict[str, Outcome] = field(default_factory=dict)

    def enter(
        self, outcomes: Mapping[str, Outcome], parents: Mapping[str, Sequence[Part]], kin: Sequence[Kinship]
    ) -> None:
        """One batch of modules; `parents` and `kin` in the same order."""
        for (name, parts), found in zip(parents.items(), kin, strict=True):
            outcome = outcomes[name]
            share = outcome.lost / (outcome.kept + outcome.lost) if outcome.lost else 0.0
            norms = dict(zip((part.name for part in parts), found.norms, strict=True))
            self.rows[name] = ModuleReport(
                name,
                outcome.rank_before,
                outcome.rank,
                1.0 - share,
                math.sqrt(share),
                norms,
                found.cosine,
                found.conflict,
            )
        self.outcomes.update(outcomes)

    def report(self) -> FusionReport:
        """The whole fusion."""
        all_ = self.outcomes.values()
        lost = sum(outcome.lost for outcome in all_)
        share = lost / sum(outcome.kept + outcome.lost for outcome in all_) if lost else 0.0
        departure = None
        if self.job.method.on == "apart":
            plain = sum(outcome.plain for outcome in all_)
            departure = math.sqrt(sum(outcome.gap for outcome in all_) / plain) if plain else 0.0
        sizes = (self.outcomes[name].rank * sum(shape) for name, shape in self.job.shapes.items())
        return FusionReport(
            recipe=self.job.recipe.format(),
            method=self.job.recipe.method,
            rank=max(outcome.rank for outcome in all_),
            error=math.sqrt(share),
            energy=1.0 - share,
            exact=lost == 0.0 and departure is None,
            departure=departure,
            bytes=sum(sizes) * self.job.dtype.itemsize,
            modules=tuple(self.rows[name] for name in self.job.shapes),
        )
