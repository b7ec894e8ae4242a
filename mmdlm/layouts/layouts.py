"""All layouts, by the name of the family that a checkpoint stores."""

from __future__ import annotations

from collections.abc import Mapping

from mmdlm.layouts.dream import Dream
from mmdlm.layouts.lavida import LavidaDream, LavidaLlada
from mmdlm.layouts.layout import Layout
from mmdlm.layouts.llada import Llada
from mmdlm.layouts.llada_v import LladaV
from mmdlm.layouts.lumina import Lumina
from mmdlm.layouts.mmada import Mmada
from mmdlm.layouts.own import Own

LAYOUTS: Mapping[str, Layout] = {
    layout.family: layout
    for layout in (
        Own(),
        Llada(),
        Mmada(),
        LladaV(),
        LavidaLlada(),
        Dream(),
        LavidaDream(),
        Lumina(),
    )
}


def layout_of(family: str | None) -> Layout:
    """The layout of a published family.

    A model that was born here has ours, and so has one that was made of an autoregressive model or
    an encoder, which brings no tasks of its own.
    """
    return LAYOUTS.get(family or Own.family, LAYOUTS[Own.family])
