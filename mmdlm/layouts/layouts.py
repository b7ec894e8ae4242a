"""All layouts, by the name of the family that a checkpoint stores."""

from __future__ import annotations

from collections.abc import Mapping

from mmdlm.layouts.dimple import Dimple
from mmdlm.layouts.dream import Dream
from mmdlm.layouts.lavida import LavidaDream, LavidaLlada
from mmdlm.layouts.layout import Layout
from mmdlm.layouts.llada import Llada
from mmdlm.layouts.llada_v import LladaV
from mmdlm.layouts.lumina import Lumina
from mmdlm.layouts.mmada import Mmada
from mmdlm.layouts.own import Own
from mmdlm.layouts.own_seeing import OwnSeeing

LAYOUTS: Mapping[str, Layout] = {
    layout.family: layout
    for layout in (
        Own(),
        OwnSeeing(),
        Llada(),
        Mmada(),
        LladaV(),
        LavidaLlada(),
        Dream(),
        LavidaDream(),
        Dimple(),
        Lumina(),
    )
}


# A model of text that was given a vision adapter speaks as the one of its kind that sees.
GIVEN_EYES = {
    Own.family: OwnSeeing.family,
    Llada.family: LladaV.family,
    Dream.family: LavidaDream.family,
}


def layout_of(family: str | None, *, seeing: bool = False) -> Layout:
    """The layout of a published family.

    A model that was born here has ours, and so has one that was made of an autoregressive model or
    an encoder, which brings no tasks of its own.

    seeing  whether the model has a vision adapter
    """
    name = Own.family if family not in LAYOUTS or family is None else family
    return LAYOUTS[GIVEN_EYES.get(name, name) if seeing else name]
