"""The command `mmdlm serve`: OpenAI's API over HTTP."""

from __future__ import annotations

import argparse
import importlib.util
import os
from pathlib import Path
from typing import Any

from mmdlm.cli.commands import load_model
from mmdlm.cli.option_types import count, finite
from mmdlm.cli.parser_options import add_model, add_sampling

KEYS = "MMDLM_API_KEYS"  # of the environment, where arguments would show in a list of processes


def add_serve(commands: argparse._SubParsersAction[Any]) -> None:
    """Add the command."""
    summary = "answer requests of OpenAI's API over HTTP"
    command = commands.add_parser(
        "serve",
        help=summary,
        description=f"{summary.capitalize()}; needs the extra serve.",
        epilog=f"API keys are read from --api-key-file, one a line, and from {KEYS}, separated by "
        "commas; without any, every request is answered.",
        allow_abbrev=False,
    )
    command.set_defaults(run=serve, quiet=False)
    add_model(command, "emoji")
    add_sampling(command)
    command.add_argument(
        "--host",
        default="127.0.0.1",
        metavar="NAME",
        help="address to listen at; 0.0.0.0 is all of this machine's (default: %(default)s)",
    )
    command.add_argument(
        "--port",
        type=_port,
        default=8000,
        metavar="N",
        help="to listen at; 0 takes a free one (default: %(default)s)",
    )
    command.add_argument(
        "--name", metavar="NAME", help="of the model in requests (default: the end of --model)"
    )
    command.add_argument(
        "--api-key-file", type=Path, metavar="FILE", help="keys, one of which a request needs"
    )
    command.add_argument(
        "--cors-origin",
        action="append",
        default=[],
        metavar="URL",
        help="a web origin whose pages may ask; may be given several times (default: none)",
    )
    for option, default, what in (
        ("--max-batch-size", 16, "texts and images that are denoised at a time"),
        ("--max-queue", 64, "requests that wait beyond those; more get status 429"),
        ("--max-choices", 8, "the largest n of a request"),
        ("--max-body-bytes", 32 << 20, "the largest body of a request"),
        ("--max-pixels", 50_000_000, "the largest image that is read"),
        ("--max-new-tokens", 4096, "the largest text of a request, in tokens"),
        ("--max-steps", 1024, "most denoising steps of a request"),
    ):
        command.add_argument(
            option, type=count, default=default, metavar="N", help=f"{what} (default: %(default)s)"
        )
    command.add_argument(
        "--timeout",
        type=finite,
        default=300.0,
        metavar="SECONDS",
        help="after which a request is given up (default: %(default)s)",
    )
    command.add_argument(
        "--drain",
        type=finite,
        default=30.0,
        metavar="SECONDS",
        help="that requests have to end when the server is stopped (default: %(default)s)",
    )
    command.add_argument(
        "--log-prompts",
        action="store_true",
        help="write what is asked to the log, images included",
    )


def serve(options: argparse.Namespace) -> None:
    """Load the model and answer requests until SIGINT or SIGTERM."""
    missing = [
        name
        for name in ("fastapi", "uvicorn", "prometheus_client", "python_multipart")
        if importlib.util.find_spec(name) is None
    ]
    if missing:
        raise ValueError(
            f"{', '.join(missing)} is not installed; pip install 'mmdlm[serve]' installs what a "
            "server needs"
        )
    from mmdlm.serving.settings import ServerSettings

    settings = ServerSettings(
        model_name=options.name or Path(options.model).name,
        api_keys=_keys(options.api_key_file),
        cors_origins=tuple(options.cors_origin),
        max_batch_size=options.max_batch_size,
        max_queue=options.max_queue,
        max_choices=options.max_choices,
        max_body_bytes=options.max_body_bytes,
        max_pixels=options.max_pixels,
        max_new_tokens=options.max_new_tokens,
        max_steps=options.max_steps,
        timeout=options.timeout,
        drain=options.drain,
        log_prompts=options.log_prompts,
    )
    from mmdlm.serving.server import listen, run

    with listen(options.host, options.port) as socket:  # refused before the model is loaded
        run(load_model(options, None), settings, socket)


def _keys(file: Path | None) -> tuple[str, ...]:
    """Return the API keys of a file and of the environment."""
    keys = [] if file is None else file.read_text(encoding="utf-8").splitlines()
    keys = [key.strip() for key in [*keys, *os.environ.get(KEYS, "").split(",")]]
    found = tuple(key for key in keys if key)
    if file is not None and not found:
        raise ValueError(f"--api-key-file {str(file)!r} holds no key; write one a line")
    return found


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port, a whole number up to 65535")
    return int(text)
