"""Upper bounds of numbers that a user gives; larger ones are typing errors or overflow in a library."""

from __future__ import annotations

__all__ = ["MOST_COUNT", "MOST_SEED", "MOST_WORKERS"]

MOST_COUNT = 10**12
"""The most images, rows, machines or money."""
MOST_WORKERS = 1_000_000
"""The most processes, threads, images of a batch, or megabytes."""
MOST_SEED = 10**14
"""PyTorch's seeds have 64 bits, and an epoch's seed is 100,003 times the search's."""
