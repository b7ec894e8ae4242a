"""Job: texts of shards -> how often each token occurs, for the Spindle process.

python -m data_pipelines.token_frequencies --shards data/text/train --tokenizer runs/bert \
    --out runs/bert/frequencies.pt
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from data_pipelines.jobs.origin import Given, file_state, is_done
from data_pipelines.jobs.report import Report
from data_pipelines.jobs.sole_writer import sole_writer
from data_pipelines.shards.shards import expand_urls, write_json
from data_pipelines.sources.source import letters_of
from data_pipelines.text_tokenizer import shard_texts
from mmdlm.atomic_files import atomic_write
from mmdlm.cli import recipe as command_line
from mmdlm.models.special_tokens import of_text_only


def count_tokens(texts: Iterable[str], tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """Occurrences of each id, [V] int64; every text ends with one end of text."""
    if tokenizer.eos_token_id is None:
        raise ValueError("the text tokenizer has no end-of-text token; set its eos_token")
    size = max(tokenizer.get_vocab().values()) + 1
    counts = torch.zeros(size, dtype=torch.int64)
    for text in texts:
        ids = [*letters_of(text, tokenizer), tokenizer.eos_token_id]
        counts += torch.bincount(torch.tensor(ids), minlength=size)
    return counts


@partial(sole_writer, is_file=True)
def main(
    shards: str | list[str],
    tokenizer: Path,
    out: Path,
    *,
    max_broken: float = 0.01,
    allow_pipe: bool = False,
) -> None:
    """Count the tokens in the texts of shards.

    Args:
        shards: Folder, path, glob, brace range or URL of the shards; their txt is read, or the
            messages of conversations and pairs.
        tokenizer: Folder of the model's tokenizer.
        out: File for the counts; a .json beside it says of what they are.
        max_broken: Share of broken samples that are left out and listed; more stop the job.
        allow_pipe: Run the commands of shards that are given as pipe:COMMAND.
    """
    if not (tokenizer / "tokenizer.json").is_file():
        raise ValueError(f"tokenizer {tokenizer}: no tokenizer.json there; correct the path")
    urls, index = expand_urls(shards, allow_pipe=allow_pipe), out.with_name(f"{out.name}.json")
    settings = {"tokenizer": file_state(str(tokenizer / "tokenizer.json"))["sha256"]}
    given = Given.shards(urls)
    if is_done(out, settings, given, index=index):
        return
    words = of_text_only(PreTrainedTokenizerFast.from_pretrained(tokenizer))
    states, report = given.states(), Report(max_broken)
    texts = tqdm(shard_texts(urls, report=report), desc="counting", unit=" texts")
    counts = count_tokens(texts, words)
    if not counts.any():
        raise ValueError(f"shards {shards}: no sample has a txt to count")
    write_json(index, {"settings": settings, "given": states, "report": report.to_dict()})
    atomic_write(out, partial(_save, counts))
    print(f"{out}: {int(counts.sum())} tokens, {int((counts > 0).sum())} of {len(counts)} ids")
    print(report)


def _save(counts: Tensor, file: BinaryIO) -> None:
    torch.save(counts, file)


if __name__ == "__main__":
    command_line.run(main)
