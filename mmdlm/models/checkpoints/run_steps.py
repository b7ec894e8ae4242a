"""Steps of a training run as checkpoints: averaged weights, all else from the run's setup.

RUN/setup/          config.json, tokenizers, generation_config.json: written once, as the run begins
RUN/step_00000100/  weights, their averages, and what the run continues from
RUN/final/          a whole model, when the run is finished
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmdlm.models.checkpoints.checkpoint import Checkpoint, local_folder, tensors_of
from mmdlm.models.checkpoints.stored_tensor import StoredTensor
from mmdlm.models.families.auto import family_of
from mmdlm.vision.checkpoint_files import read_json
from mmdlm.vision.digests import THREADS, digest_of

SETUP, FINAL = "setup", "final"
MODEL = "model"  # of what `train.own_images` writes, the run of the model
STEP = re.compile(r"step_(\d+)")
UNFINISHED = re.compile(r"step_(\d+)\.(?:part|old)")
WEIGHTS, AVERAGES = "model.safetensors", "averages.safetensors"
SHARDED, MANIFEST, BASE = "sharded", "manifest.json", "base.json"
PREFIX = "denoiser."  # of the denoiser's tensors in the state of a stage of training
OURS = ("mmdlm", "mmdlm_encoder")
DOWN, UP = ".lora_A.default.weight", ".lora_B.default.weight"  # PEFT's names of the matrices
SMALL = 1 << 16  # bytes of a tensor that a fingerprint reads


def completed(run: Path) -> list[tuple[int, Path]]:
    """Return the complete steps of a run with their numbers, in any order."""
    matches = ((STEP.fullmatch(path.name), path) for path in run.iterdir())
    return [(int(match[1]), path) for match, path in matches if match]


def find_in_run(path: Path) -> Path | None:
    """Return the folder of weights that a path in a run stands for; None for a path in no run.

    A run stands for its final weights, or else for its newest step; the folder of a run over one's
    own images for the model in it. `step_100` is the step of that number, however many zeros its
    folder's name has.

    Args:
        path: A run, a step of it, or any other path.

    Returns:
        A folder with weights, or None.

    Raises:
        ValueError: For a run without weights yet, a step that is not there, and one that was not
            written to its end.
    """
    number = STEP.fullmatch(path.name) or UNFINISHED.fullmatch(path.name)
    if number is not None and not (path / "config.json").exists():
        run = path.parent
        steps = sorted(completed(run)) if run.is_dir() else []
        if path.is_dir() and STEP.fullmatch(path.name):
            return path
        if UNFINISHED.fullmatch(path.name) and path.is_dir():
            raise ValueError(
                f"{path} is not complete: it is being written, or its run was killed meanwhile; "
                f"{_instead(run, int(number[1]))}"
            )
        if steps:
            same = [one for count, one in steps if count == int(number[1])]
            if not same:
                there = [one.name for _, one in steps]
                there += [FINAL] if (run / FINAL).is_dir() else []
                raise ValueError(f"{run} has no {path.name}; it has {', '.join(there)}")
            return same[0]
    if not path.is_dir() or (path / "config.json").exists():
        return None
    if (path / FINAL).is_dir():
        return path / FINAL
    if steps := completed(path):
        return max(steps)[1]
    if (path / SETUP).is_dir():
        raise ValueError(
            f"{path} is a run without a checkpoint yet; the first one is written after "
            "training.save_steps steps"
        )
    return find_in_run(path / MODEL) if (path / MODEL).is_dir() else None


def parts_of(folder: Path) -> Path:
    """Return the folder of a checkpoint's config.json, tokenizers and generation_config.json.

    It is the checkpoint's own; for a step of a run, the run's setup.
    """
    step = RunStep.of(folder)
    return folder if step is None else step.setup


def open_checkpoint(folder: Path) -> Checkpoint:
    """Return the checkpoint in a folder, a step of a run included.

    Args:
        folder: Of a model, or a step of a run.

    Returns:
        Its config and where its tensors lie.

    Raises:
        ValueError: See `Checkpoint.open` and `RunStep.checkpoint`.
    """
    step = RunStep.of(folder)
    return Checkpoint.open(folder) if step is None else step.checkpoint()


@dataclass(frozen=True)
class RunStep:
    """One step of a run.

    Attributes:
        folder: Of the step, in that of its run.
        number: Of optimizer steps that were done.
    """

    folder: Path
    number: int

    @classmethod
    def of(cls, folder: Path) -> RunStep | None:
        """Return the step in a folder; None for a folder that is none."""
        match = STEP.fullmatch(folder.resolve().name)
        if match is None or (folder / "config.json").exists():
            return None
        return cls(folder, int(match[1]))

    @property
    def run(self) -> Path:
        """Return the folder of the run."""
        return self.folder.resolve().parent if self.folder == Path() else self.folder.parent

    @property
    def setup(self) -> Path:
        """Return the folder of what all steps of the run have in common.

        Raises:
            ValueError: Where the run has none.
        """
        setup = self.run / SETUP
        if not (setup / "config.json").is_file():
            raise ValueError(
                f"{self.run} has no {SETUP}/config.json beside its steps, so that they cannot be "
                "asked; the command of a run that trains a model writes it when it is started again"
            )
        return setup

    @property
    def files(self) -> dict[str, str]:
        """Return the names of the files of weights that are read, with their sha256."""
        entries = json.loads((self.folder / MANIFEST).read_text(encoding="utf-8"))
        return {name: entries[name]["sha256"] for name in (WEIGHTS, AVERAGES)}

    @property
    def is_averaged(self) -> bool:
        """Return whether the run keeps averages of its weights."""
        return bool(tensors_of(self.folder / AVERAGES))

    @property
    def ending(self) -> str:
        """Say how the run is ended where it is, so that its final weights can be asked."""
        newest = max((number for number, _ in completed(self.run)), default=self.number)
        return (
            f"start the run's own command with --training.max_steps {newest}, which ends it there, "
            f"then ask {self.run / FINAL}"
        )

    def checkpoint(self) -> Checkpoint:
        """Return the averaged weights, and those that have no average, under the run's config.

        Weights that the run leaves as they are come from the model that it started from, with the
        products of matrices of low rank added to them.

        Returns:
            A checkpoint whose tensors are read on demand.

        Raises:
            ValueError: For a step that is damaged, sharded, or whose frozen weights are not there.
        """
        setup = self.setup
        if (self.folder / SHARDED).is_dir():
            raise ValueError(
                f"{self.folder} holds weights in shards of several processes (FSDP), which are put "
                f"together at the end: {self.ending}"
            )
        damage = damage_of(self.folder, digested=(WEIGHTS, AVERAGES))
        if damage is not None:
            raise ValueError(
                f"{self.folder} is damaged ({damage}); {_instead(self.run, self.number)}"
            )
        own = {
            name.removeprefix(PREFIX): tensor
            for file in (WEIGHTS, AVERAGES)
            for name, tensor in tensors_of(self.folder / file).items()
        }
        shards = [self.folder / WEIGHTS, self.folder / AVERAGES]
        base = Base.read(setup)
        if base is not None:
            below = base.checkpoint(self)
            shards += below.shards
            own = _over(_ours(below), own, scale=base.scale)
        config = read_json(setup / "config.json")
        if not isinstance(config, dict):
            raise ValueError(f"{setup / 'config.json'} holds no object {{...}}")
        return Checkpoint(self.folder, config, tuple(shards), own)


@dataclass(frozen=True)
class Base:
    """The model that a run started from, whose frozen weights no step holds.

    Attributes:
        name: As the run was told it; empty for a run from nothing.
        folder: Where it was found.
        fingerprint: Of its weights, see `fingerprint`.
        scale: Of the products of matrices of low rank; None: there are none.
        lacks: A tensor that was not trained and is not there either; empty: all are.
    """

    name: str
    folder: str
    fingerprint: str
    scale: float | None
    lacks: str = ""

    @classmethod
    def of(
        cls, name: str, folder: Path | None, *, frozen: Collection[str], scale: float | None
    ) -> Base:
        """Describe what a run starts from.

        Args:
            name: As the run was told it.
            folder: Where it lies; None for a run from nothing.
            frozen: Our names of the tensors that are not trained.
            scale: Of the products of matrices of low rank, if any.

        Returns:
            The description, which the run stores beside its steps.
        """
        checkpoint = None if folder is None else open_checkpoint(folder)
        there = set() if checkpoint is None else _ours(checkpoint).keys()
        lacks = min(set(frozen) - there, default="")
        if folder is None or checkpoint is None:
            return cls(name, "", "", scale, lacks)
        return cls(name, str(folder.resolve()), fingerprint(checkpoint), scale, lacks)

    def write(self, setup: Path) -> None:
        """Write it into the setup of a run."""
        (setup / BASE).write_text(json.dumps(vars(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, setup: Path) -> Base | None:
        """Read it from the setup of a run; None for a run that trains all weights.

        Args:
            setup: Folder of the run's setup.

        Returns:
            What the run started from, or None.

        Raises:
            ValueError: For a file that does not describe one.
        """
        if not (setup / BASE).is_file():
            return None
        content = read_json(setup / BASE)
        try:
            base = cls(**content)
            return cls(
                name=str(base.name),
                folder=str(base.folder),
                fingerprint=str(base.fingerprint),
                scale=None if base.scale is None else float(base.scale),
                lacks=str(base.lacks),
            )
        except (TypeError, ValueError) as error:
            raise ValueError(f"{setup / BASE} does not describe a model ({error})") from error

    def checkpoint(self, step: RunStep) -> Checkpoint:
        """Return its checkpoint.

        Args:
            step: That was written on top of it.

        Returns:
            The checkpoint that the run started from.

        Raises:
            ValueError: Where it is not there, or is another one by now.
        """
        if self.lacks:
            raise ValueError(
                f"{step.folder} leaves out weights that were not trained ({self.lacks} ...) and "
                f"are in no other folder: {step.ending}"
            )
        named = Path(self.name).expanduser()
        found = [one for one in (Path(self.folder), named) if one.is_dir()]
        said = (
            f"{step.folder} leaves out the weights that were not trained, those of {self.name!r}, "
        )
        try:
            checkpoint = open_checkpoint(found[0] if found else local_folder(self.name))
        except (OSError, ValueError) as error:  # the hub's own errors are of these kinds
            raise ValueError(
                f"{said}which is not at {self.folder} and cannot be had by its name; put it there"
            ) from error
        if checkpoint.config.get("quantization_config"):
            raise ValueError(
                f"{said}which are stored quantized, so that nothing can be added to them; ask "
                f"--model {self.name} with --adapter {step.run / 'adapter'}, which the end of the "
                "run writes"
            )
        if fingerprint(checkpoint) != self.fingerprint:
            raise ValueError(
                f"{said}but {checkpoint.folder} holds other weights by now; put those back"
            )
        return checkpoint


@dataclass(frozen=True, kw_only=True)
class SummedTensor(StoredTensor):
    """A stored tensor and the product of two matrices of low rank: W + scale * up @ down."""

    down: StoredTensor
    up: StoredTensor
    scale: float

    def __getitem__(self, index: Any) -> Tensor:
        """Return the sum for `...`, a part of it for slices; it is added up in float32."""
        stored = StoredTensor(self.shard, self.name, self.shape, self.dtype, read=self.read)
        total = stored[...].to(torch.float32, copy=True)
        total.addmm_(self.up[...].float(), self.down[...].float(), alpha=self.scale)
        whole = total.to(self.target or self.dtype)
        return whole if index is Ellipsis else whole[index]


def fingerprint(checkpoint: Checkpoint) -> str:
    """Return a digest of the names and shapes of all tensors, and of what small ones hold.

    Training that changes all weights changes those of the norms, which are small: other weights in
    the same place are told from those that were there.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(checkpoint.tensors):
        tensor = checkpoint.tensors[name]
        digest.update(f"{name} {list(tensor.shape)} {tensor.dtype};".encode())
        if tensor.nbytes <= SMALL:
            content = tensor[...].contiguous().view(-1).view(torch.uint8)
            digest.update(content.numpy().tobytes())
    return digest.hexdigest()


def damage_of(folder: Path, *, digested: Collection[str] | None = None) -> str | None:
    """Return what of a step is not as it was written; None: nothing.

    Args:
        folder: Of the step.
        digested: Names of files whose content is compared; None: all. Of others the size is.

    Returns:
        One sentence, or None.
    """
    if not folder.is_dir():
        return "it is no folder"
    if not (folder / MANIFEST).is_file():
        return f"{MANIFEST} is missing, or another version wrote the checkpoint"
    try:
        entries = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        sizes = {str(name): int(entry["bytes"]) for name, entry in entries.items()}
        digests = {str(name): str(entry["sha256"]) for name, entry in entries.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        return f"{MANIFEST} cannot be read: {type(error).__name__}"
    for name in digested or ():
        if name not in sizes:
            return f"{name} is not in its {MANIFEST}"
    for name, size in sizes.items():
        path = folder / name
        if ".." in Path(name).parts or not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes of {size}"
    names = [name for name in sizes if digested is None or name in digested]
    try:
        with ThreadPoolExecutor(THREADS) as pool:
            found = list(pool.map(lambda name: digest_of(folder / name), names))
    except OSError as error:
        return str(error)
    changed = [name for name, digest in zip(names, found, strict=True) if digest != digests[name]]
    return f"{changed[0]} has another content than was written" if changed else None


def _instead(run: Path, number: int) -> str:
    """Say which step can be asked in place of one of this number."""
    for count, path in sorted(completed(run), reverse=True):
        if count < number and damage_of(path, digested=(WEIGHTS, AVERAGES)) is None:
            return f"ask {path}, which is intact, in its place"
    return "no step before it is intact"


def _ours(checkpoint: Checkpoint) -> dict[str, StoredTensor]:
    """Return the tensors of a checkpoint by our names."""
    if checkpoint.config.get("model_type") in OURS:
        return checkpoint.tensors
    names = family_of(checkpoint.config, checkpoint.shapes).weights.rename(checkpoint.shapes)
    return {names.get(name, name): tensor for name, tensor in checkpoint.tensors.items()}


def _over(
    base: dict[str, StoredTensor], own: dict[str, StoredTensor], *, scale: float | None
) -> dict[str, StoredTensor]:
    """Put tensors of a step over those of the model that its run started from.

    Raises:
        ValueError: For a matrix of low rank that has no place there.
    """
    whole = {name: tensor for name, tensor in own.items() if not name.endswith((DOWN, UP))}
    tensors = base | whole
    for name in own.keys() - whole.keys():
        module = name.removesuffix(DOWN)
        if module == name:
            continue  # its twin comes by
        below, up = base.get(f"{module}.weight"), own.get(f"{module}{UP}")
        if below is None or up is None or scale is None:
            raise ValueError(f"{name} has no weight in the model that the run started from")
        down = own[name]
        tensors[f"{module}.weight"] = SummedTensor(
            below.shard, below.name, below.shape, below.dtype, down=down, up=up, scale=scale
        )
    return tensors
