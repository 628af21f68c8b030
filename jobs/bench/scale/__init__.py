"""Benchmarks of scale."""
