"""A server on a real port, in this process."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import uvicorn
from openai import OpenAI

import mmdlm
from mmdlm.pipeline.model import Model
from mmdlm.serving.app import build_app
from mmdlm.serving.server import listen
from mmdlm.serving.settings import ServerSettings

Serve = Callable[..., OpenAI]


@contextmanager
def served(model: Model, **settings: Any) -> Iterator[str]:
    """Serve a model; yield the address."""
    app = build_app(model, ServerSettings(**{"model_name": "emoji", **settings}))
    config = uvicorn.Config(app, log_config=None, lifespan="on", timeout_graceful_shutdown=5)
    server = uvicorn.Server(config)
    with listen("127.0.0.1", 0) as socket:
        thread = threading.Thread(target=server.run, args=([socket],))
        thread.start()
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{socket.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


def asking(address: str, key: str = "none") -> OpenAI:
    return OpenAI(base_url=f"{address}/v1", api_key=key, max_retries=0, timeout=60)


@pytest.fixture(scope="session")
def emoji() -> Model:
    return mmdlm.load("emoji", device="cpu")


@pytest.fixture(scope="package")
def client(emoji: Model) -> Iterator[OpenAI]:
    """The official client, before a server of the bundled model."""
    with served(emoji, max_body_bytes=1 << 20, max_pixels=1_000_000) as address:
        yield asking(address)


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Serve another model, or by other settings, for one test."""
    with ExitStack() as stack:
        yield lambda model, key="none", **settings: asking(
            stack.enter_context(served(model, **settings)), key
        )
