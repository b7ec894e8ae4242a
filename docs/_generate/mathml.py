"""Equations: from the TeX that arithmatex marks to MathML, which browsers show without a script."""

from __future__ import annotations

import re
from html import unescape

from latex2mathml.converter import convert

_BLOCK = re.compile(r'<div class="arithmatex">\\\[(.*?)\\\]</div>', re.DOTALL)
_INLINE = re.compile(r'<span class="arithmatex">\\\((.*?)\\\)</span>', re.DOTALL)


def with_mathml(html: str) -> str:
    """Return a page with each equation as a MathML element."""
    html = _BLOCK.sub(lambda found: _element(found[1], display="block"), html)
    return _INLINE.sub(lambda found: _element(found[1], display="inline"), html)


def _element(tex: str, *, display: str) -> str:
    element: str = convert(unescape(tex).strip(), display=display)
    return f'<div class="equation">{element}</div>' if display == "block" else element
