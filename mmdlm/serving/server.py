"""Run the app of a model on a socket until the process is told to stop."""

from __future__ import annotations

import logging
import math
import signal
import socket
import sys

import uvicorn

from mmdlm.pipeline.model import Model
from mmdlm.serving.app import build_app
from mmdlm.serving.settings import ServerSettings


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens.

    Args:
        host: Address of this machine, of IPv4 or IPv6.
        port: 0 takes a free one.

    Returns:
        The socket; close it in the end.

    Raises:
        ValueError: If the address cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise ValueError(
            f"cannot listen at {host}:{port} ({error.strerror or error}); give another --host or "
            "--port"
        ) from error


def run(model: Model, settings: ServerSettings, listening: socket.socket) -> None:
    """Serve a model; return after SIGINT or SIGTERM, when the requests have ended.

    Args:
        model: To serve.
        settings: Limits of the server.
        listening: Where requests come in.
    """
    log = logging.getLogger("mmdlm.serving")
    log.addHandler(logging.StreamHandler(sys.stderr))
    log.setLevel(logging.INFO)
    log.propagate = False
    config = uvicorn.Config(
        build_app(model, settings),
        log_config=None,
        access_log=False,
        lifespan="on",
        server_header=False,
        # Bodies are read before a request is counted: so many are held at most.
        limit_concurrency=32 + 2 * (settings.max_batch_size + settings.max_queue),
        timeout_graceful_shutdown=math.ceil(settings.drain),
    )
    host, port = listening.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    print(
        f"mmdlm: {settings.model_name!r} is served at http://{shown}:{port}/v1; Ctrl-C stops",
        file=sys.stderr,
        flush=True,
    )
    for number in (signal.SIGINT, signal.SIGTERM):  # uvicorn raises them again in the end
        signal.signal(number, lambda *_: None)
    uvicorn.Server(config).run(sockets=[listening])
