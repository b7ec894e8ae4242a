"""URLs are fetched where it is asked for by name, and what goes wrong is one sentence."""

from __future__ import annotations

import base64
import io
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from PIL import Image

import mmdlm
from mmdlm.vision import image_urls


def png() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 6), (255, 0, 0)).save(file, "PNG")
    return file.getvalue()


class Server(BaseHTTPRequestHandler):
    """Gives an image, a text, an error, or a redirect to a file."""

    def do_GET(self) -> None:
        if self.path == "/away":
            self.send_response(302)
            self.send_header("Location", "ftp://example.org/image.png")
            self.end_headers()
            return
        if self.path == "/missing":
            self.send_error(404)
            return
        self.send_response(200)
        self.end_headers()
        self.wfile.write(png() if self.path == "/image.png" else b"hello")

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    running = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    thread = threading.Thread(target=running.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{running.server_address[1]}"
    running.shutdown()
    thread.join()
    running.server_close()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def test_an_image_is_fetched_from_a_url_a_data_url_or_a_file(server: str, tmp_path: Path) -> None:
    (tmp_path / "image.png").write_bytes(png())
    data = "data:image/png;base64," + base64.b64encode(png()).decode()
    for source in (f"{server}/image.png", data, tmp_path / "image.png"):
        assert mmdlm.load_image(source).size == (8, 6)


def test_what_cannot_be_fetched_is_said(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for url, message in (
        (f"{server}/missing", "the server says 404"),
        (f"{server}/text", "/text': cannot read the image .* it is none of PNG"),
        (f"{server}/away", "cannot be fetched"),
        ("file:///etc/hostname", "no http or https URL"),
        ("http://127.0.0.1:1/image.png", "cannot be fetched .*refused"),
        ("data:image/png,abc", "no data URL of an image"),
        ("data:image/png;base64,a", "no data URL of an image"),
    ):
        with pytest.raises(ValueError, match=message):
            mmdlm.load_image(url)
    with pytest.raises(ValueError, match="has more than 20 bytes"):
        image_urls.fetch(f"{server}/image.png", max_bytes=20)
