"""Data sets in the forms in which people have them, tiny, as their makers write them.

Each function writes one below a folder and returns what a job is given as its source. What needs a
library that is not among the requirements of the tests lies in `tests/data/forms`: `mds` is by
mosaicml-streaming 0.13.0, `img2dataset_*` by img2dataset 1.47.0, which was asked for three images
and for one that is not there.
"""

from __future__ import annotations

import base64
import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet
from backports import zstd
from PIL import Image

FORMS = Path(__file__).parents[1] / "data/forms"
COLORS = ("red", "green", "blue")
CAPTIONS = [f"a {color} field" for color in COLORS]
LINES = [{"text": f"text {number} with ü", "n": number} for number in range(3)]


def jpeg(color: str) -> bytes:
    """A JPEG file, which is another one when it is decoded and saved again."""
    file = io.BytesIO()
    Image.new("RGB", (8, 6), color).save(file, format="JPEG")
    return file.getvalue()


# ---- images with captions ------------------------------------------------------------------------


def _images(folder: Path) -> None:
    for color in COLORS:
        (folder / f"{color}.jpg").write_bytes(jpeg(color))


def imagefolder(folder: Path) -> Path:
    """With metadata.jsonl, as `datasets` documents it under "ImageFolder"."""
    _images(folder)
    rows = [{"file_name": f"{c}.jpg", "text": t} for c, t in zip(COLORS, CAPTIONS, strict=True)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def imagefolder_parquet(folder: Path) -> Path:
    """With metadata.parquet, which large sets of the Hub have."""
    _images(folder)
    columns = {"file_name": [f"{c}.jpg" for c in COLORS], "caption": CAPTIONS}
    pyarrow.parquet.write_table(pa.table(columns), folder / "metadata.parquet")
    return folder


def class_folders(folder: Path) -> Path:
    """A folder for each class, below one for each split."""
    for split, colors in (("train", COLORS[:2]), ("test", COLORS)):
        for color in colors:
            place = folder / split / f"{color}_things"
            place.mkdir(parents=True)
            (place / "1.jpg").write_bytes(jpeg(color))
    return folder


def captioned() -> datasets.Dataset:
    """A data set with a column of images."""
    rows = {
        "image": [{"bytes": jpeg(color), "path": f"{color}.jpg"} for color in COLORS],
        "caption": CAPTIONS,
        "label": [0, 1, 1],
    }
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "caption": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["warm", "cold"]),
        }
    )
    return datasets.Dataset.from_dict(rows, features=features)


def parquet(folder: Path) -> Path:
    """Images as a struct of bytes and path, as `datasets` writes them."""
    captioned().to_parquet(folder / "a.parquet")
    return folder / "a.parquet"


def hub_folder(folder: Path) -> Path:
    """A data set of the Hub, as `push_to_hub` lays it out and `hf download` fetches it."""
    (folder / "data").mkdir()
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    captioned().to_parquet(folder / "data/train-00000-of-00001.parquet")
    captioned().select([0]).to_parquet(folder / "data/test-00000-of-00001.parquet")
    return folder


def saved(folder: Path) -> Path:
    """`Dataset.save_to_disk`."""
    captioned().save_to_disk(folder / "saved")
    return folder / "saved"


def saved_splits(folder: Path) -> Path:
    """`DatasetDict.save_to_disk`."""
    splits = {"train": captioned(), "test": captioned().select([0])}
    datasets.DatasetDict(splits).save_to_disk(folder / "saved")
    return folder / "saved"


def coco(folder: Path) -> Path:
    """captions_train2017.json, with images beside it."""
    _images(folder)
    content = {
        "info": {"year": 2017},
        "licenses": [],
        "images": [
            {"license": 1, "file_name": f"{color}.jpg", "height": 6, "width": 8, "id": n}
            for n, color in enumerate(COLORS)
        ],
        "annotations": [
            {"image_id": n % 3, "id": n, "caption": CAPTIONS[n % 3] + "." * (n > 2)}
            for n in range(4)
        ],
    }
    (folder / "captions.json").write_text(json.dumps(content))
    return folder / "captions.json"


# ---- texts ---------------------------------------------------------------------------------------


def _lines() -> bytes:
    return "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in LINES).encode()


def jsonl_gz(folder: Path) -> Path:
    """JSON lines that gzip has compressed."""
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(_lines()))
    return folder / "a.jsonl.gz"


def json_gz(folder: Path) -> Path:
    """JSON lines by the name of JSON, as C4 and Dolma have them."""
    (folder / "c4-train.00000-of-01024.json.gz").write_bytes(gzip.compress(_lines()))
    return folder


def jsonl_zst(folder: Path) -> Path:
    """JSON lines in two frames of zstd, as tools that write in parallel leave them."""
    lines = _lines().splitlines(keepends=True)
    frames = [zstd.compress(part) for part in (lines[0], b"".join(lines[1:]))]
    (folder / "a.jsonl.zst").write_bytes(b"".join(frames))
    return folder / "a.jsonl.zst"


# ---- conversations -------------------------------------------------------------------------------


def llava(folder: Path) -> Path:
    """llava_v1_5_mix665k.json."""
    _images(folder)
    rows = [
        {
            "id": "000000033471",
            "image": "red.jpg",
            "conversations": [
                {"from": "human", "value": "<image>\nWhat color is it?"},
                {"from": "gpt", "value": "Red."},
                {"from": "human", "value": "And else?"},
                {"from": "gpt", "value": "Nothing."},
            ],
        },
        {
            "id": "wgByO4Y_0",
            "model": "",
            "conversations": [
                {"from": "human", "value": "Hello"},
                {"from": "gpt", "value": "Hi."},
            ],
        },
    ]
    (folder / "llava.json").write_text(json.dumps(rows))
    return folder / "llava.json"


def sharegpt(folder: Path) -> Path:
    """ShareGPT_V3_unfiltered_cleaned_split.json: a part of a long chat begins with an answer."""
    rows = [
        {
            "id": "QWJhYvA_0",
            "conversations": [
                {"from": "human", "value": "Hello"},
                {"from": "gpt", "value": "Hi."},
            ],
        },
        {
            "id": "QWJhYvA_17",
            "conversations": [
                {"from": "gpt", "value": "as I said before."},
                {"from": "human", "value": "Go on"},
                {"from": "gpt", "value": "The end."},
                {"from": "human", "value": "Thanks"},
            ],
        },
        {
            "id": "bing_0",
            "conversations": [
                {"from": "user", "value": "Hello"},
                {"from": "bing", "value": "Hello, this is Bing."},
            ],
        },
    ]
    (folder / "sharegpt.json").write_text(json.dumps(rows))
    return folder / "sharegpt.json"


def sharegpt_tools(folder: Path) -> Path:
    """ShareGPT with tools, as LLaMA-Factory documents it: tools are a JSON text."""
    tools = [{"name": "weather", "description": "Weather of a city", "parameters": {}}]
    rows = [
        {
            "conversations": [
                {"from": "human", "value": "Weather in Rome?"},
                {"from": "function_call", "value": '{"name": "weather", "arguments": {"q": 1}}'},
                {"from": "observation", "value": '{"sky": "clear"}'},
                {"from": "gpt", "value": "Clear."},
            ],
            "system": "Be brief.",
            "tools": json.dumps(tools),
        }
    ]
    (folder / "tools.json").write_text(json.dumps(rows))
    return folder / "tools.json"


def openai(folder: Path) -> Path:
    """OpenAI's files for fine-tuning: an image is a data URL, and answers have weights."""
    url = "data:image/jpeg;base64," + base64.b64encode(jpeg("red")).decode()
    asked = [
        {"type": "text", "text": "What is this?"},
        {"type": "image_url", "image_url": {"url": url, "detail": "low"}},
    ]
    rows = [
        {
            "messages": [
                {"role": "system", "content": "You are terse."},
                {"role": "user", "content": asked},
                {"role": "assistant", "content": "Red.", "weight": 0},
                {"role": "user", "content": "Again"},
                {"role": "assistant", "content": "Red.", "weight": 1},
            ]
        },
        {
            "messages": [
                {"role": "developer", "content": "Be kind."},
                {"role": "user", "content": "Hello"},
                {"role": "assistant", "content": [{"type": "text", "text": "Hello!"}]},
            ]
        },
    ]
    (folder / "openai.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / "openai.jsonl"


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Weather of a city",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]


def openai_tools(folder: Path) -> Path:
    """Two calls at once and their results, as the chat completions API has them."""
    calls = [
        {
            "id": f"call_{city}",
            "type": "function",
            "function": {"name": "weather", "arguments": json.dumps({"city": city})},
        }
        for city in ("Rome", "Oslo")
    ]
    rows = [
        {
            "messages": [
                {"role": "user", "content": "Rome or Oslo?"},
                {"role": "assistant", "content": None, "tool_calls": calls},
                {"role": "tool", "tool_call_id": "call_Rome", "content": "clear"},
                {"role": "tool", "tool_call_id": "call_Oslo", "content": "snow"},
                {"role": "assistant", "content": "Rome."},
            ],
            "tools": TOOLS,
            "parallel_tool_calls": True,
        }
    ]
    (folder / "tools.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / "tools.jsonl"


def openai_preferences(folder: Path) -> Path:
    """OpenAI's files for preference tuning."""
    rows = [
        {
            "input": {
                "messages": [{"role": "user", "content": "Hello"}],
                "tools": [],
                "parallel_tool_calls": True,
            },
            "preferred_output": [{"role": "assistant", "content": "Hello!"}],
            "non_preferred_output": [{"role": "assistant", "content": "What?"}],
        }
    ]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / "pairs.jsonl"


def trl_vision(folder: Path) -> Path:
    """Messages whose pieces are structs, so that an image has an empty text; images beside them."""
    text = {"type": "text", "text": "What is it?"}
    rows = [
        {
            "images": [{"bytes": jpeg("red"), "path": None}],
            "messages": [
                {"role": "user", "content": [{"type": "image", "text": None}, text]},
                {"role": "assistant", "content": [{"type": "text", "text": "Red."}]},
            ],
        }
    ]
    table = datasets.Dataset.from_list(rows)
    table = table.cast_column("images", datasets.List(datasets.Image()))
    table.to_parquet(folder / "a.parquet")
    return folder / "a.parquet"


def trl_vision_plain(folder: Path) -> Path:
    """A prompt and its completion that do not say where the image is: TRL puts it first."""
    rows = [
        {
            "image": {"bytes": jpeg("red"), "path": None},
            "prompt": [{"role": "user", "content": "What is it?"}],
            "completion": [{"role": "assistant", "content": "Red."}],
        }
    ]
    datasets.Dataset.from_list(rows).cast_column("image", datasets.Image()).to_parquet(
        folder / "a.parquet"
    )
    return folder / "a.parquet"


# ---- interleaved ---------------------------------------------------------------------------------

PAGE = "http://127.0.0.1:8765"  # where img2dataset fetched the images of `tests/data/forms`


def obelics(folder: Path) -> Path:
    """HuggingFaceM4/OBELICS: of an image and a text in one place, one is None."""
    rows = [
        {
            "images": [f"{PAGE}/red.jpg", None, f"{PAGE}/gone.jpg", None, f"{PAGE}/blue.jpg"],
            "metadata": json.dumps([{"src": "red.jpg"}, None, {}, None, {}]),
            "general_metadata": json.dumps({"url": PAGE}),
            "texts": [None, "First.\n\nStill first.", None, "Second.", None],
        },
        {
            "images": [f"{PAGE}/gone.jpg", None],
            "metadata": "[]",
            "general_metadata": "{}",
            "texts": [None, "Alone."],
        },
    ]
    datasets.Dataset.from_list(rows).to_parquet(folder / "obelics.parquet")
    return folder / "obelics.parquet"


def mmc4(folder: Path) -> Path:
    """docs_no_face_shard_0_v3.jsonl: each image has the number of its sentence."""
    rows: list[dict[str, Any]] = [
        {
            "url": PAGE,
            "text_list": ["First.", "Second.", "Third."],
            "image_info": [
                {
                    "image_name": "b9040a0dbb22.jpg",
                    "raw_url": f"{PAGE}/blue.jpg",
                    "matched_text_index": 2,
                    "matched_sim": 0.3,
                },
                {
                    "image_name": "db1c21bc8474.jpg",
                    "raw_url": f"{PAGE}/red.jpg",
                    "matched_text_index": 0,
                    "matched_sim": 0.25,
                },
            ],
            "similarity_matrix": [[0.1, 0.2, 0.3], [0.25, 0.2, 0.1]],
            "could_have_url_duplicate": 0,
        }
    ]
    (folder / "docs_no_face_shard_0_v3.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / "docs_no_face_shard_0_v3.jsonl"


def mds(name: str) -> Callable[[Path], Path]:
    """MosaicML's streaming shards; `name` is how they are compressed."""
    return lambda _: FORMS / "mds" / name


def img2dataset(name: str) -> Callable[[Path], Path]:
    """What img2dataset leaves, by its `output_format`."""
    return lambda _: FORMS / f"img2dataset_{name}"
