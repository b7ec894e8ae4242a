"""Write the model card of a saved model: README.md, as the Hugging Face Hub shows it."""

from __future__ import annotations

from dataclasses import dataclass

from huggingface_hub import ModelCardData

CARD = "README.md"
# task -> (how the Hub names it, what a shell does, what Python does)
USES: dict[str, tuple[str, str, str]] = {
    "text_to_image": (
        "text-to-image",
        'mmdlm draw "a red heart" -o out.png --model {name}',
        'model.text_to_image("a red heart")[0].save("out.png")',
    ),
    "caption": (
        "image-to-text",
        "mmdlm caption photo.png --model {name}",
        'print(model.caption("photo.png"))',
    ),
    "chat": (
        "text-generation",
        "mmdlm chat --model {name}",
        'print(model.chat([{{"role": "user", "content": "Hello!"}}]))',
    ),
    "complete": (
        "text-generation",
        'mmdlm complete "Once upon a time" --model {name}',
        'print(model.complete("Once upon a time"))',
    ),
    "infill": (
        "fill-mask",
        'mmdlm infill "a [MASK] heart" --model {name}',
        'print(model.infill("a [MASK] heart"))',
    ),
}


@dataclass(frozen=True)
class ModelCard:
    """What the card of a saved model says: only what its files say.

    Attributes:
        family: Of its prompt template.
        tasks: Methods of `mmdlm.pipeline.model.Model` that it was trained for.
        parameters: Of the denoiser.
        text_ids: Of its vocabulary.
        image_codes: Of its vocabulary; 0: it knows only text.
        image_size: Edge of the images of its image tokenizer, in pixels; None: it has none.
    """

    family: str
    tasks: tuple[str, ...]
    parameters: int
    text_ids: int
    image_codes: int
    image_size: int | None

    def text(self, name: str) -> str:
        """Return the card.

        Args:
            name: Of its folder, or OWNER/NAME of its repository.

        Returns:
            Markdown behind the Hub's metadata.
        """
        uses = [USES[task] for task in USES if task in self.tasks]
        data = ModelCardData(
            library_name="mmdlm",
            pipeline_tag=uses[0][0] if uses else None,
            tags=["masked-diffusion", "discrete-diffusion", "mmdlm"],
        )
        lines = [
            "---",
            data.to_yaml(),
            "---",
            "",
            f"# {name.rpartition('/')[2]}",
            "",
            f"A masked diffusion Transformer of {self._size()} parameters over {self._ids()}, in "
            f"the format of mmdlm. Layout of its prompts: `{self.family}`.",
            "",
            f"Tasks: {', '.join(f'`{one}`' for one in self.tasks) or 'none yet'}.",
            "",
        ]
        if uses:
            shell = [use[1].format(name=name) for use in uses]
            python = ["import mmdlm", "", f'model = mmdlm.load("{name}")']
            python += [use[2].format() for use in uses]
            lines += ["```sh", *shell, "```", "", "```python", *python, "```", ""]
        lines += [
            "Sampling that is used where a call gives none: `generation_config.json`.",
            "",
            "Data, training, evaluation, limits and license: not recorded; write them here.",
            "",
        ]
        return "\n".join(lines)

    def _size(self) -> str:
        return (
            f"{self.parameters / 1e9:.1f} billion"
            if self.parameters >= 10**9
            else f"{self.parameters / 1e6:.1f} million"
        )

    def _ids(self) -> str:
        text = f"{self.text_ids:,} text ids"
        if not self.image_codes:
            return text
        edge = "" if self.image_size is None else f" ({self.image_size} x {self.image_size} pixels)"
        return f"{text} and {self.image_codes:,} image codes{edge}"
