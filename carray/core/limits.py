"""Upper bounds of numbers that a user gives; a larger one is a typing error, or more than a library can count."""

from __future__ import annotations

__all__ = ["MOST_COUNT", "MOST_SEED", "MOST_WORKERS"]

MOST_COUNT = 10**12
"""Of images, rows, machines or money."""
MOST_WORKERS = 1_000_000
"""Of processes, threads, images of a batch, or megabytes of one."""
MOST_SEED = 10**14
"""PyTorch's generators take seeds of 64 bits, and an epoch's seed is 100,003 times the search's."""
