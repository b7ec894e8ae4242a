"""Job: texts of shards -> a byte-level BPE tokenizer that transformers reads.

python -m data_pipelines.text_tokenizer --shards data/emoji/train --out data/emoji/text_tokenizer
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import BinaryIO

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from data_pipelines import command_line
from data_pipelines.shards import expand_urls, read_shard, write_file

END_OF_TEXT = "<|endoftext|>"


def train_text_tokenizer(
    texts: Iterable[str], *, size: int = 2048, space_before: bool = True
) -> PreTrainedTokenizerFast:
    """Byte-level BPE with at most `size` ids; 0 is the end of text, any text decodes to itself.

    With `space_before` a text starts as if after a space, so that a word is the same tokens
    wherever it stands. 257 ids are the bytes and the end of text: every character for itself.
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if size < len(alphabet) + 1:
        raise ValueError(f"size {size}: a byte-level tokenizer needs at least {len(alphabet) + 1}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=space_before)
    strip = [decoders.Strip(content=" ", left=1, right=0)] if space_before else []
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), *strip])
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(alphabet),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END_OF_TEXT, clean_up_tokenization_spaces=False
    )


def shard_texts(shards: str | Path | list[str]) -> Iterator[str]:
    """The txt of every sample of the shards, and the messages of every conversation."""
    for url in expand_urls(shards):
        for sample in read_shard(url):
            if "txt" in sample:
                yield sample["txt"].decode()
            elif "json" in sample:
                for message in json.loads(sample["json"]).get("messages", []):
                    yield message["content"]


def main(shards: str, out: Path, *, size: int = 2048, space_before: bool = True) -> None:
    """Train a byte-level BPE tokenizer on the texts of shards.

    Args:
        shards: Folder, path, glob, brace range or URL of the shards; their txt is read, or the
            messages of conversations.
        out: Folder for tokenizer.json and tokenizer_config.json.
        size: Number of ids, the end of text and the 256 bytes among them; 257 is a token for each
            byte.
        space_before: Read a text as if a space came before it, so that its first word is the token
            that it is elsewhere; texts without spaces are better off without.
    """
    if (out / "tokenizer.json").is_file():
        print(f"{out}: already written")
        return
    texts = list(tqdm(shard_texts(shards), desc="reading texts", unit=" texts"))
    if not texts:
        raise ValueError(f"shards {shards}: no sample has a txt, or messages, to train on")
    tokenizer = train_text_tokenizer(texts, size=size, space_before=space_before)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        # tokenizer.json last: where it is, the folder is whole
        for name in ("tokenizer_config.json", "tokenizer.json"):
            write_file(out / name, partial(_copy, Path(folder) / name))
    print(f"{out}: {len(tokenizer)} ids from {len(texts)} texts")


def _copy(path: Path, file: BinaryIO) -> None:
    file.write(path.read_bytes())


if __name__ == "__main__":
    command_line.run(main)
