"""A ranking from pairwise comparisons: the model of Bradley and Terry."""

import math
from collections.abc import Mapping

PRIOR = 0.5
"""Points that each model wins, and loses, against an imaginary one of strength 0: strengths stay finite."""
TOLERANCE = 1e-9
MAX_ROUNDS = 10_000


def fit_strengths(points: Mapping[tuple[str, str], float]) -> dict[str, float]:
    """The strength of each model, the natural logarithm of its odds against an imaginary average one.

    `points[i, j]` is how many comparisons with j went to i, a tie being half a point to each. Model i wins against j
    with probability 1 / (1 + exp(s_j - s_i)) (R. A. Bradley and M. E. Terry, Biometrika 39, 1952). The strengths are
    the maximum of the likelihood with `PRIOR`, found by the MM iteration of D. R. Hunter, Annals of Statistics 32,
    2004, equation 3: odds_i = wins_i / sum_j n_ij / (odds_i + odds_j).
    """
    models = sorted({model for pair in points for model in pair})
    wins = {model: PRIOR + sum(points.get((model, other), 0.0) for other in models) for model in models}
    counts = {model: {other: n for other in models if (n := _count(points, model, other))} for model in models}
    odds = dict.fromkeys(models, 1.0)
    for _ in range(MAX_ROUNDS):
        before = dict(odds)
        for model in models:
            met = sum(n / (odds[model] + odds[other]) for other, n in counts[model].items())
            odds[model] = wins[model] / (met + 2 * PRIOR / (odds[model] + 1.0))
        if all(abs(math.log(odds[model] / before[model])) < TOLERANCE for model in models):
            break
    return {model: math.log(odds[model]) for model in models}


def _count(points: Mapping[tuple[str, str], float], one: str, other: str) -> float:
    return points.get((one, other), 0.0) + points.get((other, one), 0.0) if one != other else 0.0
