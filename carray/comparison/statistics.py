"""The formulas of a comparison, with their sources. Pure functions on numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

__all__ = ["mcnemar_p", "mean_interval", "paired_change", "psi_words", "stability_index"]

_Z = 1.959964
"""Of a two-sided 95 % interval."""


def mcnemar_p(only_a: int, only_b: int) -> float:
    """Give the p-value of McNemar's exact test: how likely so uneven a split is if neither is right more often.

    Args:
        only_a: images that A alone has right.
        only_b: images that B alone has right.

    Source: McNemar (1947), Psychometrika 12(2), 153-157; exact form: the binomial test of `only_a` of both, at 1/2.
    """
    from scipy.stats import binomtest

    return 1.0 if only_a + only_b == 0 else float(binomtest(only_a, only_a + only_b, 0.5).pvalue)


def paired_change(gained: int, lost: int, images: int) -> tuple[float, float, float]:
    """Give the change of a share between two labellings of the same images, and its 95 % interval: change, low, high.

    Args:
        gained: images that only B counts in.
        lost: images that only A counts in.
        images: all images, at least 1.

    Source: the adjusted Wald interval of Bonett and Price (2012), Journal of Educational and Behavioral Statistics
    37(4), 479-488, which keeps its promise for small counts, too.
    """
    up, down = (gained + 1) / (images + 2), (lost + 1) / (images + 2)
    spread = _Z * math.sqrt(max(0.0, up + down - (up - down) ** 2) / (images + 2))
    return (gained - lost) / images, max(-1.0, up - down - spread), min(1.0, up - down + spread)


def mean_interval(total: float, squares: float, images: int) -> tuple[float, float, float]:
    """Give the mean of `images` values, from their sum and that of their squares, and its 95 % interval."""
    mean = total / images
    variance = max(0.0, squares / images - mean**2) * images / max(1, images - 1)
    spread = _Z * math.sqrt(variance / images)
    return mean, mean - spread, mean + spread


def stability_index(counts_a: Sequence[int], counts_b: Sequence[int]) -> float:
    """Give the population stability index (PSI) of two distributions over the same cells; 0 when they are alike.

    It is the sum of (b - a) ln(b / a) over the shares a and b. Half an image is added to every cell, so that an empty
    one weighs much and not infinitely.

    Source: Siddiqi (2006), Credit Risk Scorecards, Wiley, chapter 9.
    """
    shares_a, shares_b = (
        (np.asarray(counts, dtype=float) + 0.5) / (sum(counts) + 0.5 * len(counts)) for counts in (counts_a, counts_b)
    )
    return float(((shares_b - shares_a) * np.log(shares_b / shares_a)).sum())


def psi_words(index: float) -> str:
    """Say what a PSI means by Siddiqi's rule of thumb: below 0.1 stable, to 0.25 some drift, above it much."""
    return "stable" if index < 0.1 else "some drift" if index <= 0.25 else "much drift"
