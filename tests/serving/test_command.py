"""`mmdlm serve` as a process: it starts, says where, drains and ends."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import httpx2 as httpx
import pytest

from mmdlm.cli.main import main
from mmdlm.serving.settings import ServerSettings

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_a_server_that_is_told_to_stop_answers_what_it_was_asked(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("first\n\nsecond\n")
    command = [sys.executable, "-m", "mmdlm.cli", "serve", "--port", "0", "--api-key-file", keys]
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | {"MMDLM_API_KEYS": ""},
    )
    try:
        assert process.stderr is not None
        said = process.stderr.readline()
        match = re.search(r"'emoji' is served at (http://127.0.0.1:\d+/v1)", said)
        assert match, said
        answers: list[httpx.Response] = []

        def ask() -> None:
            body = {"prompt": "cat", "num_inference_steps": 40}
            headers = {"Authorization": "Bearer second"}
            url = f"{match[1]}/images/generations"
            answers.append(httpx.post(url, json=body, headers=headers, timeout=120))

        assert httpx.get(f"{match[1]}/models", timeout=60).status_code == 401
        thread = threading.Thread(target=ask)
        thread.start()
        metrics = match[1].removesuffix("v1") + "metrics"
        headers = {"Authorization": "Bearer first"}
        while "mmdlm_batch_rows 1.0" not in httpx.get(metrics, headers=headers).text:
            pass
        process.send_signal(signal.SIGTERM)
        thread.join()
        assert answers[0].status_code == 200
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.communicate()


def test_an_address_that_is_taken_is_told_before_the_model_is_loaded(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", "--port", str(port), "--model", "/nowhere"]) == 2
    assert f"cannot listen at 127.0.0.1:{port}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--port", "70000"], "'70000' is not a port"),
        (["--api-key-file", "/nowhere/keys"], "/nowhere/keys"),
        (["--max-batch-size", "0"], "'0' is not a whole number of at least 1"),
        (["--timeout", "-1"], "timeout must be above 0"),
        (["--host", "no.such.host.invalid"], "cannot listen at no.such.host.invalid:8000"),
    ],
)
def test_options_that_cannot_be(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="max_queue must not be negative, got -1"):
        ServerSettings("a", max_queue=-1)
    with pytest.raises(ValueError, match="an API key is empty"):
        ServerSettings("a", api_keys=(" ",))
