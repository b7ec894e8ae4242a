"""The settings of property-based tests, which each file of them imports.

The same examples are drawn in every run, so that a test fails everywhere or nowhere. To look for
new ones: `HYPOTHESIS_PROFILE=search python -m pytest tests -k properties`.
"""

from __future__ import annotations

import os

from hypothesis import settings

settings.register_profile(
    "repeatable", derandomize=True, deadline=None, database=None, max_examples=50
)
settings.register_profile("search", deadline=None, max_examples=2000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))
