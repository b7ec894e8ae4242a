"""Texts end at stops, and are shown step by step; messages may be lists of parts."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import pytest
import torch
from PIL import Image

from mmdlm import load
from mmdlm.pipeline.model import Model
from mmdlm.templates.chat_template import PLAIN

TOOLS = (
    "{%- if tools -%}{%- for tool in tools -%}{{ tool['function']['name'] }}:"
    "{{ tool['function']['description'] }}{{ eos_token }}{%- endfor -%}{%- endif -%}"
    "{%- for message in messages -%}{{ message['role'] }}{{ eos_token }}"
    "{%- if message.tool_calls -%}{%- for call in message.tool_calls -%}"
    "<{{ call['function']['name'] }}>{%- endfor -%}{%- endif -%}"
    "{{ message['content'] or '' }}{{ eos_token }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}assistant{{ eos_token }}{%- endif -%}"
)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Path) -> Model:
    model = load(tiny_checkpoint, device="cpu")
    model.text_tokenizer.chat_template = PLAIN
    return model


LONG = {"max_new_tokens": 12, "temperature": 1.0, "block_length": 1, "num_inference_steps": 12}


def whole(model: Model, seed: int = 0) -> str:
    return model.complete("red", generator=rng(seed), **LONG)


def steps_of(model: Model, monkeypatch: pytest.MonkeyPatch, **options) -> tuple[str, int]:
    """A completion and the number of forward passes that it took."""
    passes = []
    hidden = type(model.denoiser).hidden
    with monkeypatch.context() as patch:
        patch.setattr(
            type(model.denoiser),
            "hidden",
            lambda *args, **kwargs: passes.append(1) or hidden(*args, **kwargs),
        )
        return model.complete("red", generator=rng(), **LONG, **options), len(passes)


def test_a_text_ends_before_the_first_stop(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    text = whole(model)
    stop = text[4:6]
    assert stop.strip()
    cut, passes = steps_of(model, monkeypatch, stop=stop)
    assert cut == text[: text.find(stop)]
    everything, all_passes = steps_of(model, monkeypatch)
    assert everything == text
    assert passes < all_passes  # nothing is written behind it
    assert steps_of(model, monkeypatch, stop=["never there", stop])[0] == cut
    assert steps_of(model, monkeypatch, stop="never there") == (text, all_passes)


def test_each_text_of_several_has_its_own_end(model: Model) -> None:
    texts = [whole(model, seed) for seed in range(3)]
    stop = [texts[1][3:5]]
    found = model.complete(
        ["red"] * 3, generator=[rng(seed) for seed in range(3)], stop=stop, **LONG
    )
    assert found == [text.split(stop[0])[0] for text in texts]
    assert found != texts


@pytest.mark.parametrize("stop, message", [("", "empty text"), (3, "stop must be a text")])
def test_a_stop_is_a_text(model: Model, stop, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model.complete("red", stop=stop)


@pytest.mark.parametrize(
    "task, asked, options",
    [
        ("complete", "red", {"max_new_tokens": 6}),
        ("answer", "red?", {"max_new_tokens": 6, "temperature": 1.0}),
        ("chat", [{"role": "user", "content": "red"}], {"max_new_tokens": 6}),
        ("infill", "woman [MASK:3] tone [MASK]", {}),
    ],
)
def test_the_last_draft_is_the_result(model: Model, task: str, asked, options) -> None:
    wanted = getattr(model, task)(asked, **options)
    drafts = list(model.stream(task, asked, **options))
    assert drafts[-1].text == wanted
    assert drafts[-1].prefix == wanted
    assert [draft.step for draft in drafts] == list(range(1, len(drafts) + 1))
    committed = [draft.committed for draft in drafts]
    assert committed == sorted(committed)
    assert "[MASK" in drafts[0].text
    assert all(draft.tokens == drafts[0].tokens for draft in drafts)
    for draft in drafts:
        assert draft.text.startswith(draft.prefix.rstrip())


def test_a_stream_ends_at_a_stop(model: Model) -> None:
    text = whole(model)
    drafts = list(model.stream("complete", "red", generator=rng(), stop=text[4:6], **LONG))
    assert drafts[-1].text == text[: text.find(text[4:6])]
    assert drafts[-1].step < drafts[-1].total


@pytest.mark.parametrize(
    "task, asked, images, error, message",
    [
        ("draw", "red", None, ValueError, "task 'draw' is not one of"),
        ("complete", ["red", "blue"], None, ValueError, "one at a time"),
        ("chat", "red", None, ValueError, "one conversation"),
        ("complete", "red", "image.png", ValueError, "looks at no images"),
        ("complete", "red", None, TypeError, "unexpected keyword argument 'think'"),
    ],
)
def test_what_cannot_be_streamed_is_refused_at_the_call(
    model: Model, task, asked, images, error, message
) -> None:
    options = {"think": True} if error is TypeError else {}
    with pytest.raises(error, match=message):
        model.stream(task, asked, images, **options)


def test_parts_of_a_message_say_what_its_text_says(model: Model) -> None:
    image = Image.new("RGB", (16, 16), (200, 20, 20))
    file = io.BytesIO()
    image.save(file, "PNG")
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    said = model.chat([{"role": "user", "content": "What is <image> here?"}], image)
    for part in (
        {"type": "image", "image": image},
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "image", "base64": url.partition(",")[2]},
    ):
        content = [{"type": "text", "text": "What is "}, part, {"type": "text", "text": " here?"}]
        assert model.chat([{"role": "user", "content": content}]) == said
    content = [
        {"type": "text", "text": "What is "},
        {"type": "image"},
        {"type": "text", "text": " here?"},
    ]
    assert model.chat([{"role": "user", "content": content}], [image]) == said
    part = {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}
    with pytest.raises(ValueError, match="is a URL; fetch it by mmdlm.load_image"):
        model.chat([{"role": "user", "content": [part]}])
    with pytest.raises(ValueError, match="1 <image> placeholder but was given 0 images"):
        model.chat([{"role": "user", "content": content}])


def prompt_of(model: Model, messages, tools=()) -> str:
    """The text that a conversation becomes."""
    run = model._chatting([messages], [[]], {"tools": tools, "max_new_tokens": 3})
    batch = run.run.batch
    ids = batch.ids[0][~batch.target[0] & (batch.document[0] >= 0)]
    return model.text_tokenizer.decode(ids.tolist())


def weather(city: str) -> str:
    """Say the weather.

    Args:
        city: Its name.
    """
    return "rain"


def test_tools_are_written_as_the_template_has_them(tiny_checkpoint: Path) -> None:
    model = load(tiny_checkpoint, device="cpu")
    model.text_tokenizer.chat_template = TOOLS
    end = model.text_tokenizer.eos_token
    messages = [
        {"role": "user", "content": "red?"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"function": {"name": "weather", "arguments": {"city": f"B{end}"}}}],
        },
        {"role": "tool", "content": "rain", "name": "weather"},
    ]
    said = prompt_of(model, messages, [weather])
    assert said.replace(f"{end} ", end) == (
        f"weather:Say the weather.{end}user{end}red?{end}assistant{end}<weather>{end}"
        f"tool{end}rain{end}assistant{end}"
    )
    schema = {"type": "function", "function": {"name": "weather", "description": f"a{end}b"}}
    run = model._chatting([messages[:1]], [[]], {"tools": [schema]})
    text_ids = run.run.batch.ids[0][~run.run.batch.target[0]]
    ends = int((text_ids == model.text_tokenizer.eos_token_id).sum())
    assert ends == 4  # the name of a special token in a tool is letters
    assert isinstance(model.chat(messages, tools=[weather], max_new_tokens=3), str)


def test_a_template_without_tools_says_so(model: Model) -> None:
    with pytest.raises(ValueError, match="has no place for 1 tools; leave them out"):
        model.chat([{"role": "user", "content": "red?"}], tools=[weather])
    with pytest.raises(ValueError, match="follows the user; it must follow the assistant"):
        model.chat([{"role": "user", "content": "red?"}, {"role": "tool", "content": "x"}])
    with pytest.raises(ValueError, match="has no JSON schema"):
        model.chat([{"role": "user", "content": "red?"}], tools=[lambda city: city])


def test_without_a_length_a_text_has_the_room_that_the_model_has() -> None:
    """The bundled model takes 82 tokens, fewer than the usual room of an answer."""
    emoji = load("emoji", device="cpu")
    assert emoji.max_length < emoji.defaults.max_new_tokens
    assert emoji.complete("woman", num_inference_steps=4)
    with pytest.raises(ValueError, match="max_new_tokens is 128, but the model takes 82"):
        emoji.complete("woman", max_new_tokens=128)
