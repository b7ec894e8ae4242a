"""Find the folder of a checkpoint: bundled, on this machine, or on the Hugging Face Hub."""

from __future__ import annotations

import re
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from huggingface_hub import snapshot_download

from mmdlm.models.checkpoints.run_steps import find_in_run
from mmdlm.vision.checkpoint_files import reason_of

BUNDLED = Path(__file__).parents[1] / "checkpoints"
HUB_NAME = re.compile(r"\w[\w.-]*/[\w.-]+")
HUB_FILES = ("*.json", "*.safetensors", "*.txt", "*.jinja")  # never code


@dataclass(frozen=True)
class Hub:
    """How the Hugging Face Hub is asked.

    Attributes:
        revision: Branch, tag or commit of the model's repository; None: its main branch.
        token: Of an account; None: the one that was stored by `hf auth login`; False: none.
        cache_dir: Where files are kept; None: the Hub's usual place.
        local_files_only: Take what was downloaded before; ask nothing.
    """

    revision: str | None = None
    token: str | bool | None = None
    cache_dir: str | PathLike[str] | None = None
    local_files_only: bool = False

    def checkpoint(self, name_or_path: str | PathLike[str]) -> Path:
        """Find the folder behind a bundled name, a path, a run or the name of a repository.

        Args:
            name_or_path: Of the model.

        Returns:
            A folder on this machine.

        Raises:
            ValueError: If there is none, or if a revision is given for what is no repository.
        """
        name = str(name_or_path)
        bundled = sorted(path.parent.name for path in BUNDLED.glob("*/config.json"))
        path = Path(name_or_path).expanduser()
        local = BUNDLED / name if name in bundled else None
        if local is None and name.strip():  # Path("") is the current folder
            local = find_in_run(path) or (path if path.is_dir() else None)
        if local is not None:
            if self.revision is not None:
                raise ValueError(
                    f"revision {self.revision!r} is of a repository of the Hugging Face Hub, but "
                    f"{name!r} is on this machine; leave one of both out"
                )
            return local
        choice = (
            f"give a bundled name ({', '.join(bundled) or 'none is installed'}), the folder of a "
            "checkpoint or of a run, or OWNER/NAME of the Hugging Face Hub"
        )
        if path.is_file():
            raise ValueError(f"{name!r} is a file, not a model; {choice}")
        if not HUB_NAME.fullmatch(name):
            raise ValueError(f"no model {name!r}; {choice}")
        try:
            return self._snapshot(name, list(HUB_FILES), revision=self.revision)
        except (OSError, ValueError) as error:  # the hub's own errors are of these kinds
            raise ValueError(
                f"no folder {name!r}, and the Hugging Face Hub does not give it "
                f"({first_sentence(error)}); {choice}"
            ) from error

    def part(self, name_or_path: str | PathLike[str], what: str) -> Path:
        """Find a folder, or one of the Hub: OWNER/NAME, OWNER/NAME/FOLDER, at its main branch.

        Args:
            name_or_path: Where it is.
            what: The argument that names it, for messages.

        Returns:
            A folder on this machine.

        Raises:
            ValueError: If there is none.
        """
        path = Path(name_or_path).expanduser()
        if path.is_dir():
            return path
        name = str(name_or_path)
        owner_and_name, inside = "/".join(name.split("/")[:2]), "/".join(name.split("/")[2:])
        if not HUB_NAME.fullmatch(owner_and_name) or path.is_absolute():
            raise ValueError(
                f"{what}: no folder {name!r}; give a folder, or OWNER/NAME of the Hugging Face Hub"
            )
        patterns = [f"{inside}/{pattern}" if inside else pattern for pattern in HUB_FILES]
        try:
            return self._snapshot(owner_and_name, patterns) / inside
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{what}: no folder {name!r}, and the Hugging Face Hub does not give it "
                f"({first_sentence(error)}); name a folder: {what}=FOLDER"
            ) from error

    def _snapshot(self, name: str, patterns: list[str], *, revision: str | None = None) -> Path:
        return Path(
            snapshot_download(
                name,
                revision=revision,
                token=self.token,
                cache_dir=None if self.cache_dir is None else Path(self.cache_dir),
                local_files_only=self.local_files_only,
                allow_patterns=patterns,
            )
        )


def find_checkpoint(name_or_path: str | PathLike[str]) -> Path:
    """Find the folder of a checkpoint; see `Hub.checkpoint`."""
    return Hub().checkpoint(name_or_path)


def first_sentence(error: BaseException) -> str:
    """Return the first sentence of an error of the Hub, or of torch."""
    return reason_of(error).split(". ")[0]
