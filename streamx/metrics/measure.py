"""A metric's value, with what it was measured on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

_Z = 1.959963984540054  # standard normal, two-sided 95 %


@dataclass(frozen=True)
class Measure:
    """One metric.

    Attributes
    ----------
    value
        The metric, or None where it isn't defined; then `reason` says why.
    exact
        False if it was estimated from a sample of cells (or of draws, where the metric is defined so).
    n
        Cells (or draws) that it was computed on.
    ci95
        95 % confidence interval of a sampled value.
    seed
        Seed of the sample.
    extra
        What else the reader should know, such as the value of perfect mixing.
    """

    value: float | None
    exact: bool = True
    n: int = 0
    ci95: tuple[float, float] | None = None
    seed: int | None = None
    reason: str | None = None
    extra: dict[str, Any] | None = None

    def details(self) -> dict[str, Any]:
        """All but the value, for JSON."""
        found: dict[str, Any] = {"exact": self.exact, "n": self.n}
        if self.ci95 is not None:
            found["ci95"] = list(self.ci95)
        if self.seed is not None:
            found["seed"] = self.seed
        if self.reason is not None:
            found["reason"] = self.reason
        return found | (self.extra or {})


def undefined(reason: str) -> Measure:
    """A metric that these cells don't have."""
    return Measure(None, reason=reason)


def mean_of(values_n: np.ndarray, exact: bool, seed: int | None = None, **extra: Any) -> Measure:
    """The mean over cells; of a sample, with the normal interval around it."""
    value = float(np.mean(values_n))
    if exact:
        return Measure(value, n=len(values_n), extra=extra or None)
    half = _Z * float(np.std(values_n, ddof=1) / np.sqrt(len(values_n))) if len(values_n) > 1 else np.inf
    return Measure(value, False, len(values_n), (value - half, value + half), seed, extra=extra or None)


def share_of(hits_n: np.ndarray, exact: bool, seed: int | None = None, **extra: Any) -> Measure:
    """The share of cells that are hits; of a sample, with Wilson's interval, which no hits leave open."""
    n, value = len(hits_n), float(np.mean(hits_n))
    if exact:
        return Measure(value, n=n, extra=extra or None)
    center = (value + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z / (1 + _Z**2 / n) * float(np.sqrt(value * (1 - value) / n + _Z**2 / (4 * n**2)))
    return Measure(value, False, n, (center - half, center + half), seed, extra=extra or None)


def mean_of_means(
    values_n: np.ndarray, group_n: np.ndarray, exact: bool, seed: int | None, size_g: np.ndarray
) -> Measure:
    """The mean over groups (labels 0, 1, ..., each with a value) of the mean over their cells.

    Parameters
    ----------
    size_g
        All cells of each group; one of which every cell has a value is known exactly.
    """
    counts = np.bincount(group_n)
    means = np.bincount(group_n, values_n) / counts
    value = float(means.mean())
    if exact:
        return Measure(value, n=len(values_n))
    spread = np.bincount(group_n, (values_n - means[group_n]) ** 2) / np.maximum(counts - 1, 1)
    spread[counts == size_g] = 0
    half = _Z * float(np.sqrt(np.sum(spread / counts))) / len(counts)
    return Measure(value, False, len(values_n), (value - half, value + half), seed)


def median_of(values_n: np.ndarray, exact: bool, seed: int | None = None) -> Measure:
    """The median over cells; of a sample, with the interval between two order statistics."""
    value = float(np.median(values_n))
    if exact:
        return Measure(value, n=len(values_n))
    n = len(values_n)
    half = _Z * np.sqrt(n) / 2
    ordered = np.sort(values_n)
    low, high = max(0, int(np.floor(n / 2 - half)) - 1), min(n - 1, int(np.ceil(n / 2 + half)))
    return Measure(value, False, n, (float(ordered[low]), float(ordered[high])), seed)


def mean_of_samples(values_r: np.ndarray, n: int, seed: int, **extra: Any) -> Measure:
    """The mean over independent samples of cells, with Student's interval."""
    from scipy.stats import t

    value = float(np.mean(values_r))
    half = float(t.ppf(0.975, len(values_r) - 1) * np.std(values_r, ddof=1) / np.sqrt(len(values_r)))
    return Measure(value, False, n, (value - half, value + half), seed, extra=extra or None)


def scaled(measure: Measure, low: float, high: float) -> Measure:
    """The same measure with `low` -> 0 and `high` -> 1 (they may be reversed)."""
    if measure.value is None:
        return measure

    def to_unit(value: float) -> float:
        return (value - low) / (high - low)

    interval = None
    if measure.ci95 is not None:
        first, last = sorted((to_unit(measure.ci95[0]), to_unit(measure.ci95[1])))
        interval = (first, last)
    return Measure(
        to_unit(measure.value),
        measure.exact,
        measure.n,
        interval,
        measure.seed,
        measure.reason,
        measure.extra,
    )
