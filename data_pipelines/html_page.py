"""HTML pages of one file that needs no network: their style, and images within them."""

from __future__ import annotations

import base64

from PIL import Image

from data_pipelines.sources.source import png_bytes


def inline_image(image: Image.Image) -> str:
    """Return an address that holds the whole image, as PNG."""
    return f"data:image/png;base64,{base64.b64encode(png_bytes(image)).decode()}"


STYLE = """
:root {
  color-scheme: light dark;
  --ground: #faf9f6; --card: #ffffff; --ink: #23211d; --soft: #6b665c; --line: #e6e2da;
  --trained: #5f6b7a; --held-out: #a84b00; --new: #6d3fc0; --right: #23762f; --mark: #ffe9a8;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ground: #171614; --card: #211f1c; --ink: #ece8e0; --soft: #a49e92; --line: #38342e;
    --trained: #a3b0c0; --held-out: #ffa35c; --new: #bb9bff; --right: #7fce8a; --mark: #6b5510;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: clamp(1.25rem, 4vw, 3.5rem); max-width: 66rem;
  background: var(--ground); color: var(--ink);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", sans-serif;
}
h1 { font-size: clamp(1.9rem, 5vw, 2.8rem); letter-spacing: -0.03em; line-height: 1.1; margin: 0; }
h2 { font-size: 1.35rem; letter-spacing: -0.01em; margin: 3.5rem 0 0.25rem; }
p { margin: 0.35rem 0; max-width: 44rem; }
.soft, footer, .legend { color: var(--soft); }
ul { list-style: none; margin: 1.25rem 0 0; padding: 0; }
figure { margin: 0; }
img { display: block; max-width: 100%; height: auto; }
.hero { margin-top: 1.75rem; padding: 0.75rem; background: #fff; border-radius: 1rem;
  border: 1px solid var(--line); width: fit-content; }
.grid { display: grid; gap: 0.9rem;
  grid-template-columns: repeat(auto-fill, minmax(8.75rem, 1fr)); }
.grid li, .mending, .lines li { background: var(--card); border: 1px solid var(--line);
  border-radius: 0.9rem; }
.grid li { padding: 0.65rem 0.65rem 0.8rem; }
.grid figure > img, .mending img { width: 100%; background: #fff; border-radius: 0.5rem; }
figcaption { margin-top: 0.55rem; font-size: 0.86rem; line-height: 1.35;
  display: flex; flex-direction: column; gap: 0.3rem; align-items: flex-start;
  overflow-wrap: anywhere; }
.badge { font-size: 0.7rem; font-weight: 600; line-height: 1; padding: 0.24rem 0.45rem;
  border: 1px solid currentColor; border-radius: 1rem; white-space: nowrap; }
.trained { color: var(--trained); }
.held_out { color: var(--held-out); }
.new { color: var(--new); }
.real { display: flex; align-items: center; gap: 0.4rem; color: var(--soft); font-size: 0.75rem; }
.real img { width: 1.75rem; background: #fff; border-radius: 0.25rem; }
.legend { margin-top: 0.75rem; font-size: 0.86rem; display: grid; gap: 0.35rem; }
q { font-weight: 600; quotes: none; }
.right { color: var(--right); } .wrong { color: var(--soft); }
.mendings { display: flex; flex-wrap: wrap; gap: 0.9rem; margin-top: 1.25rem; }
.mending { display: flex; align-items: flex-start; gap: 0.7rem; padding: 0.9rem; max-width: 100%; }
.mending figure { width: 8rem; min-width: 0; }
.arrow { color: var(--soft); font-size: 1.3rem; margin-top: 2.9rem; }
.lines { display: grid; gap: 0.6rem; }
.lines li { display: flex; align-items: center; gap: 1rem; padding: 0.7rem 0.9rem; }
.lines img { width: 3.25rem; background: #fff; border-radius: 0.4rem; }
.lines p { margin: 0.1rem 0 0; font-size: 1.05rem; }
code, pre { font: 0.84rem/1.6 ui-monospace, "Cascadia Mono", Menlo, Consolas, monospace; }
code { color: var(--soft); }
mark { background: var(--mark); color: inherit; border-radius: 0.25rem; padding: 0 0.15rem; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 0.9rem;
  padding: 0.9rem 1.1rem; overflow-x: auto; }
footer { margin-top: 3.5rem; padding-top: 1rem; border-top: 1px solid var(--line);
  font-size: 0.86rem; }
"""
