"""The hooks of mkdocs: pages made of code and data at build time, and equations as MathML."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from docs._generate import (  # noqa: E402 - a hook is loaded by its path
    api,
    benchmarks,
    command_line,
    departures,
    files_page,
    formats,
    log_keys,
    mathml,
    published_scores,
)

MEDIA = ROOT / ".github" / "media"  # images that the README shows as well


def on_config(config: Any) -> Any:
    """Put the pages that are made into the navigation."""
    _replace(config.nav, "API", api.navigation())
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are made."""
    made = {
        **api.pages(),
        **command_line.pages(),
        **benchmarks.pages(),
        "reference/files.md": files_page.page(),
        "reference/log-keys.md": log_keys.page(),
        "reference/published-scores.md": published_scores.page(),
    }
    for place, text in made.items():
        files.append(File.generated(config, place, content=text))
    for image in sorted(MEDIA.iterdir()):
        files.append(File.generated(config, f"assets/{image.name}", abs_src_path=str(image)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Fill in what the code and the files say."""
    made = {
        "explanation/departures.md": departures.page,
        "reference/formats.md": formats.page,
    }
    return made.get(page.file.src_uri, str)(markdown)


def on_page_content(html: str, page: Any, config: Any, files: Files) -> str:
    """Turn equations into MathML."""
    return mathml.with_mathml(html)


def on_post_build(config: Any) -> None:
    """Leave no Python caches beside the pages."""
    shutil.rmtree(Path(config.site_dir) / "_generate", ignore_errors=True)


def _replace(nav: Any, title: str, pages: list[Any]) -> None:
    for entry in nav if isinstance(nav, list) else []:
        for name, below in entry.items() if isinstance(entry, dict) else ():
            if name == title:
                entry[name] = pages
            else:
                _replace(below, title, pages)
