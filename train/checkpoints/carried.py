"""What trained weights carry beside themselves: a chat template, and how each task is decoded."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from data_pipelines.sources.conversations import Conversation
from data_pipelines.sources.source import Source
from mmdlm.models.checkpoints.run_steps import parts_of
from mmdlm.pipeline.task_defaults import GENERATION, Defaults
from mmdlm.templates.prompt_template import PromptTemplate
from mmdlm.vision.checkpoint_files import read_json


def with_chat_template(
    tokenizer: PreTrainedTokenizerFast, prompt_template: PromptTemplate, sources: Iterable[Source]
) -> PreTrainedTokenizerFast:
    """Return the tokenizer with the layout's chat template where it needs one and has none.

    Conversations need one. Ids stay as they are.
    """
    spoken = any(
        isinstance(source.to_sequence, Conversation) and source.to_sequence.template
        for source in sources
    )
    if not spoken or prompt_template.chat_template is None or tokenizer.chat_template is not None:
        return tokenizer
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = prompt_template.chat_template
    return tokenizer


def generation_of(
    prompt_template: PromptTemplate,
    start_from: Path | None,
    generation_config: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Return what trained weights carry as generation_config.json.

    The decoding that the layout records, then that of the model started from, then the recipe's:
    later ones win, value by value.

    Args:
        prompt_template: Of the model.
        start_from: Folder of the model that the run starts from, if any.
        generation_config: The recipe's.

    Returns:
        Values by key.

    Raises:
        ValueError: For an unknown key, a bad value, and a class of one's own.
    """
    file = None if start_from is None else parts_of(start_from) / GENERATION
    before = read_json(file) if file is not None and file.is_file() else {}
    merged: dict[str, Any] = {}
    for given in (prompt_template.recorded, before, generation_config or {}):
        for name, value in given.items():
            old = merged.get(name)
            if isinstance(old, Mapping) and isinstance(value, Mapping):
                value = {**old, **value}
            merged[name] = value
    defaults_of(prompt_template, merged).to_json()  # they check
    return merged


def defaults_of(prompt_template: PromptTemplate, generation: Mapping[str, Any]) -> Defaults:
    """Return what a model does unless told otherwise, as if it were loaded with this file."""
    try:
        return Defaults().updated(prompt_template.generation).updated(generation)
    except ValueError as error:
        raise ValueError(f"generation_config: {error}") from error
