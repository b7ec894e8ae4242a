"""Jobs that write rows of data sets as shards: texts, images with captions, conversations ..."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_pipelines.jobs.origin import Given, is_done
from data_pipelines.jobs.report import Report
from data_pipelines.jobs.sole_writer import sole_writer
from data_pipelines.jobs.write_splits import check_edge, write_splits
from data_pipelines.shards.shards import INDEX, Sample
from data_pipelines.sources.captioned_rows import CaptionedRows, captioned_samples
from data_pipelines.sources.conversation_files import Columns, conversation_samples
from data_pipelines.sources.image_set import scaled_samples
from data_pipelines.sources.interleaved_rows import InterleavedRows, interleaved_samples
from data_pipelines.sources.local_files import files_below
from data_pipelines.sources.preferences import PairColumns
from data_pipelines.sources.row_files import BrokenRow, Row
from data_pipelines.sources.row_images import Images
from data_pipelines.sources.rows import local_files, other_splits, rows_of
from data_pipelines.sources.source import IMAGES
from data_pipelines.sources.text import text_samples
from mmdlm.templates.conversation import IMAGE

Rows = Iterator[Row | BrokenRow]


@sole_writer
def dataset(
    source: str,
    out: Path,
    *,
    image: str | None = None,
    text: str | None = None,
    images: Path | None = None,
    size: int | None = None,
    allow_outside: bool = False,
    split: str = "train",
    subset: str | None = None,
    max_broken: float = 0.01,
    samples_per_shard: int = 1000,
) -> None:
    """Pack images with captions of a data set: files, MDS, `save_to_disk`, the Hugging Face Hub.

    An image is a file in a column (bytes, or the struct of `datasets`), a path, base64, or a URL
    that img2dataset has fetched. The other columns become json. Numbers of classes become their
    names where the data set has these.

    Args:
        source: A .parquet, .arrow, .jsonl, .json or .csv file, also compressed (.gz, .zst ...); a
            folder of them, of MDS or of `save_to_disk`; or OWNER/NAME on the Hub.
        out: Folder for the shards.
        image: Column of the images; default: image, img, jpg, png, webp, image_path or file_name.
        text: Column of the captions, or a template such as "{title}: {text}"; default: text,
            caption, captions, prompt or label.
        images: Folder that paths of images begin in, or the output of img2dataset for URLs;
            default: the folder where the job runs.
        size: Scale each image to a square of so many pixels, padded with white; default: pack the
            files as they are.
        allow_outside: Read images whose path leads out of the folder `images`; only for data that
            you trust.
        split: Of a data set with several, by the names of its files where they lie here.
        subset: Of a data set on the Hub; default: its own.
        max_broken: Share of rows that may be left out as broken; more stop the job.
        samples_per_shard: Samples in one shard; a shard also ends at 1 GiB.
    """
    if size is not None:
        check_edge(size)
    read = Images(images, IMAGE, allow_outside)

    def samples(rows: Rows, report: Report) -> Iterable[Sample]:
        columns = CaptionedRows(image, text, read)
        found = captioned_samples(rows, columns, source=source, report=report)
        return found if size is None else scaled_samples(found, size=size, report=report)

    _write_rows(
        source,
        out,
        samples,
        {"source": "dataset", "of": source, "column": image, "text": text, "size": size},
        images=read,
        split=split,
        subset=subset,
        max_broken=max_broken,
        samples_per_shard=samples_per_shard,
    )


@sole_writer
def text(
    source: str,
    out: Path,
    *,
    field: str = "text",
    split: str = "train",
    subset: str | None = None,
    max_broken: float = 0.01,
    samples_per_shard: int = 10000,
) -> None:
    """Pack the texts of a data set: JSON lines, parquet, MDS, `save_to_disk`, the Hugging Face Hub.

    Args:
        source: A .jsonl, .json, .csv, .parquet or .arrow file, also compressed (.gz, .zst ...); a
            folder of them, of MDS or of `save_to_disk`; or OWNER/NAME on the Hub.
        out: Folder for the shards.
        field: Name of the text in a row.
        split: Of a data set with several, by the names of its files where they lie here.
        subset: Of a data set on the Hub; default: its own.
        max_broken: Share of rows that may be left out as broken; more stop the job.
        samples_per_shard: Samples in one shard; a shard also ends at 1 GiB.
    """
    _write_rows(
        source,
        out,
        lambda rows, report: text_samples(rows, source=source, report=report, field=field),
        {"source": "text", "of": source, "field": field},
        images=Images(),
        split=split,
        subset=subset,
        max_broken=max_broken,
        samples_per_shard=samples_per_shard,
    )


@sole_writer
def interleaved(
    source: str,
    out: Path,
    *,
    images: Path | None = None,
    image: str = IMAGE,
    allow_outside: bool = False,
    split: str = "train",
    subset: str | None = None,
    max_broken: float = 0.01,
    samples_per_shard: int = 1000,
) -> None:
    """Pack documents with images between their texts: OBELICS, MMC4, or marks in a text.

    A row has texts and images of one length, of which one is None in each place (OBELICS);
    text_list and image_info (MMC4); or text with marks, and images. An image that is not in
    `images` is left out of its document and counted; a document that has lost all of its images is
    left out.

    Args:
        source: A .parquet, .arrow, .jsonl, .json or .csv file, also compressed (.gz, .zst, .zip
            ...); a folder of them, of MDS or of `save_to_disk`; or OWNER/NAME on the Hub.
        out: Folder for the shards.
        images: Output of img2dataset for the URLs of images, or the folder that their names begin
            in; default: the folder where the job runs.
        image: Mark of an image in a text.
        allow_outside: Read images whose path leads out of the folder `images`; only for data that
            you trust.
        split: Of a data set with several, by the names of its files where they lie here.
        subset: Of a data set on the Hub; default: its own.
        max_broken: Share of rows that may be left out as broken; more stop the job.
        samples_per_shard: Samples in one shard; a shard also ends at 1 GiB.
    """
    read = Images(images, image, allow_outside)
    _write_rows(
        source,
        out,
        lambda rows, report: interleaved_samples(
            rows, InterleavedRows(read), source=source, report=report
        ),
        {"source": "interleaved", "of": source},
        images=read,
        split=split,
        subset=subset,
        max_broken=max_broken,
        samples_per_shard=samples_per_shard,
    )


@sole_writer
def conversations(
    source: str,
    out: Path,
    *,
    images: Path | None = None,
    prompt: str | None = None,
    completion: str | None = None,
    system: str = "",
    image: str = IMAGE,
    allow_outside: bool = False,
    split: str = "train",
    subset: str | None = None,
    max_broken: float = 0.01,
    samples_per_shard: int = 1000,
) -> None:
    """Pack conversations, with their images, of files or a data set of the Hugging Face Hub.

    A row has messages (role, content), conversations (from, value) or prompt and completion, and
    may have image or images. A column system (or system_prompt) is the system message, and answers
    with weight 0 are context. Rows that cannot be used are counted, listed and left out.

    Args:
        source: A .jsonl, .json, .csv, .parquet or .arrow file, also compressed (.gz, .zst ...); a
            folder of them, of MDS or of `save_to_disk`; or OWNER/NAME on the Hub.
        out: Folder for the shards.
        images: Folder that the paths of images begin in, or the output of img2dataset for URLs;
            default: the folder where the job runs.
        prompt: Column, or template over columns such as "{question} Think.", of the question.
        completion: Column, or template over columns, of its answer.
        system: System message of rows that have none.
        image: Mark of an image in a text.
        allow_outside: Read images whose path leads out of the folder `images`; only for data that
            you trust.
        split: Of a data set with several, by the names of its files where they lie here.
        subset: Of a data set on the Hub; default: its own.
        max_broken: Share of rows that may be left out; more stop the job.
        samples_per_shard: Samples in one shard; a shard also ends at 1 GiB.
    """
    read = Images(images, image, allow_outside)
    _write_rows(
        source,
        out,
        lambda rows, report: conversation_samples(
            rows, Columns(prompt, completion, system, read), source=source, report=report
        ),
        {
            "source": "conversations",
            "of": source,
            "prompt": prompt,
            "completion": completion,
            "system": system,
        },
        images=read,
        split=split,
        subset=subset,
        max_broken=max_broken,
        samples_per_shard=samples_per_shard,
    )


@sole_writer
def preferences(
    source: str,
    out: Path,
    *,
    images: Path | None = None,
    prompt: str = "prompt",
    chosen: str = "chosen",
    rejected: str = "rejected",
    image: str = IMAGE,
    allow_outside: bool = False,
    split: str = "train",
    subset: str | None = None,
    max_broken: float = 0.01,
    samples_per_shard: int = 1000,
) -> None:
    """Pack pairs of answers, of which one is preferred, of files or a data set of the Hub.

    A row has prompt, chosen and rejected, each a text or messages (role, content), as data sets of
    TRL do; or chosen and rejected as whole conversations. Rows that cannot be used are counted,
    listed and left out.

    Args:
        source: A .jsonl, .json, .csv, .parquet or .arrow file, also compressed (.gz, .zst ...); a
            folder of them, of MDS or of `save_to_disk`; or OWNER/NAME on the Hub.
        out: Folder for the shards.
        images: Folder that the paths of images begin in, or the output of img2dataset for URLs;
            default: the folder where the job runs.
        prompt: Column of the prompt.
        chosen: Column of the answer that is preferred.
        rejected: Column of the other answer.
        image: Mark of an image in a text.
        allow_outside: Read images whose path leads out of the folder `images`; only for data that
            you trust.
        split: Of a data set with several, by the names of its files where they lie here.
        subset: Of a data set on the Hub; default: its own.
        max_broken: Share of rows that may be left out; more stop the job.
        samples_per_shard: Samples in one shard; a shard also ends at 1 GiB.
    """
    read = Images(images, image, allow_outside)
    _write_rows(
        source,
        out,
        lambda rows, report: conversation_samples(
            rows, PairColumns(prompt, chosen, rejected, read), source=source, report=report
        ),
        {
            "source": "preferences",
            "of": source,
            "prompt": prompt,
            "chosen": chosen,
            "rejected": rejected,
        },
        images=read,
        split=split,
        subset=subset,
        max_broken=max_broken,
        samples_per_shard=samples_per_shard,
    )


def _write_rows(
    source: str,
    out: Path,
    samples: Callable[[Rows, Report], Iterable[Sample]],
    settings: dict[str, Any],
    *,
    images: Images,
    split: str,
    subset: str | None,
    max_broken: float,
    samples_per_shard: int,
) -> None:
    """Write what `samples` makes of the rows of files or of a data set."""
    folder, mark = images.folder, images.mark
    settings = {
        **settings,
        "images": folder and str(folder),
        "image": mark,
        "allow_outside": images.allow_outside,
        "split": split,
        "subset": subset,
        "samples_per_shard": samples_per_shard,
    }
    files = {str(path): str(path) for path in local_files(source, split=split)}
    given = Given(files, {} if folder is None else {str(folder): _images_in(folder)})
    if is_done(out / INDEX, settings, given):
        return
    if said := other_splits(source, split=split):
        print(said)
    report = Report(max_broken)
    rows = rows_of(source, split=split, subset=subset)
    bar = tqdm(samples(rows, report), desc="packing", unit=" samples")
    write_splits({"": bar}, out, settings, given, report)


def _images_in(folder: Path) -> list[Path]:
    return files_below(folder, [*(f".{one}" for one in IMAGES), ".tar"])
