"""The bodies of requests, as OpenAI's API has them; what is beside them is named in the docs."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Text = Annotated[str, Field(max_length=1_000_000)]
SIZE = re.compile(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})")
OFF = Literal[0]  # a penalty that is none


class Request(BaseModel):
    """What all requests may have.

    Attributes:
        model: Name of the model.
        n: How many texts or images.
        seed: The same seed gives the same result.
        stream: Send the result as it grows.
        user: Of the caller's own; not looked at.
        metadata: The same.
        num_inference_steps: Denoising steps (beside OpenAI's API, as are the next two).
        guidance_scale: How strongly to follow the prompt; 1 is off.
        threshold: Commit every token of at least this probability: fewer steps.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    model: Text | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    stream: bool | None = None
    user: Text | None = None
    metadata: dict[str, str] | None = None
    num_inference_steps: Annotated[int, Field(ge=1)] | None = None
    guidance_scale: float | None = None
    threshold: Annotated[float, Field(ge=0, le=1)] | None = None


class StreamOptions(BaseModel):
    """Options of a stream."""

    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool = False
    include_obfuscation: bool = False


class TextRequest(Request):
    """What requests for texts may have.

    Attributes:
        max_tokens: Room for the text, in tokens.
        temperature: Of the draw of tokens.
        top_p: Draw from the likeliest ids that have this probability together.
        stop: Texts before which the result ends.
        stream_options: Of the stream.
        stream_canvas: Send every step's canvas as well (beside OpenAI's API).
        block_length: Write so many tokens before the next are begun (beside OpenAI's API).
        frequency_penalty: 0.
        presence_penalty: 0.
    """

    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    stop: Text | Annotated[list[Text], Field(max_length=16)] | None = None
    stream_options: StreamOptions | None = None
    stream_canvas: bool = False
    block_length: Annotated[int, Field(ge=1)] | None = None
    frequency_penalty: OFF | None = None
    presence_penalty: OFF | None = None


class TextPart(BaseModel):
    """A text in a message."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["text"]
    text: Text


class ImageUrl(BaseModel):
    """Where an image is: a data URL."""

    model_config = ConfigDict(extra="forbid", strict=True)

    url: str
    detail: Literal["auto", "low", "high"] | None = None


class ImagePart(BaseModel):
    """An image in a message."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["image_url"]
    image_url: ImageUrl


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class ChatMessage(BaseModel):
    """One turn."""

    model_config = ConfigDict(extra="forbid", strict=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[Part], Field(min_length=1, max_length=256)]
    name: Text | None = None


class ImageGeneration(BaseModel):
    """How a chat's image is drawn.

    Attributes:
        size: WIDTHxHEIGHT or "auto".
        negative_prompt: What to stay away from.
        num_inference_steps: Denoising steps.
        guidance_scale: How strongly to follow the prompt.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    size: Text | None = None
    negative_prompt: Text | None = None
    num_inference_steps: Annotated[int, Field(ge=1)] | None = None
    guidance_scale: float | None = None


class ChatRequest(TextRequest):
    """Body of /v1/chat/completions.

    Attributes:
        messages: The conversation.
        max_completion_tokens: The newer name of `max_tokens`.
        logprobs: Tell the log-probability of each token.
        top_logprobs: 0: only that of the token itself.
        modalities: "text", or "image" to have the answer drawn.
        image_generation: How it is drawn.
        response_format: What kind of text is wanted.
        think: Give reasons first, or not (beside OpenAI's API).
    """

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=1024)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: OFF | None = None
    modalities: list[Literal["text", "image"]] | None = None
    image_generation: ImageGeneration | None = None
    response_format: dict[str, Any] | None = None
    think: bool | None = None


class CompletionRequest(TextRequest):
    """Body of /v1/completions.

    Attributes:
        prompt: How the text begins; `[MASK]` and `[MASK:3]` are holes to fill.
        suffix: How it ends: what is between is written.
        echo: Give the prompt back too.
        logprobs: Tell the log-probability of each token; of others than the token itself none.
        best_of: 1.
    """

    prompt: Text | Annotated[list[Text], Field(min_length=1, max_length=1)]
    suffix: Text | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    best_of: Literal[1] | None = None


class ImageRequest(Request):
    """Body of /v1/images/generations, and the fields of /v1/images/edits.

    Attributes:
        prompt: What to draw, or what is to change.
        size: WIDTHxHEIGHT or "auto".
        response_format: "b64_json".
        output_format: Of the files.
        quality: The model's own.
        partial_images: Images of a stream before the last.
        negative_prompt: What to stay away from (beside OpenAI's API).
    """

    prompt: Text
    size: Text | None = None
    response_format: Literal["b64_json"] | None = None
    output_format: Literal["png", "jpeg", "webp"] | None = None
    quality: Literal["auto", "standard"] | None = None
    partial_images: Annotated[int, Field(ge=0, le=1024)] | None = None
    negative_prompt: Text | None = None


def size_of(size: str | None) -> tuple[int | None, int | None]:
    """Return (height, width) of "WIDTHxHEIGHT"; (None, None) of "auto" and None.

    Args:
        size: As the request has it.

    Returns:
        Pixels.

    Raises:
        ValueError: For anything else.
    """
    if size is None or size == "auto":
        return None, None
    match = SIZE.fullmatch(size)
    if match is None:
        raise ValueError(f"size {size[:40]!r} is not WIDTHxHEIGHT; write 64x64, say, or auto")
    return int(match[2]), int(match[1])
