"""Hold a conversation in a terminal, or over a pipe: a line in, an answer out."""

from __future__ import annotations

import io
import re
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from PIL import Image

COMMANDS = "/image PATH, /new and /quit"
COMMAND = re.compile(r"/(\w+)(?:\s+(.*))?")


def forgive_encodings() -> None:
    """Write and read UTF-8, whatever the console says its encoding is: nothing is lost by it.

    What is no text is escaped; bytes of the input that are not UTF-8 become halves of characters,
    which are refused where they are used.
    """
    for stream, errors in (
        (sys.stdout, "backslashreplace"),
        (sys.stderr, "backslashreplace"),
        (sys.stdin, "surrogateescape"),
    ):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors=errors)


class Speaker(Protocol):
    """Continues a conversation."""

    def __call__(self, messages: list[dict[str, str]], images: list[Image.Image]) -> str:
        """Return the assistant's next turn; ValueError if there is none."""
        ...


@dataclass
class Conversation:
    """What was said so far, and the images that were shown.

    `/image PATH` shows an image with the next message, `/new` forgets what was said, `/quit` ends
    it. A line that fails leaves the conversation as it was.

    Attributes:
        speak: The model.
        system: A message that comes first, and stays.
        max_pixels: As `open_image` has it.
        messages: What was said.
        images: What was shown.
        waiting: Images to be shown with the next message.
    """

    speak: Speaker
    system: str | None = None
    max_pixels: int | None = None
    messages: list[dict[str, str]] = field(default_factory=list)
    images: list[Image.Image] = field(default_factory=list)
    waiting: list[Image.Image] = field(default_factory=list)  # shown with the next message

    def say(self, line: str) -> str | None:
        """Answer a message; run a command, which gives None.

        Args:
            line: What the user typed.

        Returns:
            The answer.

        Raises:
            ValueError: For a command that is not known, an image that cannot be read and what the
                model refuses; the conversation is as it was.
        """
        command = COMMAND.fullmatch(line)
        if command is None:
            return self._answered(line)
        name, argument = command[1], (command[2] or "").strip()
        if name == "image" and argument:
            self._show(argument)
        elif name == "new" and not argument:
            self.messages, self.images, self.waiting = [], [], []
        else:
            raise ValueError(f"there is no command {line!r}; there are {COMMANDS}")
        return None

    def _answered(self, line: str) -> str:
        from mmdlm.templates.conversation import IMAGE
        from mmdlm.templates.infill import check_whole

        check_whole(line)
        places = " ".join([IMAGE] * len(self.waiting))
        # `<image>` in a line says where the images stand; otherwise they come before it.
        text = line if IMAGE in line or not self.waiting else f"{places}\n{line}"
        messages = [*self.messages, {"role": "user", "content": text}]
        images = [*self.images, *self.waiting]
        first = [] if self.system is None else [{"role": "system", "content": self.system}]
        answer = self.speak([*first, *messages], images)
        if answer:  # nothing said is nothing to remember
            messages.append({"role": "assistant", "content": answer})
            self.messages, self.images, self.waiting = messages, images, []
        return answer

    def _show(self, path: str) -> None:
        from mmdlm.vision.image_files import open_image
        from mmdlm.vision.pixels import check_visible

        image = open_image(path, max_pixels=self.max_pixels)
        check_visible(*image.size)  # or every line after it would fail
        self.waiting.append(image)
