"""Benchmarks with answers that can be checked: one file per task."""
