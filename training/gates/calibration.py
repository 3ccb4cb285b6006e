"""How well a value tells dangerous prompts from harmless ones, and how it becomes a probability."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from training.errors import ConfigError

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]
RECALL = 0.95
"""Share of the dangerous prompts that a gate should find, at which its false alarms are counted."""
DRAWS = 1000
MAX_SCALE = 1e3


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number with its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} ({self.low:.3f}–{self.high:.3f})"


def area(values: Floats, dangerous: Flags) -> float:
    """Area under the ROC curve: the chance that a dangerous prompt has a higher value than a harmless one, ties half
    (the Mann-Whitney statistic).
    """
    high, low = values[dangerous], np.sort(values[~dangerous])
    below, up_to = (np.searchsorted(low, high, side) for side in ("left", "right"))
    return float((below + up_to).mean() / (2 * len(low)))


def find_threshold(values: Floats, dangerous: Flags, recall: float = RECALL) -> float:
    """The highest value that at least a share `recall` of the dangerous prompts reaches."""
    high = np.sort(values[dangerous])[::-1]
    return float(high[math.ceil(recall * len(high) - 1e-9) - 1])


def false_alarms(values: Floats, dangerous: Flags, recall: float = RECALL) -> float:
    """The share of the harmless prompts that reach the threshold of `recall`."""
    return float((values[~dangerous] >= find_threshold(values, dangerous, recall)).mean())


def estimate(figure: Callable[[Floats, Flags], float], values: Floats, dangerous: Flags, seed: int = 0) -> Estimate:
    """A figure with the 95 % interval of the percentile bootstrap, drawn within each kind (Efron & Tibshirani, An
    Introduction to the Bootstrap, 1993, chapter 13).
    """
    rng = np.random.default_rng(seed)
    kinds = [np.flatnonzero(dangerous), np.flatnonzero(~dangerous)]
    draws = []
    for _ in range(DRAWS):
        drawn = np.concatenate([rng.choice(kind, len(kind)) for kind in kinds])
        draws.append(figure(values[drawn], dangerous[drawn]))
    low, high = np.quantile(draws, (0.025, 0.975))
    return Estimate(figure(values, dangerous), float(low), float(high))


def calibrate(values: Floats, dangerous: Flags) -> tuple[float, float]:
    """(scale, offset) with which 1 / (1 + exp(-(scale·value + offset))) is the probability that a prompt is dangerous:
    Platt's logistic fit, with his targets, which keep it finite where the kinds are apart (Platt, Probabilistic
    Outputs for Support Vector Machines, 1999).

    ConfigError unless higher values are more dangerous.
    """
    count, rest = int(dangerous.sum()), int((~dangerous).sum())
    targets = np.where(dangerous, (count + 1) / (count + 2), 1 / (rest + 2))
    spread = float(values.std()) or 1.0
    design = np.stack([(values - values.mean()) / spread, np.ones_like(values)], 1)
    fitted = _fit_logistic(design, targets)
    scale = float(fitted[0] / spread)
    if not 0 < scale <= MAX_SCALE:
        raise ConfigError(
            "the gate has learned nothing: its value is no higher for the dangerous prompts held out than for the "
            "harmless ones; train longer, or on other rows"
        )
    return scale, float(fitted[1] - scale * values.mean())


def _fit_logistic(design: Floats, targets: Floats, steps: int = 100) -> Floats:
    """Newton's method, each step halved until the loss falls; a tiny ridge keeps the Hessian regular."""

    def loss(weights: Floats) -> float:
        scores = design @ weights
        return float((np.logaddexp(0, scores) - targets * scores).sum() + 1e-9 * (weights @ weights))

    weights = np.zeros(design.shape[1])
    for _ in range(steps):
        probability = 0.5 + 0.5 * np.tanh(design @ weights / 2)
        gradient = design.T @ (probability - targets) + 2e-9 * weights
        curvature = (design * (probability * (1 - probability))[:, None]).T @ design + 2e-9 * np.eye(len(weights))
        step = np.linalg.solve(curvature, gradient)
        while loss(weights - step) > loss(weights) and np.abs(step).max() > 1e-12:
            step = step / 2
        weights = weights - step
        if np.abs(step).max() < 1e-10:
            break
    return weights


def move_offset(scale: float, values: Floats, dangerous: Flags, recall: float) -> float:
    """The offset at which a share `recall` of the dangerous prompts is at a probability of 1/2 or more."""
    return -scale * find_threshold(values, dangerous, recall)
