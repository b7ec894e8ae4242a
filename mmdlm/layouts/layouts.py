"""All layouts, by the name of the family that a checkpoint stores."""

from __future__ import annotations

from collections.abc import Mapping

from mmdlm.layouts.layout import Layout
from mmdlm.layouts.own import Own

LAYOUTS: Mapping[str, Layout] = {layout.family: layout for layout in (Own(),)}


def layout_of(family: str | None) -> Layout:
    """The layout of a published family; None for a model that was born here.

    Raises ValueError for a name that no family has.
    """
    name = Own.family if family is None else family
    if name not in LAYOUTS:
        raise ValueError(f"no layout for the family {name!r}; known are {', '.join(LAYOUTS)}")
    return LAYOUTS[name]
