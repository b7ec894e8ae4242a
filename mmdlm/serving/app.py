"""The server's app: routes of OpenAI's API over one model."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware
from PIL import Image
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse

from mmdlm.pipeline.model import Model
from mmdlm.serving import tasks
from mmdlm.serving.errors import ApiError, api_error
from mmdlm.serving.gate import Gate, log_failure, refused
from mmdlm.serving.metrics import Metrics
from mmdlm.serving.replies import (
    chat_choice,
    completion_choice,
    envelope,
    event,
    image_choice,
    usage_of,
    written_texts,
)
from mmdlm.serving.requests import ChatRequest, CompletionRequest, ImageRequest, Request
from mmdlm.serving.service import Service, Work
from mmdlm.serving.settings import ServerSettings
from mmdlm.serving.text_stream import Delta, deltas

Kind = TypeVar("Kind", bound=Request)
Item = TypeVar("Item")
EVENTS = "text/event-stream"


def build_app(model: Model, settings: ServerSettings) -> FastAPI:
    """Return the app that serves a model.

    Args:
        model: To serve.
        settings: Limits, keys and the name of the model.

    Returns:
        An app of FastAPI, for uvicorn or as a part of another.
    """
    metrics = Metrics()
    service = Service(model, settings, metrics)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        service.close()

    app = FastAPI(title="mmdlm", docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    routes = _Routes(service, settings, metrics)
    app.add_api_route("/health", routes.health)
    app.add_api_route("/ready", routes.ready)
    app.add_api_route("/metrics", routes.metrics)
    app.add_api_route("/v1/models", routes.models)
    app.add_api_route("/v1/models/{name:path}", routes.one_model)
    for path, route in (
        ("/v1/chat/completions", routes.chat),
        ("/v1/completions", routes.complete),
        ("/v1/images/generations", routes.draw),
        ("/v1/images/edits", routes.edit),
    ):
        app.add_api_route(path, route, methods=["POST"], response_model=None)
    app.add_exception_handler(HTTPException, _not_found)
    app.add_middleware(Gate, settings=settings, metrics=metrics)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
        )
    return app


async def _not_found(http: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == 405:
        message = f"{http.url.path} does not take {http.method}; see the documentation"
    else:
        message = f"there is no {http.url.path[:100]} here; see the documentation for what there is"
    return refused(ApiError(error.status_code, message, code="unknown_url"))


class _Routes:
    """What is done at each address."""

    def __init__(self, service: Service, settings: ServerSettings, metrics: Metrics) -> None:
        self.service, self.settings, self.counts = service, settings, metrics
        self.created = int(time.time())

    # --- about the server ---

    async def health(self) -> dict[str, str]:
        """Tell that the process lives."""
        return {"status": "ok"}

    async def ready(self) -> Response:
        """Tell whether a request would be taken."""
        is_ready = self.service.is_ready
        return JSONResponse({"ready": is_ready}, 200 if is_ready else 503)

    async def metrics(self) -> Response:
        """Give Prometheus its numbers."""
        return Response(self.counts.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def models(self) -> dict[str, Any]:
        """List the model."""
        return {"object": "list", "data": [self._model()]}

    async def one_model(self, name: str) -> Response:
        """Describe the model."""
        try:
            tasks.check_limits(Request(model=name), self.settings)
        except ApiError as error:
            return refused(error)
        return JSONResponse(self._model())

    def _model(self) -> dict[str, Any]:
        model = self.service.model
        return {
            "id": self.settings.model_name,
            "object": "model",
            "created": self.created,
            "owned_by": "mmdlm",
            "tasks": list(model.prompt_template.tasks_with(model.text_tokenizer)),
        }

    # --- texts ---

    async def chat(self, http: HttpRequest) -> Response:
        """Answer a conversation by a text or an image."""
        request = await self._read(http, ChatRequest)
        if "image" in (request.modalities or ()):
            drawing = tasks.chat_drawing(request, self.settings)
            if request.stream:
                raise ApiError(
                    400,
                    "an image is not streamed in a chat; leave stream out, or stream "
                    "/v1/images/generations",
                    code="invalid_value",
                    param="stream",
                )
            images = await self._call(http, request, drawing.images)
            self.counts.images.inc(len(images))
            return JSONResponse(
                envelope("chat.completion", self.settings.model_name)
                | {"choices": [image_choice(i, one) for i, one in enumerate(images)]}
            )

        def call(work: Work) -> tasks.TextCall:
            return tasks.chat_call(request, work.model, self.settings)

        if request.stream:
            return await self._stream_text(http, request, call, "chat.completion.chunk", _chat_part)

        def answer(work: Work) -> dict[str, Any]:
            prepared = call(work)
            texts = written_texts(prepared, prepared.texts(work), work)
            self._count(usage := usage_of(texts))
            tokenizer, logprobs = work.model.text_tokenizer, bool(request.logprobs)
            choices = [
                chat_choice(number, one, tokenizer, logprobs=logprobs)
                for number, one in enumerate(texts)
            ]
            return {"choices": choices, "usage": usage, "mmdlm": {"seed": prepared.seed}}

        body = await self._call(http, request, answer)
        return JSONResponse(envelope("chat.completion", self.settings.model_name) | body)

    async def complete(self, http: HttpRequest) -> Response:
        """Go on with a text, or fill its holes."""
        request = await self._read(http, CompletionRequest)

        def call(work: Work) -> tasks.TextCall:
            return tasks.completion_call(request, work.model, self.settings)

        if request.stream:
            return await self._stream_text(http, request, call, "text_completion", _text_part)
        echoed = ""
        if request.echo:
            echoed = request.prompt if isinstance(request.prompt, str) else request.prompt[0]

        def answer(work: Work) -> dict[str, Any]:
            prepared = call(work)
            texts = written_texts(prepared, prepared.texts(work), work)
            self._count(usage := usage_of(texts))
            tokenizer, logprobs = work.model.text_tokenizer, request.logprobs is not None
            choices = [
                completion_choice(number, one, tokenizer, logprobs=logprobs, echoed=echoed)
                for number, one in enumerate(texts)
            ]
            return {"choices": choices, "usage": usage, "mmdlm": {"seed": prepared.seed}}

        body = await self._call(http, request, answer)
        return JSONResponse(envelope("text_completion", self.settings.model_name) | body)

    async def _stream_text(
        self,
        http: HttpRequest,
        request: ChatRequest | CompletionRequest,
        call: Callable[[Work], tasks.TextCall],
        kind: str,
        part: Callable[[Delta, bool], dict[str, Any]],
    ) -> Response:
        if (request.n or 1) != 1:
            raise ApiError(
                400,
                f"n is {request.n}, but a stream holds one text; leave n or stream out",
                code="invalid_value",
                param="n",
            )
        head = envelope(kind, self.settings.model_name)
        with_usage = request.stream_options is not None and request.stream_options.include_usage

        def task(work: Work) -> Iterator[str]:
            begins = True
            for delta in deltas(call(work), work):
                if not (delta.text or delta.written or request.stream_canvas or begins):
                    continue
                chunk = head | {"choices": [part(delta, begins)]}
                if request.stream_canvas:
                    chunk["mmdlm"] = delta.extension
                yield event(chunk)
                begins = False
                if delta.written is not None:
                    self._count(usage := usage_of([delta.written]))
                    if with_usage:
                        yield event(head | {"choices": [], "usage": usage})
            yield "data: [DONE]\n\n"

        return await self._stream(http, request, task)

    # --- images ---

    async def draw(self, http: HttpRequest) -> Response:
        """Draw images of a prompt."""
        request = await self._read(http, ImageRequest)
        drawing = tasks.Drawing.of(request)
        if request.stream:
            return await self._stream(
                http, request, lambda work: self._frames(request, drawing, work)
            )
        images = await self._call(http, request, drawing.images)
        return self._images(request, images, drawing.seed)

    async def edit(self, http: HttpRequest) -> Response:
        """Repaint a part of an image, or edit it."""
        async with http.form(max_files=17, max_fields=64) as form:
            request = await self._read(http, ImageRequest, given=_fields(form))
            files = [*form.getlist("image"), *form.getlist("image[]")]
            images = [await one.read() for one in files if isinstance(one, UploadFile)]
            mask_file = form.get("mask")
            mask = await mask_file.read() if isinstance(mask_file, UploadFile) else None
        if not images:
            raise ApiError(
                400, "image is missing; send a file", code="invalid_value", param="image"
            )
        if request.stream:
            raise ApiError(
                400,
                "edits are not streamed; leave stream out",
                code="invalid_value",
                param="stream",
            )
        seed = tasks.seed_of(request)
        request = request.model_copy(update={"seed": seed})

        def edited(work: Work) -> list[Image.Image]:
            return tasks.edited(request, work, images, mask, self.settings)

        return self._images(request, await self._call(http, request, edited), seed)

    def _images(self, request: ImageRequest, images: list[Image.Image], seed: int) -> Response:
        self.counts.images.inc(len(images))
        data = [{"b64_json": tasks.encoded(one, request.output_format)} for one in images]
        return JSONResponse(
            {
                "created": int(time.time()),
                "data": data,
                "output_format": request.output_format or "png",
                "mmdlm": {"seed": seed},
            }
        )

    def _frames(self, request: ImageRequest, drawing: tasks.Drawing, work: Work) -> Iterator[str]:
        """Yield events of images while they are drawn: as many partial ones as were asked for."""
        steps = request.num_inference_steps or work.model.defaults.text_to_image.num_inference_steps
        wanted = request.partial_images or 0
        every = max(1, steps // (wanted + 1))
        shown = 0
        images: list[Image.Image] = []
        kind = request.output_format or "png"

        def told(name: str, image: Image.Image, more: dict[str, Any]) -> str:
            data = {"type": name, "b64_json": tasks.encoded(image, kind), "output_format": kind}
            return event(data | {"created_at": int(time.time())} | more, name)

        for step, images in enumerate(drawing.frames(work), 1):
            if step % every == 0 and shown < wanted and step < steps:
                for image in images:
                    more = {"partial_image_index": shown}
                    yield told("image_generation.partial_image", image, more)
                shown += 1
        self.counts.images.inc(len(images))
        for image in images:
            yield told("image_generation.completed", image, {"mmdlm": {"seed": drawing.seed}})

    # --- what all have in common ---

    async def _read(
        self, http: HttpRequest, kind: type[Kind], *, given: dict[str, Any] | None = None
    ) -> Kind:
        """Read the body of a request and look at its limits."""
        if given is None:
            body = await http.body()
            request = kind.model_validate_json(body or b"{}")
        else:
            request = kind.model_validate(given, strict=False)
        tasks.check_limits(request, self.settings)
        http.state.asked = request
        return request

    async def _call(
        self, http: HttpRequest, request: Request, task: Callable[[Work], Item]
    ) -> Item:
        def adjusted(work: Work) -> Item:
            model = tasks.with_settings(work.model, request)
            return task(Work(model, work.watch))

        return await self.service.call(http, adjusted)

    async def _stream(
        self, http: HttpRequest, request: Request, task: Callable[[Work], Iterator[str]]
    ) -> Response:
        """Send events; an error before the first is an answer, a later one an event."""
        began = time.monotonic()

        def adjusted(work: Work) -> Iterator[str]:
            yield from task(Work(tasks.with_settings(work.model, request), work.watch))

        events = self.service.stream(http, adjusted)
        first = await anext(events, "")
        self.counts.first.observe(time.monotonic() - began)

        async def all_events() -> AsyncIterator[str]:
            try:
                yield first
                async for one in events:
                    yield one
            except Exception as error:
                log_failure(error)
                yield event(api_error(error).body)
            finally:
                await events.aclose()  # type: ignore[attr-defined]

        return StreamingResponse(all_events(), media_type=EVENTS)

    def _count(self, usage: dict[str, int]) -> None:
        self.counts.prompt_tokens.inc(usage["prompt_tokens"])
        self.counts.tokens.inc(usage["completion_tokens"])


def _chat_part(delta: Delta, begins: bool) -> dict[str, Any]:
    content: dict[str, Any] = {"content": delta.text}
    if begins:
        content["role"] = "assistant"
    reason = None if delta.written is None else delta.written.finish_reason
    return {"index": 0, "delta": content, "finish_reason": reason, "logprobs": None}


def _text_part(delta: Delta, begins: bool) -> dict[str, Any]:
    reason = None if delta.written is None else delta.written.finish_reason
    return {"index": 0, "text": delta.text, "finish_reason": reason, "logprobs": None}


def _fields(form: FormData) -> dict[str, Any]:
    """Return the fields of a form that are no files."""
    files = ("image", "image[]", "mask")
    return {name: value for name, value in form.multi_items() if name not in files}
