"""One file per reward; each is `fn(prompts, completions, **columns) -> list[float | None]`.

A score lies in [0, 1] where nothing else is said; a `Rubric` gives it its weight.
"""
