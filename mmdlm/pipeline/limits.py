"""Limits of a call, which the command line checks before torch is imported."""

from __future__ import annotations

MOST_IMAGES = 10_000  # that are drawn in one call
