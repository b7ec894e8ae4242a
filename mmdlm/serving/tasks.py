"""What requests ask of a model: from the fields of a request to a call of the model."""

from __future__ import annotations

import base64
import io
import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

import torch
from PIL import Image, ImageChops

from mmdlm.pipeline.model import Model
from mmdlm.pipeline.text_run import Draft
from mmdlm.serving.errors import ApiError
from mmdlm.serving.requests import (
    ChatMessage,
    ChatRequest,
    CompletionRequest,
    ImageGeneration,
    ImagePart,
    ImageRequest,
    Request,
    TextRequest,
    size_of,
)
from mmdlm.serving.service import Work
from mmdlm.serving.settings import ServerSettings
from mmdlm.templates.infill import HOLE
from mmdlm.vision.image_files import BLACK, WHITE, image_facts, open_image
from mmdlm.vision.image_urls import data_of

TextTask = Literal["chat", "caption", "complete", "infill"]
Given = TypeVar("Given")  # an image, as a request holds it


@dataclass(frozen=True)
class TextCall:
    """A call of a model that writes texts.

    Attributes:
        task: Method of the model.
        asked: Its first argument, for one text.
        options: Its options, without generators.
        n: How many texts.
        seed: Of the first; the others count on.
        before: What stands before the written text in the result and is cut off.
        after: The same behind it.
    """

    task: TextTask
    asked: Any
    options: dict[str, Any]
    n: int
    seed: int
    before: str = ""
    after: str = ""

    def texts(self, work: Work) -> list[str]:
        """Write all of them in one call."""
        generators = [torch.Generator().manual_seed(self.seed + i) for i in range(self.n)]
        method = getattr(work.model, self.task)
        texts: list[str] = method([self.asked] * self.n, generator=generators, **self.options)
        return [self.written(text) for text in texts]

    def drafts(self, work: Work) -> Iterator[Draft]:
        """Write one, step by step."""
        assert self.task != "caption"
        generator = [torch.Generator().manual_seed(self.seed)]
        yield from work.model.stream(self.task, self.asked, generator=generator, **self.options)

    def written(self, text: str) -> str:
        """Return only what the model has written."""
        if self.after and text.endswith(self.after):
            text = text[: -len(self.after)]
        return text.removeprefix(self.before)


def with_settings(model: Model, request: Request) -> Model:
    """Return the model with the sampling that a request asks for, where calls have no option."""
    values: dict[str, Any] = {"threshold": request.threshold}
    if isinstance(request, TextRequest):
        values |= {"top_p": request.top_p, "temperature": request.temperature}
    if all(value is None for value in values.values()):
        return model
    return replace(model, defaults=model.defaults.in_each_task(**values))


def seed_of(request: Request) -> int:
    """Return the seed of a request; one that has none gets one by chance."""
    return secrets.randbelow(2**31) if request.seed is None else request.seed


def check_limits(request: Request, settings: ServerSettings) -> None:
    """Refuse what is too much, or meant for another model.

    Args:
        request: To look at.
        settings: Limits of the server.

    Raises:
        ApiError: With status 404 for another model.
    """
    if request.model is not None and request.model != settings.model_name:
        raise ApiError(
            404,
            f"there is no model {request.model[:100]!r} here; this server has "
            f"{settings.model_name!r}",
            code="model_not_found",
            param="model",
        )
    most = min(settings.max_choices, settings.max_batch_size)
    _check_most("n", request.n, most)
    _check_most("num_inference_steps", request.num_inference_steps, settings.max_steps)
    for name in ("max_tokens", "max_completion_tokens"):
        _check_most(name, getattr(request, name, None), settings.max_new_tokens)


def _check_most(name: str, value: int | None, most: int) -> None:
    if value is not None and value > most:
        raise ApiError(
            400,
            f"{name} is {value}, but this server takes {most} at most; lower it",
            code="invalid_value",
            param=name,
        )


# --- texts ------------------------------------------------------------------------------------


def chat_call(request: ChatRequest, model: Model, settings: ServerSettings) -> TextCall:
    """Return the call that answers a conversation, or describes a picture shown without words."""
    kind = (request.response_format or {"type": "text"}).get("type")
    if kind != "text":
        raise ApiError(
            400,
            f"response_format {kind!r} is not known to this server; leave it out",
            code="invalid_value",
            param="response_format",
        )
    images = _images(request.messages, settings.max_pixels)
    n, seed = request.n or 1, seed_of(request)
    has_words = any(_words(message) for message in request.messages)
    if len(images) == 1 and not has_words:
        steps = {"num_inference_steps": request.num_inference_steps}
        return TextCall("caption", images[0], steps, n, seed)
    tasks = model.prompt_template.tasks_with(model.text_tokenizer)
    if "chat" not in tasks and "caption" in tasks:
        hint = "; a message with one picture and no words is answered by a caption"
        model.prompt_template.unsupported("chat", tasks, hint=hint)
    places = iter(images)
    messages = [_message(one, places) for one in request.messages]
    options = _writing(request, request.max_completion_tokens or request.max_tokens)
    return TextCall("chat", messages, options | {"think": request.think}, n, seed)


def _writing(request: TextRequest, max_tokens: int | None) -> dict[str, Any]:
    return {
        "max_new_tokens": max_tokens,
        "stop": request.stop or None,
        "num_inference_steps": request.num_inference_steps,
        "block_length": request.block_length,
        "guidance_scale": request.guidance_scale,
    }


def _message(message: ChatMessage, images: Iterator[Image.Image]) -> dict[str, Any]:
    """Return a message for the model: its images are here, and none is fetched or opened there."""
    role = "system" if message.role == "developer" else message.role
    if isinstance(message.content, str):
        return {"role": role, "content": message.content}
    parts = [
        {"type": "image", "image": next(images)}
        if isinstance(part, ImagePart)
        else {"type": "text", "text": part.text}
        for part in message.content
    ]
    return {"role": role, "content": parts}


def _words(message: ChatMessage) -> str:
    if isinstance(message.content, str):
        return message.content.strip()
    texts = [part.text for part in message.content if not isinstance(part, ImagePart)]
    return "\n".join(texts).strip()


def _images(messages: Sequence[ChatMessage], max_pixels: int) -> list[Image.Image]:
    """Open the images of a conversation; they share the limit."""
    contents = [one.content for one in messages if not isinstance(one.content, str)]
    parts = [part for content in contents for part in content]
    urls = [part.image_url.url for part in parts if isinstance(part, ImagePart)]
    return _opened(urls, open_url, max_pixels)


def _opened(
    given: Sequence[Given], opener: Callable[[Given, int], Image.Image], max_pixels: int
) -> list[Image.Image]:
    images, left = [], max_pixels
    for number, one in enumerate(given):
        if left < 1:
            raise ApiError(
                400,
                f"the first {number} images of the request have {max_pixels} pixels together, and "
                "this server takes no more; send fewer or smaller ones",
                code="invalid_value",
                param="image",
            )
        images.append(opener(one, left))
        left -= images[-1].width * images[-1].height
    return images


def open_url(url: str, max_pixels: int) -> Image.Image:
    """Open the image of a data URL; nothing is read from elsewhere."""
    if url[:5].lower() != "data:":
        raise ApiError(
            400,
            f"image_url {url[:60]!r} is no data URL, and this server fetches and opens nothing "
            "else; send the image as data:image/png;base64,...",
            code="invalid_image_url",
            param="image_url",
        )
    return open_image(data_of(url), max_pixels=max_pixels)


def completion_call(request: CompletionRequest, model: Model, settings: ServerSettings) -> TextCall:
    """Return the call that goes on with a text, or fills what is between it and its suffix."""
    prompt = request.prompt if isinstance(request.prompt, str) else request.prompt[0]
    n, seed, suffix = request.n or 1, seed_of(request), request.suffix or ""
    if suffix or HOLE.search(prompt):
        for name in ("stop", "block_length", "guidance_scale"):
            if getattr(request, name) is not None:
                raise ApiError(
                    400,
                    f"{name} has no meaning where holes of a text are filled; leave it out",
                    code="invalid_value",
                    param=name,
                )
        options = {"num_inference_steps": request.num_inference_steps}
        holes = sum(int(found.group(1) or 1) for found in HOLE.finditer(prompt))
        _check_most("number of masks in the prompt", holes, settings.max_new_tokens)
        if not suffix:
            return TextCall("infill", prompt, options, n, seed)
        if HOLE.search(prompt + suffix):
            raise ApiError(
                400,
                "prompt or suffix holds a [MASK]; give either holes in the prompt or a suffix",
                code="invalid_value",
                param="suffix",
            )
        asked = f"{prompt}[MASK:{request.max_tokens or 16}]{suffix}"
        return TextCall("infill", asked, options, n, seed, before=prompt, after=suffix)
    return TextCall("complete", prompt, _writing(request, request.max_tokens), n, seed)


# --- images -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Drawing:
    """A call of a model that draws.

    Attributes:
        prompt: What to draw.
        n: How many images.
        seed: Of the first; the others count on.
        options: Of `text_to_image`, without generators.
    """

    prompt: str
    n: int
    seed: int
    options: dict[str, Any]

    @classmethod
    def of(cls, request: ImageRequest) -> Drawing:
        """Read a request."""
        height, width = size_of(request.size)
        options = {
            "num_inference_steps": request.num_inference_steps,
            "guidance_scale": request.guidance_scale,
            "negative_prompt": request.negative_prompt,
            "height": height,
            "width": width,
        }
        return cls(request.prompt, request.n or 1, seed_of(request), options)

    @property
    def _all(self) -> dict[str, Any]:
        generators = [torch.Generator().manual_seed(self.seed + i) for i in range(self.n)]
        return self.options | {"num_images_per_prompt": self.n, "generator": generators}

    def images(self, work: Work) -> list[Image.Image]:
        """Draw all of them in one call."""
        return work.model.text_to_image(self.prompt, **self._all)

    def frames(self, work: Work) -> Iterator[list[Image.Image]]:
        """Draw them, and yield all after each step."""
        return work.model.draw_trajectory(self.prompt, **self._all)


def chat_drawing(request: ChatRequest, settings: ServerSettings) -> Drawing:
    """Return the drawing that a conversation asks for: of what the user said last."""
    given = request.image_generation or ImageGeneration()
    said = [_words(one) for one in request.messages if one.role == "user"]
    asked = ImageRequest(
        prompt=said[-1] if said else "",
        n=request.n,
        seed=request.seed,
        size=given.size,
        negative_prompt=given.negative_prompt,
        num_inference_steps=given.num_inference_steps or request.num_inference_steps,
        guidance_scale=request.guidance_scale
        if given.guidance_scale is None
        else given.guidance_scale,
    )
    check_limits(asked, settings)
    return Drawing.of(asked)


def edited(
    request: ImageRequest,
    work: Work,
    images: Sequence[bytes],
    mask: bytes | None,
    settings: ServerSettings,
) -> list[Image.Image]:
    """Repaint what a mask leaves open, or without one edit as the prompt says.

    Args:
        request: Its other fields.
        work: The model.
        images: Files; one of them where there is a mask.
        mask: A file; transparent where the image is drawn again, or white if it is nowhere
            transparent.
        settings: Limits of the server.

    Returns:
        `n` images.
    """
    if request.negative_prompt is not None:
        raise ApiError(
            400,
            "negative_prompt has no meaning where an image is given; leave it out",
            code="invalid_value",
            param="negative_prompt",
        )
    if size_of(request.size) != (None, None):
        raise ApiError(
            400,
            "size is that of the image where one is given; leave it out",
            code="invalid_value",
            param="size",
        )
    seed, model = seed_of(request), work.model
    opened = _opened(
        images,
        lambda one, most: open_image(one, max_pixels=most, whole=True),
        settings.max_pixels,
    )
    if mask is not None and len(opened) != 1:
        raise ApiError(
            400,
            f"a mask belongs to one image, and there are {len(opened)}; send one",
            code="invalid_value",
            param="image",
        )
    hole = None if mask is None else _hole(mask, settings.max_pixels)
    results = []
    for number in range(request.n or 1):
        options: dict[str, Any] = {
            "num_inference_steps": request.num_inference_steps,
            "guidance_scale": request.guidance_scale,
            "generator": torch.Generator().manual_seed(seed + number),
        }
        if hole is None:
            results.append(model.edit(opened, request.prompt, **options))
        else:
            results.append(model.inpaint(opened[0], hole, request.prompt, **options))
    return results


def _hole(mask: bytes, max_pixels: int) -> Image.Image:
    """Return a mask that is white where the image is drawn again."""
    on_white = open_image(mask, max_pixels=max_pixels, whole=True, paper=WHITE)
    if not image_facts(mask)[2]:
        return on_white
    on_black = open_image(mask, max_pixels=max_pixels, whole=True, paper=BLACK)
    # What is transparent shows the paper.
    return ImageChops.difference(on_white, on_black).getchannel("G")


def encoded(image: Image.Image, kind: str | None = None) -> str:
    """Return an image file in base64."""
    buffer = io.BytesIO()
    image.save(
        buffer, (kind or "png").upper(), **({} if kind in (None, "png") else {"quality": 95})
    )
    return base64.b64encode(buffer.getvalue()).decode("ascii")
