"""Hold how each task is decoded if the caller does not say; a checkpoint may carry its own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from os import PathLike
from pathlib import Path
from typing import Any

from mmdlm.pipeline.checks import check_choice, check_whole_number, is_whole
from mmdlm.pipeline.generation_config import PARALLEL, GenerationConfig
from mmdlm.pipeline.sampler_names import RANKED
from mmdlm.vision.checkpoint_files import reason_of
from mmdlm.vision.known_names import suggestion
from mmdlm.vision.pixels import Fit

GENERATION = "generation_config.json"  # where a checkpoint carries its own defaults


@dataclass(frozen=True)
class Defaults:
    """What each task does unless told otherwise, and how images meet texts of any length.

    A checkpoint may carry its own in generation_config.json: {"caption": {"temperature": 0.5}};
    what is not there stays as it is here.

    Attributes:
        text_to_image: Of `Model.text_to_image` and `draw_trajectory`.
        inpaint: Of `Model.inpaint`.
        caption: Of `Model.caption`.
        infill: Of `Model.infill`.
        answer: Of `Model.answer` and `chat`.
        complete: Of `Model.complete`.
        edit: Of `Model.edit`.
        fit: How an image meets the tokenizer's square, see `mmdlm.vision.pixels`.
        max_text_tokens: Length of a caption, its end included, if the checkpoint does not fix it.
        max_new_tokens: Length of an answer or a completion, for which their num_inference_steps
            are.
    """

    text_to_image: GenerationConfig = GenerationConfig(
        12, guidance_scale=2.0, temperature=0.5, order_temperature=1.0, schedule="cosine"
    )
    inpaint: GenerationConfig = GenerationConfig(
        12, guidance_scale=2.0, temperature=0.5, order_temperature=1.0, schedule="cosine"
    )
    caption: GenerationConfig = GenerationConfig(16)
    infill: GenerationConfig = GenerationConfig(16)
    answer: GenerationConfig = GenerationConfig(128)
    complete: GenerationConfig = GenerationConfig(128)
    edit: GenerationConfig = GenerationConfig(
        12, guidance_scale=2.0, temperature=0.5, order_temperature=1.0, schedule="cosine"
    )
    fit: Fit = "pad"
    max_text_tokens: int = 64
    max_new_tokens: int = 128

    def __post_init__(self) -> None:
        """Check the values that belong to no task."""
        check_choice("fit", self.fit, Fit)
        tokens = self.max_text_tokens
        if not is_whole(tokens) or tokens < 2:
            raise ValueError(f"max_text_tokens must be a whole number above 1, got {tokens!r}")
        check_whole_number("max_new_tokens", self.max_new_tokens, least=1)

    def updated(self, generation: Mapping[str, Any]) -> Defaults:
        """Return them with the entries of a generation_config.json.

        Args:
            generation: Values by key.

        Returns:
            New defaults; these stay as they are.

        Raises:
            ValueError: For an unknown key or a bad value.
        """
        result: Defaults = _updated(self, generation)
        return result

    def to_json(self) -> str:
        """Return the text of a generation_config.json.

        Returns:
            JSON that `from_json` reads.

        Raises:
            ValueError: For an order, schedule or cache of one's own, which has no name there.
        """
        for task in fields(self):
            generation_config = getattr(self, task.name)
            own = (
                ("order", "schedule", "cache")
                if isinstance(generation_config, GenerationConfig)
                else ()
            )
            for name in own:
                if not isinstance(getattr(generation_config, name), str | None):
                    raise ValueError(
                        f"{task.name}.{name} {getattr(generation_config, name)!r} is a class of "
                        "your own, which a checkpoint cannot carry; leave it out here and give it "
                        "where the model is asked"
                    )
        return json.dumps(asdict(self), indent=2) + "\n"

    def in_each_task(self, **values: Any) -> Defaults:
        """Return them with some values of `GenerationConfig` in all tasks.

        Of values that exclude each other, what is given takes the place of what is there.

        Args:
            **values: Fields of `GenerationConfig`; None leaves what is there.

        Returns:
            New defaults; these stay as they are.
        """
        given = {name: value for name, value in values.items() if value is not None}
        parallel = [name for name in PARALLEL if name in given]
        if len(parallel) == 1:
            given |= {name: None for name in PARALLEL if name not in given}
            if parallel != ["threshold"]:
                given.setdefault("threshold_exclusive", False)
        if "order" in given:
            if given["order"] not in RANKED:  # no order that noise would be on
                given.setdefault("order_temperature", 0.0)
            if given["order"] != "entropy":
                given.setdefault("entropy_bound", None)
        if "reproduce" in given:
            given.setdefault("schedule", None)  # that of the published sampler
        if given.get("schedule", "shifted") != "shifted":
            given.setdefault("shift", GenerationConfig.shift)
        tasks = {f.name: getattr(self, f.name) for f in fields(self)}
        changed: dict[str, Any] = {
            name: replace(task, **given)
            for name, task in tasks.items()
            if isinstance(task, GenerationConfig)
        }
        return replace(self, **changed)

    @classmethod
    def from_json(
        cls, path: str | PathLike[str], *, generation: Mapping[str, Any] | None = None
    ) -> Defaults:
        """Read a generation_config.json; without the file, the defaults above.

        Args:
            path: The file.
            generation: What the defaults are before the file is read: the sampling of a published
                family.

        Returns:
            The defaults of each task.

        Raises:
            ValueError: If the file is not JSON, has an unknown key or a bad value; the message
                names the file.
        """
        path = Path(path)
        usual = cls().updated(generation or {})
        try:
            given = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return usual
        except (OSError, ValueError, RecursionError) as error:  # a JSON error is a ValueError
            raise ValueError(
                f"{path} cannot be read ({reason_of(error)}); mend it or remove it"
            ) from error
        try:
            return usual.updated(given)
        except ValueError as error:
            raise ValueError(f"{path}: {reason_of(error)}") from error


def _updated(record: Any, given: object, *, where: str = "") -> Any:
    """Return a frozen dataclass with the entries of a JSON object; unknown ones are errors."""
    if not isinstance(given, Mapping):
        what = where.rstrip(".") or "the file"
        raise ValueError(f"{what} must hold an object {{...}}, not {given!r}")
    values = {field.name: getattr(record, field.name) for field in fields(record)}
    if given.get("reproduce") is not None:
        values["schedule"] = None  # that of the published sampler, unless one is given
    for name, value in given.items():
        if name not in values:
            raise ValueError(
                f"unknown key {where + name!r}; known are {', '.join(values)}"
                f"{suggestion(str(name), values)}"
            )
        old = values[name]
        values[name] = (
            _updated(old, value, where=f"{where}{name}.")
            if isinstance(old, GenerationConfig)
            else value
        )
    try:
        return type(record)(**values)
    except ValueError as error:
        raise ValueError(f"{where}{error}") from error
