"""Hold the public class of a model, and write it to a folder."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Unpack

import torch
from huggingface_hub import HfApi
from torch import nn
from transformers import PreTrainedModel

from mmdlm.atomic_files import atomic_folder
from mmdlm.core.sampling.order import Order
from mmdlm.core.sampling.unmasking import UnmaskingRule
from mmdlm.models.compilation import Mode, compile_layers
from mmdlm.models.lora import has_adapter
from mmdlm.models.special_tokens import with_special_tokens
from mmdlm.pipeline.devices import device_named
from mmdlm.pipeline.hub import first_sentence
from mmdlm.pipeline.image_pipeline import ImagePipeline
from mmdlm.pipeline.likelihood import Scoring
from mmdlm.pipeline.loading import load_engine
from mmdlm.pipeline.model_card import CARD, ModelCard
from mmdlm.pipeline.offload import Offload
from mmdlm.pipeline.options import LoadOptions, check_options
from mmdlm.pipeline.presets import PresetName
from mmdlm.pipeline.sampler_names import CacheName, OrderName, ScheduleName
from mmdlm.pipeline.task_defaults import GENERATION
from mmdlm.pipeline.text import TextTasks
from mmdlm.pipeline.text_network import TextNetwork
from mmdlm.templates.auto import prompt_template_for


@dataclass(frozen=True, eq=False)
class Model(ImagePipeline, TextTasks, Scoring):
    """A denoiser with the tokenizers that lead into its vocabulary and out of it.

    A task that the family was not trained for raises ValueError, which says what it is for.

    Called, it draws as a pipeline of diffusers does: `model("red heart").images[0]`.

    Images are Pillow images, paths or bytes of image files, arrays [H, W, 3] (uint8, or floats in
    [0, 1]), or tensors [3, H, W] in [-1, 1]; `mmdlm.load_image` fetches a URL. Without a
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
        runner: Carries out the runs of the sampler, such as one of `mmdlm.serving` that batches
            the calls of several threads; None: each call runs by itself.
    """

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | PathLike[str],
        *,
        torch_dtype: torch.dtype | str | None = None,
        **options: Unpack[LoadOptions],
    ) -> Model:
        """Load a model: `mmdlm.load` under the name that it has in transformers and diffusers.

        Args:
            pretrained_model_name_or_path: A bundled name, a folder, a run, or a repository of the
                Hugging Face Hub.
            torch_dtype: As `dtype`; a name of one, such as "bfloat16", does as well.
            **options: See `mmdlm.pipeline.loading.load_engine`: revision, token, cache_dir,
                local_files_only, device, dtype, quantization, adapter, merge_adapter,
                image_tokenizer, prompt_template, task.

        Returns:
            The model in evaluation mode.

        Raises:
            ValueError: As `mmdlm.load`, and if both dtypes are given.
        """
        check_options(options, LoadOptions, task="from_pretrained")
        if torch_dtype is not None and torch_dtype != "auto":
            if options.get("dtype") is not None:
                raise ValueError(
                    f"torch_dtype {torch_dtype} and dtype {options['dtype']} are the same option; "
                    "give one of them"
                )
            options["dtype"] = _dtype(torch_dtype)
        engine = load_engine(pretrained_model_name_or_path, **options)
        return cls(**{part.name: getattr(engine, part.name) for part in fields(engine)})

    def to(
        self,
        *to: torch.device | torch.dtype | str,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Model:
        """Move this model to a device, or let its denoiser compute in another dtype.

        As in torch and diffusers it is this model that moves; it is returned as well.

        Args:
            *to: A device, a dtype or both, in any order.
            device: The same by name.
            dtype: The same by name; image tokenizers keep theirs.

        Returns:
            This model.

        Raises:
            ValueError: For a device that is not there, and for another dtype of quantized weights.
        """
        for one in to:
            if isinstance(one, torch.dtype):
                dtype = one
            else:
                device = one
        denoiser = self.denoiser
        assert isinstance(denoiser, nn.Module)
        if dtype is not None:
            if getattr(denoiser, "quantization_method", None) is not None:
                raise ValueError(
                    f"the weights are quantized and cannot become {dtype}; load the model with "
                    f"dtype={dtype}"
                )
            denoiser.to(dtype)
        if device is not None:
            where = device_named(device)
            denoiser.to(where)
            if isinstance(self.image_tokenizer, nn.Module):
                self.image_tokenizer.to(where)
            object.__setattr__(self, "device", where)
            if isinstance(self.runner, Offload):
                object.__setattr__(self, "runner", None)
        return self

    @property
    def text_network(self) -> TextNetwork:
        """The network as samplers of other libraries call it; see `TextNetwork`.

        diffusers' `LLaDA2Pipeline(model=model.text_network, scheduler=BlockRefinementScheduler(),
        tokenizer=model.text_tokenizer)` writes text by it.
        """
        self.placed(self.denoiser)
        return TextNetwork(self.denoiser, self.device)

    def enable_model_cpu_offload(self, device: torch.device | str | None = None) -> None:
        """Keep on a GPU only what computes: the network or the image tokenizer, not both.

        A call takes as much longer as moving the weights takes; `draw_trajectory`, whose images
        are decoded at each step, moves them at each step. `to` ends it.

        Args:
            device: The GPU; None: that of the model, or the first that is there.

        Raises:
            ValueError: If there is no GPU, if the weights are quantized, or if something else
                carries out the runs of this model.
        """
        where = device_named(device if device or self.device.type == "cpu" else self.device)
        if where.type == "cpu":
            raise ValueError("there is no GPU here to keep free; leave the call out")
        if self.runner is not None and not isinstance(self.runner, Offload):
            raise ValueError(
                f"a {type(self.runner).__name__} carries out the runs of this model, which needs "
                "all of it on the device; take another model, loaded by itself"
            )
        if getattr(self.denoiser, "quantization_method", None) is not None:
            raise ValueError(
                "the weights are quantized and cannot leave the GPU; load the model with dtype= in "
                "place of quantization="
            )
        parts = (self.denoiser, self.image_tokenizer)
        modules = tuple(part for part in parts if isinstance(part, nn.Module))
        for module in modules:
            module.to("cpu")
        object.__setattr__(self, "device", where)
        object.__setattr__(self, "runner", Offload(modules, where))

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
        order: OrderName | Order | None = None,
        schedule: ScheduleName | UnmaskingRule | None = None,
        reproduce: PresetName | None = None,
        published_defects: bool | None = None,
        compile: bool | Mode = False,
    ) -> Model:
        """Return this model with other sampling in all its tasks; what is not given stays as it is.

        What makes sampling faster, but for `compile`, costs some exactness; see
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
            order: Which tokens are committed first: "confidence", "probability", "margin",
                "entropy", "random", "left_to_right", or an `Order` of one's own.
            schedule: How many tokens a step commits: "linear", "cosine", "shifted", "ancestral", or
                an `UnmaskingRule` of one's own.
            reproduce: A published sampler to reproduce: "llada", "mmada", "dream" ...
            published_defects: Reproduce as well what its code does wrong.
            compile: Hand the layers to torch.compile, those of this model too: the first calls say
                so, and take minutes. Or a mode of it: "reduce-overhead" records CUDA graphs.

        Returns:
            A model that shares its weights with this one.

        Raises:
            ValueError: For a value out of range, and for values that exclude each other.
        """
        if order is None and entropy_bound is not None:
            order = "entropy"
        defaults = self.defaults.in_each_task(
            cache=cache,
            cache_refresh=cache_refresh,
            threshold=threshold,
            factor=factor,
            entropy_bound=entropy_bound,
            in_order=in_order,
            distinct=distinct,
            order=order,
            order_temperature=None if entropy_bound is None else 0.0,
            schedule=schedule,
            reproduce=reproduce,
            published_defects=published_defects,
        )
        if compile:
            assert isinstance(self.denoiser, nn.Module)
            compile_layers(self.denoiser, mode="default" if compile is True else compile)
        return replace(self, defaults=defaults)

    def save_pretrained(self, folder: str | PathLike[str]) -> None:
        """Write all that `mmdlm.load` reads into a new folder, which appears whole or not at all.

        That is weights and config.json, the text tokenizer, the image tokenizer, the defaults of
        generation, and a model card that says what these files say.

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
            words = with_special_tokens(self.text_tokenizer, denoiser.vocabulary)
            words.save_pretrained(part)
            if self.image_tokenizer is not None:
                self.image_tokenizer.save_pretrained(part / "image_tokenizer")
            (part / GENERATION).write_text(generation, encoding="utf-8")
            (part / CARD).write_text(self.card().text(Path(folder).name), encoding="utf-8")

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        commit_message: str = "Upload model",
        create_pr: bool = False,
    ) -> str:
        """Write the model into a repository of the Hugging Face Hub, which is made if need be.

        A model card that the repository has stays as it is.

        Args:
            repo_id: OWNER/NAME.
            private: Whether a new repository is private; None: as the account has it.
            token: Of an account; None: the one that was stored by `hf auth login`.
            revision: Branch; None: main.
            commit_message: Of the commit.
            create_pr: Open a pull request in place of a commit to the branch.

        Returns:
            Address of the commit, or of the pull request.

        Raises:
            ValueError: For what `save_pretrained` refuses, and if the Hub refuses it.
        """
        with TemporaryDirectory() as place:
            folder = Path(place) / "model"
            self.save_pretrained(folder)
            (folder / CARD).write_text(self.card().text(repo_id), encoding="utf-8")
            api = HfApi(token=token)
            try:
                repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
                kept = api.file_exists(repo_id, CARD, revision=revision)
                done = api.upload_folder(
                    repo_id=repo_id,
                    folder_path=folder,
                    revision=revision,
                    commit_message=commit_message,
                    create_pr=create_pr,
                    ignore_patterns=[CARD] if kept else None,
                )
            except (OSError, ValueError) as error:  # the Hub's own errors are of these kinds
                raise ValueError(
                    f"the Hugging Face Hub does not take {repo_id!r} ({first_sentence(error)}); "
                    "log in by `hf auth login`, or give a token that may write there"
                ) from error
        return str(done.pr_url or done.commit_url)

    def card(self) -> ModelCard:
        """Return what the model card of this model says."""
        denoiser, images = self.denoiser, self.image_tokenizer
        assert isinstance(denoiser, nn.Module)
        start, stop = denoiser.vocabulary.text
        return ModelCard(
            family=self.prompt_template.family,
            tasks=self.prompt_template.tasks_with(self.text_tokenizer),
            parameters=sum(one.numel() for one in denoiser.parameters()),
            text_ids=stop - start,
            image_codes=denoiser.vocabulary.image_codes,
            image_size=None if images is None else images.image_size,
        )


def _dtype(name: torch.dtype | str) -> torch.dtype:
    """Return a dtype, or the one of a name."""
    found = getattr(torch, name, None) if isinstance(name, str) else name
    if not isinstance(found, torch.dtype):
        raise ValueError(f"torch_dtype {name!r} is no dtype of torch; give torch.bfloat16, say")
    return found
