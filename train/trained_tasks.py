"""What a model was trained for, by the data of its recipe: its checkpoint records it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice

from transformers import PreTrainedTokenizerFast

from data_pipelines.shards.shards import BrokenShard, Sample, Unreachable, read_shard
from data_pipelines.sources.source import Source
from mmdlm.models.auto import PretrainedDenoiser
from mmdlm.templates.native import ABOUT_IMAGES, Native
from mmdlm.templates.prompt_template import PromptTemplate

# Methods of `mmdlm.pipeline.model.Model`, in the order in which they are recorded.
TASKS = (
    *("caption", "text_to_image", "inpaint", "infill", "complete"),
    *("answer", "chat", "edit", ABOUT_IMAGES),
)
SHARDS, SAMPLES = 8, 64  # of a source: so many of each of so many shards are looked at


def record_tasks(
    denoiser: PretrainedDenoiser,
    prompt_template: PromptTemplate,
    words: PreTrainedTokenizerFast,
    sources: Sequence[Source],
    *,
    is_new: bool,
) -> None:
    """Write into the config of a model what it will have been trained for.

    That is what the data teach, and what the model could do before; nothing for a family of
    published models, which is known for its tasks, and where a source of one's own does not say
    what it teaches.

    Args:
        denoiser: The model.
        prompt_template: Of its tasks.
        words: Its text tokenizer, as it was before: a model that records nothing could talk where
            it has a chat template.
        sources: The data, some of which are looked at.
        is_new: Whether the weights are random, so that it could do nothing before.
    """
    if not isinstance(prompt_template, Native):
        return
    before = () if is_new else denoiser.config.trained_tasks
    if before is None:
        before = prompt_template.tasks_with(words)
    taught = [source.to_sequence.teaches(some_samples(source)) for source in sources]
    known = {*before}.union(*(one for one in taught if one is not None))
    complete = None not in taught
    denoiser.config.trained_tasks = [one for one in TASKS if one in known] if complete else None


def some_samples(source: Source) -> Iterator[Sample]:
    """Yield samples from several places of a source; what is broken the loader reports."""
    urls = source.shards()
    for number in range(min(SHARDS, len(urls))):
        try:
            yield from islice(read_shard(urls[number * len(urls) // SHARDS]), SAMPLES)
        except (BrokenShard, Unreachable):
            continue
