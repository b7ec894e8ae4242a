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

from data_pipelines import command_line
from data_pipelines.shards import write_file
from data_pipelines.text_tokenizer import shard_texts


def count_tokens(texts: Iterable[str], tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """Occurrences of each id, [V] int64; every text ends with one end of text."""
    if tokenizer.eos_token_id is None:
        raise ValueError("the text tokenizer has no end-of-text token; set its eos_token")
    size = max(tokenizer.get_vocab().values()) + 1
    counts = torch.zeros(size, dtype=torch.int64)
    for text in texts:
        ids = [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
        counts += torch.bincount(torch.tensor(ids), minlength=size)
    return counts


def main(shards: str, tokenizer: Path, out: Path) -> None:
    """Count the tokens in the texts of shards.

    Args:
        shards: Folder, path, glob, brace range or URL of the shards; their txt is read.
        tokenizer: Folder of the model's tokenizer.
        out: File for the counts.
    """
    if out.is_file():
        print(f"{out}: already written")
        return
    if not (tokenizer / "tokenizer.json").is_file():
        raise ValueError(f"tokenizer {tokenizer}: no tokenizer.json there; correct the path")
    words = PreTrainedTokenizerFast.from_pretrained(tokenizer)
    texts = tqdm(shard_texts(shards), desc="counting", unit=" texts")
    counts = count_tokens(texts, words)
    if not counts.any():
        raise ValueError(f"shards {shards}: no sample has a txt to count")
    write_file(out, partial(_save, counts))
    print(f"{out}: {int(counts.sum())} tokens, {int((counts > 0).sum())} of {len(counts)} ids")


def _save(counts: Tensor, file: BinaryIO) -> None:
    torch.save(counts, file)


if __name__ == "__main__":
    command_line.run(main)
