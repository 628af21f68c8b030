"""Benchmarks of classification."""
