"""OpenAI's API as the official client sees it, over a real port."""

from __future__ import annotations

import base64
import io
import json
import logging
import re
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2 as httpx
import openai
import pytest
from openai import OpenAI
from PIL import Image

from mmdlm.pipeline.model import Model
from mmdlm.templates.llada_v import LladaV
from mmdlm.templates.lumina import Lumina
from tests.core.fakes import rng
from tests.pipeline.test_published_families import model_of
from tests.serving.conftest import Serve
from tests.serving.test_step_batcher import with_order

HOLES = "woman [MASK:4] skin tone"


def picture(color: str = "red", size: tuple[int, int] = (64, 64)) -> Image.Image:
    return Image.new("RGB", size, color)


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def data_url(image: Image.Image) -> str:
    return "data:image/png;base64," + base64.b64encode(png(image)).decode()


def shown(*urls: str, text: str = "") -> list[Any]:
    parts: list[Any] = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    if text:
        parts.append({"type": "text", "text": text})
    return [{"role": "user", "content": parts}]


def opened(b64: str | None) -> Image.Image:
    assert b64
    return Image.open(io.BytesIO(base64.b64decode(b64))).convert("RGB")


# --- what is served -----------------------------------------------------------------------------


def test_the_model_is_listed(client: OpenAI) -> None:
    (model,) = client.models.list().data
    assert model.id == "emoji"
    assert "infill" in model.model_extra["tasks"]  # type: ignore[index]
    assert client.models.retrieve("emoji").id == "emoji"
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt' here"):
        client.models.retrieve("gpt")


def test_a_suffix_is_met(client: OpenAI, emoji: Model) -> None:
    found = client.completions.create(
        model="emoji", prompt="woman ", suffix=" skin tone", max_tokens=4, n=2, seed=3, logprobs=0
    )
    expected = emoji.infill(["woman [MASK:4] skin tone"] * 2, generator=[rng(3), rng(4)])
    assert [f"woman {one.text} skin tone" for one in found.choices] == expected
    first = found.choices[0]
    assert first.finish_reason == "stop"
    assert first.logprobs is not None
    assert first.logprobs.tokens is not None
    assert "".join(first.logprobs.tokens).strip() == first.text.strip()
    assert all(value is not None and value <= 0 for value in first.logprobs.token_logprobs or [1])
    assert found.usage is not None
    assert found.usage.completion_tokens == 8


def test_a_text_goes_on(client: OpenAI, emoji: Model) -> None:
    found = client.completions.create(
        model="emoji", prompt="woman", max_tokens=6, echo=True, seed=0, temperature=1, top_p=0.5
    )
    assert found.choices[0].text.startswith("woman")
    again = client.completions.create(
        model="emoji", prompt="woman", max_tokens=6, seed=0, temperature=1, top_p=0.5
    )
    assert "woman" + again.choices[0].text == found.choices[0].text
    plain = client.completions.create(model="emoji", prompt="woman", max_tokens=6, seed=0)
    assert plain.choices[0].text == emoji.complete("woman", max_new_tokens=6)


def test_holes_in_a_prompt_are_filled(client: OpenAI, emoji: Model) -> None:
    found = client.completions.create(model="emoji", prompt=HOLES, seed=0)
    assert found.choices[0].text == emoji.infill(HOLES)


def test_a_stream_is_the_same_text(client: OpenAI) -> None:
    asked: dict[str, Any] = {"model": "emoji", "prompt": HOLES, "seed": 5}
    whole = client.completions.create(**asked).choices[0]
    chunks = list(
        client.completions.create(
            **asked,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"stream_canvas": True},
        )
    )
    *texts, last = chunks
    assert "".join(one.choices[0].text for one in texts) == whole.text
    assert texts[-1].choices[0].finish_reason == "stop"
    assert last.usage is not None
    canvases = [one.model_extra["mmdlm"] for one in texts]  # type: ignore[index]
    assert [one["step"] for one in canvases[:-1]] == list(range(1, len(canvases)))
    assert "[MASK" in canvases[0]["canvas"]
    assert canvases[-1]["canvas"] == whole.text


def test_a_picture_without_words_is_described(client: OpenAI, emoji: Model) -> None:
    images = emoji.text_to_image(["cat", "red heart", "sun"])
    expected = emoji.caption(images)

    def ask(image: Image.Image) -> str | None:
        found = client.chat.completions.create(model="emoji", messages=shown(data_url(image)))
        return found.choices[0].message.content

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(ask, images)) == expected
    chunks = client.chat.completions.create(
        model="emoji", messages=shown(data_url(images[0])), stream=True
    )
    assert "".join(one.choices[0].delta.content or "" for one in chunks) == expected[0]


def test_images_are_drawn(client: OpenAI, emoji: Model) -> None:
    found = client.images.generate(
        model="emoji",
        prompt="red heart",
        n=2,
        size="64x64",  # type: ignore[arg-type]
        response_format="b64_json",
        extra_body={"seed": 7, "num_inference_steps": 3, "negative_prompt": "beard"},
    )
    expected = emoji.text_to_image(
        "red heart",
        num_images_per_prompt=2,
        num_inference_steps=3,
        negative_prompt="beard",
        generator=[rng(7), rng(8)],
    )
    assert found.data is not None
    images = [opened(one.b64_json) for one in found.data]
    assert [one.tobytes() for one in images] == [one.tobytes() for one in expected]


def test_images_are_drawn_step_by_step(client: OpenAI, emoji: Model) -> None:
    events = list(
        client.images.generate(
            model="emoji",
            prompt="cat",
            stream=True,
            partial_images=2,
            output_format="png",
            extra_body={"seed": 1, "num_inference_steps": 6},
        )
    )
    kinds = [one.type for one in events]
    assert kinds == ["image_generation.partial_image"] * 2 + ["image_generation.completed"]
    expected = emoji.text_to_image("cat", num_inference_steps=6, generator=rng(1))[0]
    assert opened(events[-1].b64_json).tobytes() == expected.tobytes()


def test_a_chat_can_be_drawn(client: OpenAI) -> None:
    found = client.chat.completions.create(
        model="emoji",
        messages=[{"role": "user", "content": "red heart"}],
        modalities=["image"],  # type: ignore[list-item]
        extra_body={"image_generation": {"num_inference_steps": 2}},
    )
    extra = found.choices[0].message.model_extra
    assert extra is not None
    url = extra["images"][0]["image_url"]["url"]
    assert opened(url.removeprefix("data:image/png;base64,")).size == (64, 64)


@pytest.mark.parametrize("is_transparent", [True, False])
def test_a_mask_says_what_is_drawn_again(client: OpenAI, is_transparent: bool) -> None:
    image = picture("green", (96, 80))
    if is_transparent:  # as OpenAI has it
        mask = Image.new("RGBA", image.size, (0, 0, 0, 255))
        mask.paste((0, 0, 0, 0), (0, 0, 96, 40))
    else:
        mask = Image.new("RGBA", image.size, (0, 0, 0, 255)).convert("RGB")
        mask.paste((255, 255, 255), (0, 0, 96, 40))
    found = client.images.edit(
        model="emoji",
        image=("a.png", png(image)),
        mask=("m.png", png(mask)),
        prompt="red heart",
        extra_body={"seed": 2, "num_inference_steps": 2},
    )
    assert found.data is not None
    mended = opened(found.data[0].b64_json)
    below = (0, 40, 96, 80)
    assert mended.crop(below).tobytes() == image.crop(below).tobytes()
    assert mended.tobytes() != image.tobytes()


@pytest.fixture(scope="module")
def llada_v() -> Model:
    return model_of(LladaV())


def test_conversations_with_pictures_are_answered(llada_v: Model, serve: Serve) -> None:
    client, image = serve(llada_v), picture("blue", (16, 16))
    messages: list[Any] = [
        {"role": "user", "content": "What is it?"},
        {"role": "assistant", "content": "A cat."},
        *shown(data_url(image), data_url(image), text="And these?"),
    ]
    asked: dict[str, Any] = {
        "model": "emoji",
        "messages": messages,
        "max_tokens": 8,
        "seed": 1,
        "extra_body": {"num_inference_steps": 4, "block_length": 4},
    }
    found = client.chat.completions.create(**asked, logprobs=True)
    talk: list[Any] = [
        *messages[:2],
        {
            "role": "user",
            "content": [
                {"type": "image", "image": image},
                {"type": "image", "image": image},
                {"type": "text", "text": "And these?"},
            ],
        },
    ]
    expected = llada_v.chat(
        talk, max_new_tokens=8, num_inference_steps=4, block_length=4, generator=rng(1)
    )
    choice = found.choices[0]
    assert choice.message.content == expected
    assert choice.logprobs is not None
    assert choice.finish_reason == "length"
    assert found.usage is not None
    assert found.usage.completion_tokens == 8 == len(choice.logprobs.content or [])
    chunks = list(client.chat.completions.create(**asked, stream=True))
    assert "".join(one.choices[0].delta.content or "" for one in chunks) == expected
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices[0].finish_reason == "length"
    stop = expected[len(expected) // 2]
    cut = client.chat.completions.create(**asked, stop=[stop]).choices[0]
    assert cut.message.content == expected[: expected.index(stop)].strip()
    assert cut.finish_reason == "stop"
    parts = client.chat.completions.create(**asked, stop=[stop], stream=True)
    assert "".join(p.choices[0].delta.content or "" for p in parts) == cut.message.content


def test_an_image_is_edited_by_instruction(serve: Serve) -> None:
    editor = model_of(Lumina(side=24, edit_side=16, step=4))
    found = serve(editor).images.edit(
        model="emoji",
        image=png(picture("blue", (16, 16))),
        prompt="make it night",
        extra_body={"num_inference_steps": 2, "seed": 1},
    )
    assert found.data is not None
    expected = editor.edit(
        picture("blue", (16, 16)), "make it night", num_inference_steps=2, generator=rng(1)
    )
    assert opened(found.data[0].b64_json).tobytes() == expected.tobytes()


# --- what is refused ------------------------------------------------------------------------------


def bomb() -> str:
    """A PNG whose header says that it has 30,000 x 30,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IEND", b"")
    return "data:image/png;base64," + base64.b64encode(data).decode()


LARGE = data_url(Image.new("1", (1000, 500)))
CHAT, TEXT, DRAW = "/chat/completions", "/completions", "/images/generations"
HELLO = [{"role": "user", "content": "hello"}]
REFUSED: list[tuple[str, Any, int, str]] = [
    (CHAT, {"messages": HELLO}, 400, "not trained for chat; .* a message with one picture"),
    (CHAT, {"messages": []}, 400, "messages: List should have at least 1 item"),
    (CHAT, {"messages": [{"role": "king", "content": "x"}]}, 400, "messages.0.role: "),
    (CHAT, {"messages": shown("http://127.0.0.1/a.png")}, 400, "is no data URL"),
    (CHAT, {"messages": shown("file:///etc/passwd")}, 400, "'file:///etc/passwd' is no data URL"),
    (CHAT, {"messages": shown("/etc/passwd")}, 400, "is no data URL"),
    (CHAT, {"messages": shown("data:image/png;base64,AAAA")}, 400, "none of PNG, JPEG"),
    (CHAT, {"messages": shown(bomb())}, 400, "30000 x 30000 pixels are more than 1,000,000"),
    (CHAT, {"messages": shown(*[LARGE] * 3)}, 400, "the first 2 images .* 1000000 pixels together"),
    (CHAT, {"messages": HELLO, "response_format": {"type": "xml"}}, 400, "response_format 'xml'"),
    (CHAT, {"messages": HELLO, "tools": []}, 400, "tools: this server does not know"),
    (CHAT, {"messages": HELLO, "modalities": ["image"], "stream": True}, 400, "not streamed"),
    (TEXT, {"prompt": "a", "n": 1_000_000}, 400, "n is 1000000, but this server takes 8 at most"),
    (TEXT, {"prompt": "a", "n": 2, "stream": True}, 400, "a stream holds one text"),
    (TEXT, {"prompt": "a", "max_tokens": 10**9}, 400, "max_tokens is 1000000000"),
    (TEXT, {"prompt": "a", "max_tokens": 4000}, 400, "max_new_tokens is 4000"),
    (TEXT, {"prompt": "a [MASK:5000]"}, 400, "number of masks in the prompt is 5000"),
    (TEXT, {"prompt": "a " * 5000}, 400, "tokens"),
    (TEXT, {"prompt": "a", "temperature": -1}, 400, "temperature: .*greater than or equal to 0"),
    (TEXT, {"prompt": "a", "temperature": "hot"}, 400, "temperature: .*valid number"),
    (TEXT, {"prompt": "a", "top_k": 3}, 400, "top_k: this server does not know the parameter"),
    (TEXT, {"prompt": "a", "model": "gpt-5"}, 404, "there is no model 'gpt-5' here"),
    (TEXT, {"prompt": "[MASK]", "suffix": "b"}, 400, "either holes in the prompt or a suffix"),
    (TEXT, {"prompt": "", "max_tokens": 3}, 400, "is empty"),
    (TEXT, {}, 400, "prompt: Field required"),
    (DRAW, {"prompt": "cat", "size": "17x17"}, 400, "17"),
    (DRAW, {"prompt": "cat", "size": "big"}, 400, "size 'big' is not WIDTHxHEIGHT"),
    (DRAW, {"prompt": " "}, 400, "prompt ' ' is empty"),
    (DRAW, {"prompt": "cat", "response_format": "url"}, 400, "response_format: "),
    (DRAW, {"prompt": "cat", "num_inference_steps": 9**9}, 400, "num_inference_steps is"),
    (
        CHAT,
        {
            "messages": HELLO,
            "modalities": ["image"],
            "image_generation": {"num_inference_steps": 10**6},
        },
        400,
        "num_inference_steps is 1000000",
    ),
    ("/audio", {}, 404, "there is no /v1/audio here"),
]


@pytest.mark.parametrize("path, body, status, message", REFUSED, ids=range(len(REFUSED)))
def test_what_is_wrong_is_said_in_a_sentence(
    client: OpenAI, path: str, body: Any, status: int, message: str
) -> None:
    answer = httpx.post(f"{client.base_url}{path[1:]}", json=body, timeout=60)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert re.search(message, error["message"]), error["message"]
    assert "Traceback" not in answer.text
    assert "\n" not in error["message"]


@pytest.mark.parametrize("body", [b"", b"{", b"[" * 100_000, b'{"prompt": "\xff"}', b"null", b"7"])
def test_bodies_that_are_no_requests(client: OpenAI, body: bytes) -> None:
    answer = httpx.post(f"{client.base_url}completions", content=body, timeout=60)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"]


@pytest.mark.parametrize("is_told", [True, False])
def test_a_body_that_is_too_large(client: OpenAI, is_told: bool) -> None:
    def pieces() -> Iterator[bytes]:
        for _ in range(20):
            yield b" " * 100_000

    content = b" " * 2_000_000 if is_told else pieces()
    answer = httpx.post(f"{client.base_url}completions", content=content, timeout=60)
    assert answer.status_code == 413
    assert "larger than 1,048,576 bytes" in answer.json()["error"]["message"]


def test_edits_of_nothing_and_of_what_a_model_cannot(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="not trained for edit"):
        client.images.edit(model="emoji", image=png(picture()), prompt="make it night")
    with pytest.raises(openai.BadRequestError, match="mask is 8 x 8 but the image is 64 x 64"):
        client.images.edit(image=png(picture()), mask=png(picture("white", (8, 8))), prompt="x")
    answer = httpx.post(f"{client.base_url}images/edits", data={"prompt": "x"})
    assert answer.json()["error"]["message"] == "image is missing; send a file"


def test_a_key_is_needed_where_there_are_keys(emoji: Model, serve: Serve) -> None:
    client = serve(emoji, key="wrong", api_keys=("right", "other"))
    with pytest.raises(openai.AuthenticationError, match="API key is missing or wrong"):
        client.models.list()
    root = str(client.base_url).removesuffix("/v1/")
    assert httpx.get(f"{root}/metrics").status_code == 401
    assert httpx.get(f"{root}/health").json() == {"status": "ok"}
    assert client.with_options(api_key="other").models.list().data


def test_other_origins_are_told_nothing_unless_they_are_named(emoji: Model, serve: Serve) -> None:
    origin = {"Origin": "https://a.example"}
    closed, open_ = serve(emoji), serve(emoji, cors_origins=("https://a.example",))
    answer = httpx.get(f"{closed.base_url}models", headers=origin)
    assert "access-control-allow-origin" not in answer.headers
    answer = httpx.get(f"{open_.base_url}models", headers=origin)
    assert answer.headers["access-control-allow-origin"] == "https://a.example"


# --- many at once ---------------------------------------------------------------------------------


def test_one_too_many_is_told_when_to_come_back(emoji: Model, serve: Serve) -> None:
    begun, gate = threading.Event(), threading.Event()

    def wait() -> None:
        begun.set()
        gate.wait(20)

    client = serve(with_order(emoji, wait), max_batch_size=1, max_queue=1)

    def ask() -> str:
        return client.completions.create(model="emoji", prompt=HOLES).choices[0].text

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(ask)
        assert begun.wait(20)
        second = pool.submit(ask)
        root = str(client.base_url).removesuffix("/v1/")
        while httpx.get(f"{root}/ready").status_code == 200:
            time.sleep(0.01)
        with pytest.raises(openai.RateLimitError, match="takes no more") as error:
            ask()
        assert int(error.value.response.headers["retry-after"]) >= 1
        gate.set()
        assert first.result() == second.result() == emoji.infill(HOLES)
    metrics = httpx.get(f"{root}/metrics").text
    assert 'mmdlm_requests_total{route="/v1/completions",status="429"} 1.0' in metrics
    assert "mmdlm_requests_active 0.0" in metrics


@pytest.mark.parametrize("stream", [False, True])
def test_who_leaves_is_given_up(emoji: Model, serve: Serve, stream: bool) -> None:
    begun, gate, steps = threading.Event(), threading.Event(), []

    def wait() -> None:
        steps.append(1)
        begun.set()
        gate.wait(20)

    client = serve(with_order(emoji, wait), max_batch_size=1, max_queue=0)
    root = str(client.base_url).removesuffix("/v1/")
    body = {"prompt": HOLES, "stream": stream}
    leaving = httpx.Client(timeout=httpx.Timeout(60, read=0.5))
    with leaving, pytest.raises(httpx.ReadTimeout):
        leaving.post(f"{client.base_url}completions", json=body)
    assert begun.wait(20)
    gate.set()
    for _ in range(500):
        if httpx.get(f"{root}/ready").status_code == 200:
            break
        time.sleep(0.01)
    assert httpx.get(f"{root}/ready").json() == {"ready": True}
    assert len(steps) <= 2  # of four
    assert client.completions.create(model="emoji", prompt=HOLES).choices[0].text


def test_a_request_that_takes_too_long_is_ended(emoji: Model, serve: Serve) -> None:
    client = serve(with_order(emoji, lambda: time.sleep(0.3)), timeout=0.2)
    with pytest.raises(openai.InternalServerError, match="not finished in time") as error:
        client.completions.create(model="emoji", prompt=HOLES)
    assert error.value.status_code == 504


def test_an_error_of_ours_is_told_without_its_inside(
    emoji: Model, serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        raise RuntimeError("a secret")

    client = serve(with_order(emoji, fail))
    with caplog.at_level(logging.INFO), pytest.raises(openai.InternalServerError) as error:
        client.completions.create(model="emoji", prompt=HOLES)
    assert "secret" not in error.value.message
    assert "a secret" in caplog.text


@pytest.mark.parametrize("log_prompts", [False, True])
def test_logs_hold_no_prompts_unless_asked(
    emoji: Model, serve: Serve, caplog: pytest.LogCaptureFixture, log_prompts: bool
) -> None:
    client = serve(emoji, log_prompts=log_prompts)
    with caplog.at_level(logging.INFO, "mmdlm.serving"):
        client.completions.create(model="emoji", prompt="secret [MASK]", user="someone")
    line = json.loads(caplog.messages[-1])
    assert line["route"] == "/v1/completions"
    assert line["status"] == 200
    assert ("secret" in caplog.text) == log_prompts
