"""Bounds of numbers that a user gives: beyond them lies a slip of the keyboard, or what a library cannot count."""

from __future__ import annotations

__all__ = ["MOST_COUNT", "MOST_SEED", "MOST_WORKERS"]

MOST_COUNT = 10**12
"""Of images, rows, machines or money."""
MOST_WORKERS = 1_000_000
"""Of processes, threads, images of a batch, or megabytes of one."""
MOST_SEED = 10**14
"""A training's generators take seeds of 64 bits, and an epoch's is 100,003 times the search's."""
