"""Hold the public class of a model, and write it to a folder."""

from __future__ import annotations

from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path

from torch import nn
from transformers import PreTrainedModel

from mmdlm.atomic_files import atomic_folder
from mmdlm.models.compilation import Mode, compile_layers
from mmdlm.models.lora import has_adapter
from mmdlm.pipeline.generation_config import GENERATION
from mmdlm.pipeline.images import ImageTasks
from mmdlm.pipeline.likelihood import Scoring
from mmdlm.pipeline.sampler_names import CacheName
from mmdlm.pipeline.text import TextTasks
from mmdlm.templates.auto import prompt_template_for


@dataclass(frozen=True, eq=False)
class Model(ImageTasks, TextTasks, Scoring):
    """A denoiser with the tokenizers that lead into its vocabulary and out of it.

    A task that the family was not trained for raises ValueError, which says what it is for.

    Images are Pillow images, paths of image files, or tensors [3, H, W] in [-1, 1]. Without a
    generator each call uses a fresh one of seed 0: the same inputs give the same output. With a
    list of generators, one for each output of a call, each output is the one that its inputs give
    in a call of their own. A generator of another device seeds one on the device of the model.

    Attributes:
        denoiser: A Transformer, or anything that keeps the contract.
        text_tokenizer: With an end of text, which is the vocabulary's eos.
        image_tokenizer: None for a model of text only, or one whose image tokenizer is elsewhere.
        text_slots: Tokens of text of every document the model was trained on, end included; None:
            texts have the length they need.
        max_length: Longest document that the denoiser takes, in tokens.
        defaults: Steps, temperatures and guidance where a call does not give them.
        device: Where the tensors of a call are put; that of the denoiser.
        prompt_template: How its family lays out documents, with its chat template and special ids.
        packed: What is kept of the denoiser's weights from call to call, in the order that is
            fastest on a CPU; None: it is made, and takes as much memory as they do.
        origin: Where the weights were read from; None: from no folder.
    """

    def with_generation(
        self,
        *,
        cache: CacheName | None = None,
        cache_refresh: int | None = None,
        threshold: float | None = None,
        factor: float | None = None,
        entropy_bound: float | None = None,
        in_order: bool | None = None,
        distinct: bool | None = None,
        compile: bool | Mode = False,
    ) -> Model:
        """Return this model with all its tasks sampled faster; what is not given stays as it is.

        All but `compile` cost some exactness; see
        `mmdlm.pipeline.generation_config.GenerationConfig`.

        Args:
            cache: What a step keeps of the steps before: "prefix" and "dual" for text in blocks,
                "delayed" for text, "stable" for images.
            cache_refresh: Compute everything again every so many steps; 1 is exact.
            threshold: Commit every token of at least this probability: fewer steps.
            factor: The same, but the more tokens at once, the surer each has to be.
            entropy_bound: The same, by entropies, in nats, which are then the order as well.
            in_order: Of the tokens so found sure, commit those that stand in the order before all
                others: for texts that are written from left to right.
            distinct: Of several sure tokens of one word commit only the first, so that fewer words
                appear twice.
            compile: Hand the layers to torch.compile, those of this model too: the first calls say
                so, and take minutes. Or a mode of it: "reduce-overhead" records CUDA graphs.

        Returns:
            A model that shares its weights with this one.
        """
        defaults = self.defaults.in_each_task(
            cache=cache,
            cache_refresh=cache_refresh,
            threshold=threshold,
            factor=factor,
            entropy_bound=entropy_bound,
            in_order=in_order,
            distinct=distinct,
            order=None if entropy_bound is None else "entropy",
            order_temperature=None if entropy_bound is None else 0.0,
        )
        if compile:
            assert isinstance(self.denoiser, nn.Module)
            compile_layers(self.denoiser, mode="default" if compile is True else compile)
        return replace(self, defaults=defaults)

    def save_pretrained(self, folder: str | PathLike[str]) -> None:
        """Write all that `mmdlm.load` reads into a new folder, which appears whole or not at all.

        That is weights and config.json, the text tokenizer, the image tokenizer and the defaults of
        generation.

        Args:
            folder: That does not exist yet.

        Raises:
            ValueError: If the folder exists, or for what a folder cannot hold: an adapter beside
                the weights, a prompt template of one's own.
        """
        denoiser = self.denoiser
        if not isinstance(denoiser, PreTrainedModel):
            raise ValueError(f"a {type(denoiser).__name__} is no model of transformers to be saved")
        if has_adapter(denoiser):
            raise ValueError(
                "the model has an adapter beside its weights; load it with merge_adapter=True, or "
                "save the adapter alone: model.denoiser.save_pretrained(FOLDER)"
            )
        family = (getattr(denoiser.config, "published", None) or {}).get("family")
        seeing = getattr(denoiser.config, "vision", None) is not None
        tasks = getattr(denoiser.config, "trained_tasks", None)
        if self.prompt_template != prompt_template_for(family, seeing=seeing, tasks=tasks):
            raise ValueError(
                f"a folder cannot hold the prompt template {self.prompt_template!r}; save a model "
                "that was loaded without `prompt_template`, and give it again when you load that"
            )
        generation = self.defaults.to_json()
        with atomic_folder(Path(folder), replace=False) as part:
            denoiser.save_pretrained(part)
            self.text_tokenizer.save_pretrained(part)
            if self.image_tokenizer is not None:
                self.image_tokenizer.save_pretrained(part / "image_tokenizer")
            (part / GENERATION).write_text(generation, encoding="utf-8")
