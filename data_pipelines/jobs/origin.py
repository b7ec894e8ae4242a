"""What a job was given, in a form that an index can hold: so that changed data is noticed.

A file is the same where its size and time are, or else its sha256. Of many images that would take
too long: they are the same where all their sizes and times are.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fsspec

from data_pipelines.shards.shards import INDEX, read_json

State = dict[str, Any]  # of a file or folder, as JSON can hold it


@dataclass(frozen=True)
class Given:
    """What a job reads.

    Attributes:
        files: Paths or URLs by their names; nothing is known of what a server or a command gives.
        folders: Images by the folder that they are in.
    """

    files: Mapping[str, str]
    folders: Mapping[str, list[Path]] = field(default_factory=dict)

    @classmethod
    def shards(cls, urls: list[str]) -> Given:
        """Shards, by their own names where these differ."""
        names = [os.path.basename(url) for url in urls]
        return cls(dict(zip(urls if len(set(names)) < len(names) else names, urls, strict=True)))

    def states(self) -> dict[str, State]:
        """Return the states of all files, for an index."""
        folders = {name: folder_state(name, files) for name, files in self.folders.items()}
        return {name: file_state(url) for name, url in self.files.items()} | folders

    def changes(self, before: Mapping[str, State]) -> list[str]:
        """Return a sentence for each file that is not as an index says."""
        gone = [f"{name} is gone" for name in sorted(set(before) - {*self.files, *self.folders})]
        files = [
            change_of(name, before.get(name), file_state(url))
            for name, url in self.files.items()
            if not is_same_file(before.get(name), url)
        ]
        folders = [
            change_of(name, before.get(name), now)
            for name, files in self.folders.items()
            if (now := folder_state(name, files)) != before.get(name)
        ]
        return gone + files + folders


def is_done(
    target: Path, settings: Mapping[str, Any], given: Given, *, index: Path | None = None
) -> bool:
    """Return whether `target` was already made, with these settings, of the given data.

    Args:
        target: File or folder that the job writes.
        settings: Of the job.
        given: Files that the job reads.
        index: File that says of what `target` was made; default: itself.

    Returns:
        True where nothing is left to be done.

    Raises:
        ValueError: Where it was made otherwise, or of data that has changed since.
    """
    if not target.is_file():
        return False
    index = index or target
    if not index.is_file():
        raise ValueError(
            f"{target} is there, but no {index.name} that says of what it was made; name another "
            "--out, or delete it to make it again"
        )
    place = target.parent if index.name == INDEX else target
    record = read_json(index)
    for name in ("settings", "given"):
        if not isinstance(record.get(name), dict):
            raise ValueError(
                f"{index} does not say of which {name} {place} is; delete {place} to make it "
                "again, or name another --out"
            )
    before = record["settings"]
    names = [name for name in {**settings, **before} if before.get(name) != settings.get(name)]
    if names:
        said = ", ".join(f"{k} was {before.get(k)}, now {settings.get(k)}" for k in names)
        raise ValueError(f"{place} is of other settings ({said}); name another --out")
    if changes := given.changes(record["given"]):
        raise ValueError(
            f"{place} is of data that has changed since: {'; '.join(changes)}. Delete {place} "
            "to make it again, or name another --out"
        )
    print(f"{place}: already written{of_unknown(record['given'].values())}")
    return True


def of_unknown(states: Iterable[State]) -> str:
    """Return what to add to "already written" where the state of the data then is unknown."""
    known = [bool(state) for state in states]
    return "" if known and all(known) else ", of data that is not compared with what it is now"


def file_state(url: str) -> State:
    """Return size, time and sha256 of a local file, or what its store tells a file by.

    Of what comes by http or from a command nothing is known: the state is empty.
    """
    if url.startswith(("pipe:", "http://", "https://")):
        return {}
    if "://" in url:
        filesystem, inner = fsspec.core.url_to_fs(url)
        return {"store": str(filesystem.ukey(inner))}
    found = os.stat(url)
    with open(url, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": found.st_size, "time": found.st_mtime_ns, "sha256": digest}


def is_same_file(before: State | None, url: str) -> bool:
    """Return whether a file is unchanged; its content is read only where its time differs."""
    if isinstance(before, dict) and "sha256" in before and os.path.isfile(url):
        found = os.stat(url)
        if found.st_size != before.get("bytes"):
            return False
        same = found.st_mtime_ns == before.get("time")
        return same or file_state(url)["sha256"] == before["sha256"]
    return before == file_state(url)


def folder_state(folder: str, files: Iterable[Path]) -> State:
    """Return the state of a folder: number and size of its files, and a digest over their times."""
    digest, count, size = hashlib.sha256(), 0, 0
    for path in files:
        found = path.stat() if path.exists() else path.lstat()
        name = os.path.relpath(path, folder)
        digest.update(f"{name}\0{found.st_size}\0{found.st_mtime_ns}\n".encode(errors="replace"))
        count += 1
        size += found.st_size
    return {"files": count, "bytes": size, "digest": digest.hexdigest()}


def change_of(name: str, before: State | None, now: State) -> str:
    """Say in words how what is called `name` differs."""
    if not isinstance(before, dict):
        return f"{name} is new"
    for counted in ("files", "bytes"):
        if before.get(counted) != now.get(counted):
            return f"{name} has {now.get(counted)} {counted} and had {before.get(counted)}"
    return f"{name} has other contents or times"
