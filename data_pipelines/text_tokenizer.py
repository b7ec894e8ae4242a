"""Job: texts of shards -> a byte-level BPE tokenizer that transformers reads.

python -m data_pipelines.text_tokenizer --shards data/emoji/train --out data/emoji/text_tokenizer
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import BinaryIO

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from data_pipelines.jobs.origin import Given, is_done
from data_pipelines.jobs.report import Report
from data_pipelines.jobs.shard_job import sample_name, whole_samples
from data_pipelines.jobs.sole_writer import sole_writer
from data_pipelines.shards.sample_stats import one_line
from data_pipelines.shards.shards import INDEX, BrokenShard, Sample, expand_urls, write_json
from data_pipelines.sources.messages import SAID, message_of
from data_pipelines.sources.source import BROKEN_CONTENT, letters_of
from data_pipelines.sources.text_files import decoded, parsed
from mmdlm.atomic_files import atomic_write
from mmdlm.cli import recipe as command_line

END_OF_TEXT = "<|endoftext|>"
MOST_IDS = 10**7  # beyond which the trainer takes room for more than memory holds, and dies


def train_text_tokenizer(
    texts: Iterable[str], *, size: int = 2048, space_before: bool = True
) -> PreTrainedTokenizerFast:
    """Byte-level BPE with at most `size` ids; 0 is the end of text, any text decodes to itself.

    With `space_before` a text starts as if after a space, so that a word is the same tokens
    wherever it stands. 257 ids are the bytes and the end of text: every character for itself.
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if size > MOST_IDS:
        raise ValueError(f"size {size}: a tokenizer has at most {MOST_IDS:,} ids")
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


def token_counts(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[int]:
    """Count the tokens of each text as it is learned, its end left out; see `letters_of`."""
    if not texts:
        return []
    found = tokenizer(texts, add_special_tokens=False, split_special_tokens=True)
    return [len(ids) for ids in found["input_ids"]]


def shortened(tokenizer: PreTrainedTokenizerFast, text: str, most: int) -> str:
    """Cut a text to so many tokens at most."""
    ids, count = letters_of(text, tokenizer), most
    while len(ids) > most:
        # A token may end within a character, and what is left of a text may be other tokens.
        text = tokenizer.decode(ids[:count]).rstrip("\N{REPLACEMENT CHARACTER}").rstrip()
        ids, count = letters_of(text, tokenizer), count - 1
    return text


def shard_texts(urls: list[str], *, report: Report) -> Iterator[str]:
    """Yield the txt of every sample of the shards, or else the messages of its conversation.

    What has no text is counted in the report. Raises ValueError for a damaged shard.
    """
    for url in urls:
        try:
            for sample in whole_samples(url):
                yield from _counted(sample, report)
        except BrokenShard as error:
            raise ValueError(f"{url}: {error}; write or copy it again") from None


def _counted(sample: Sample, report: Report) -> list[str]:
    report.read += 1
    name = sample_name(sample)
    try:
        texts = _texts_of(sample)
    except BROKEN_CONTENT as error:
        report.add_broken(name, one_line(error))
        return []
    if texts:
        report.written += 1
    else:
        report.leave_out(name, "it has no txt, and no messages")
    return texts


def _texts_of(sample: Sample) -> list[str]:
    if "txt" in sample:
        return [decoded(sample["txt"])]
    content = parsed(sample["json"]) if "json" in sample else None
    if not isinstance(content, dict):
        return []
    pieces = chain.from_iterable(
        content[name] if isinstance(content[name], list) else [content[name]]
        for name in SAID
        if content.get(name)
    )
    return [piece if isinstance(piece, str) else message_of(piece).text for piece in pieces]


@sole_writer
def main(
    shards: str | list[str],
    out: Path,
    *,
    size: int = 2048,
    space_before: bool = True,
    max_broken: float = 0.01,
    allow_pipe: bool = False,
) -> None:
    """Train a byte-level BPE tokenizer on the texts of shards.

    Args:
        shards: Folder, path, glob, brace range or URL of the shards; their txt is read, or the
            messages of conversations and pairs.
        out: Folder for tokenizer.json and tokenizer_config.json.
        size: Number of ids, the end of text and the 256 bytes among them; 257 is a token for each
            byte.
        space_before: Read a text as if a space came before it, so that its first word is the token
            that it is elsewhere; texts without spaces are better off without.
        max_broken: Share of broken samples that are left out and listed; more stop the job.
        allow_pipe: Run the commands of shards that are given as pipe:COMMAND.
    """
    urls = expand_urls(shards, allow_pipe=allow_pipe)
    settings = {"size": size, "space_before": space_before}
    given = Given.shards(urls)
    if is_done(out / "tokenizer.json", settings, given, index=out / INDEX):
        return
    states, report = given.states(), Report(max_broken)
    texts = list(tqdm(shard_texts(urls, report=report), desc="reading texts", unit=" texts"))
    if not texts:
        raise ValueError(f"shards {shards}: no sample has a txt, or messages, to train on")
    tokenizer = train_text_tokenizer(texts, size=size, space_before=space_before)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        record = {"settings": settings, "given": states, "report": report.to_dict()}
        write_json(out / INDEX, record)
        # tokenizer.json last: where it is, the folder is whole
        for name in ("tokenizer_config.json", "tokenizer.json"):
            atomic_write(out / name, partial(_copy, Path(folder) / name))
    print(f"{out}: {len(tokenizer)} ids from {len(texts)} texts")
    print(report)


def _copy(path: Path, file: BinaryIO) -> None:
    file.write(path.read_bytes())


if __name__ == "__main__":
    command_line.run(main)
