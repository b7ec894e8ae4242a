"""The bidirectional Transformer as a `Denoiser` and as a model of the transformers library."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMaskedLM,
    GenerationConfig,
    PreTrainedConfig,
)

from mmdlm.core.host_masks import numbers_of, on_host, sent
from mmdlm.core.kernels.linear import Linear
from mmdlm.core.kv_cache import KVCache
from mmdlm.core.sequence import Batch, concatenate
from mmdlm.core.vocabulary import Modality, Vocabulary
from mmdlm.models.checkpoints.checkpoint import Checkpoint, local_folder, refuse_strange_tensors
from mmdlm.models.checkpoints.run_steps import open_checkpoint, parts_of
from mmdlm.models.configuration import MmdlmConfig, read_config
from mmdlm.models.from_pretrained import (
    HUB_OPTIONS,
    check_depth,
    checkpoint_names,
    dtype_of,
    is_quantized,
    streams,
    with_codes_behind,
)
from mmdlm.models.lora import has_adapter, save_adapter
from mmdlm.models.quantization import offer_layers, take_back_layers
from mmdlm.models.resizing import padded, resized
from mmdlm.models.transformer import MmdlmModel
from mmdlm.models.transformers_call import TransformersCall
from mmdlm.vision.digests import check_digests, forget_digests, write_digests
from mmdlm.vision.encoders.adapter import VisionAdapter, VisionConfig


class MmdlmForMaskedDiffusion(TransformersCall):
    """A `Denoiser` (mmdlm.core) that is also a transformers model.

    `model(input_ids, attention_mask).logits` is [B, L, V]; our own training and sampling use
    `hidden` and `logits_at`, which run the head only where it is needed.
    """

    _tied_weights_keys: ClassVar = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: MmdlmConfig) -> None:
        super().__init__(config)
        if config.vocabulary is None:
            raise ValueError("MmdlmConfig.vocabulary is empty; give it Vocabulary(...).to_dict()")
        self.vocabulary = Vocabulary(**config.vocabulary)
        self.model = MmdlmModel(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.vision = None
        if config.vision is not None:
            self.vision = VisionAdapter(VisionConfig.from_dict(config.vision), config.hidden_size)
        self.generation_config = GenerationConfig(max_length=None)
        self.post_init()
        offer_layers(self)

    def see(self, batch: Batch) -> Batch:
        """Compute the features of a batch's images once, before sampling or the loss.

        Raises ValueError for images shown to a model without a vision adapter.
        """
        if batch.views is None:
            return batch
        if self.vision is None:
            raise ValueError(
                f"the batch has {len(batch.views)} images to look at, but the model has no "
                "vision adapter; take one that sees, such as LLaDA-V"
            )
        return replace(batch, features=self.vision(batch.views), views=None)

    def hidden(
        self,
        x_t: Tensor,
        batch: Batch,
        *,
        query_mask: Tensor | None = None,
        kv_cache: KVCache | None = None,
    ) -> Tensor:
        """Noisy ids [B, L] in the layout of `batch` -> [B, L, D]; see `Denoiser`.

        The last layer is computed only at the places `query_mask`, where gradients come from too.
        """
        embeddings, host_masks = self._embedded(x_t, batch), batch.host_masks
        batch = self.in_blocks(batch)
        if query_mask is not None:
            query_mask = self._read_for(on_host(query_mask))
        layout = (self._rotary(batch), batch.document)
        prefix = batch.prefix if self.config.prefix_attention else None
        if kv_cache is None:
            undivided = bool(host_masks.whole.numpy().all())
            hidden = self.model(
                embeddings,
                *layout,
                batch.lookahead,
                prefix=prefix,
                block=batch.block,
                noisy=batch.noisy,
                query_mask=query_mask,
                undivided=undivided,
            )
        else:
            if batch.lookahead is not None:
                raise ValueError("memory: a batch that looks ahead a bounded way is not kept")
            if batch.noisy is not None:
                raise ValueError("memory: a batch with a noisy and a clean copy is not kept")
            hidden = self.model.forward_cached(
                embeddings,
                *layout,
                prefix=prefix,
                block=batch.block,
                query_mask=query_mask,
                read=self._read_for(host_masks.target),
                whole=host_masks.whole,
                kv_cache=kv_cache,
            )
        return self._aligned(hidden, batch.position)

    def _read_for(self, subset: Tensor) -> Tensor:
        """Return the states read for a subset of tokens: with `shift` neighbors too."""
        return subset | subset.roll(-1, dims=1) if self.config.shift else subset

    def hidden_of_copies(self, x_t: Tensor, batch: Batch, *, query_mask: Tensor) -> Tensor:
        """K copies [K B, L] of a batch -> [K B, L, D]; see `SharingDenoiser`.

        Under `prefix_attention` what stands before the targets is computed once for all of them,
        unless layers are recomputed in the backward pass.
        """
        everything = concatenate([batch] * (len(x_t) // len(batch)))
        blocks = self.config.block_length is not None or batch.block is not None
        shared = self.config.prefix_attention and batch.lookahead is None and not blocks
        if not shared or any(layer.gradient_checkpointing for layer in self.model.layers):
            return self.hidden(x_t, everything, query_mask=query_mask)
        hidden = self.model.copies(
            self._embedded(x_t, everything),
            self._rotary(batch),
            batch.document,
            prefix=batch.prefix,
        )
        return self._aligned(hidden, everything.position)

    def _embedded(self, x_t: Tensor, batch: Batch) -> Tensor:
        embeddings: Tensor = self.model.embed_tokens(x_t)
        if batch.views is not None:
            raise ValueError("the batch has images not looked at yet; call see(batch) first")
        if batch.features is None:
            return embeddings
        slots = batch.of(Modality.FEATURE)[..., None]
        return embeddings.masked_scatter(slots, batch.features.to(embeddings.dtype))

    def _rotary(self, batch: Batch) -> Tensor:
        """Return the positions for the rotary embedding: [B, L], or [B, L, A] on several axes."""
        if self.config.rope_sections is None:
            return batch.position
        if batch.axes is not None:
            return batch.axes
        if batch.features is not None:
            raise ValueError(
                "the batch has features without rows and columns, for which the positions of this "
                "model have axes; give it the views that its tiling makes of the images"
            )
        return batch.position

    def head_weight(self) -> Tensor | None:
        """Weights [V, D] of the linear head, or None: an adapter or a quantizer has its own."""
        return self.lm_head.weight if type(self.lm_head) is Linear else None

    def logits_at(
        self, hidden: Tensor, positions: Tensor, *, ids: tuple[int, int] | None = None
    ) -> Tensor:
        """[B, L, D] at M marked positions [B, L] -> [M, V], or [M, stop - start] of `ids`."""
        rows = hidden.flatten(0, 1)[sent(numbers_of(positions), hidden.device)]
        if type(self.lm_head) is Linear:
            return self.lm_head.rows(rows, ids or (0, self.config.vocab_size))
        logits = self.lm_head(rows)
        return logits if ids is None else logits[:, slice(*ids)]

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str] | None,
        *args: Any,
        config: PreTrainedConfig | None = None,
        output_loading_info: bool = False,
        read: Callable[[int], None] | None = None,
        checkpoint: Checkpoint | None = None,
        **kwargs: Any,
    ) -> Any:
        """Load our checkpoints and those of published families.

        No tensor is made up unless the caller asks for a record of it (`output_loading_info`):
        raises ValueError with the names of tensors that the checkpoint lacks, has beyond the model,
        or has in another shape, before weights are read; transformers would draw them at random and
        log a warning. Memory holds the weights in the dtype that is asked for, and one piece of a
        file. Without a name or a folder it is transformers' own method, of `state_dict`.

        Args:
            pretrained_model_name_or_path: As transformers has it.
            *args: As transformers has them.
            config: As transformers has it.
            output_loading_info: As transformers has it.
            read: Told the number of bytes that were read from the files, after each piece.
            checkpoint: The folder's, where it was opened already; a step of a run is one, too.
            **kwargs: As transformers has them.

        Returns:
            The model; with `output_loading_info`, also what transformers reports of it.
        """
        if pretrained_model_name_or_path is None:
            kwargs["output_loading_info"] = output_loading_info
            return super().from_pretrained(None, *args, config=config, **kwargs)
        if kwargs.pop("variant", None) is not None:
            raise ValueError("variant: files of other names are not read; leave it out")
        inside = kwargs.pop("subfolder", None) or ""
        hub = {name: kwargs.pop(name) for name in HUB_OPTIONS if kwargs.get(name) is not None}
        folder = local_folder(pretrained_model_name_or_path, **hub) / inside
        checkpoint = checkpoint or open_checkpoint(folder)
        config = with_codes_behind(config or read_config(checkpoint.config), parts_of(folder))
        names = checkpoint_names(checkpoint)
        if not output_loading_info:
            check_depth(config, checkpoint)
        if not is_quantized(checkpoint) and not output_loading_info:
            all_names = {name: names.get(name, name) for name in checkpoint.tensors}
            wanted = cls._wanted(config, all_names.values(), *args)
            checkpoint.check_fits(wanted, names=all_names)
            if config.tie_word_embeddings:
                checkpoint.check_tied(cls._tied_weights_keys, names=all_names)
        check_digests(folder)
        kwargs.update(output_loading_info=True, ignore_mismatched_sizes=True)  # named in `info`
        if is_quantized(checkpoint) or not streams(kwargs):
            kwargs["key_mapping"] = {f"^{re.escape(key)}$": ours for key, ours in names.items()}
            model, info = super().from_pretrained(folder, *args, config=config, **kwargs)
        else:
            dtype = dtype_of(kwargs, config) or checkpoint.dtype
            kwargs["state_dict"] = {
                names.get(name, name): tensor.to(dtype, read=read)
                for name, tensor in checkpoint.tensors.items()
            }
            model, info = super().from_pretrained(None, *args, config=config, dtype=dtype, **kwargs)
            model.name_or_path = model.config.name_or_path = str(folder)
        if not output_loading_info:
            refuse_strange_tensors(folder, info)
        take_back_layers(model)
        return (model, info) if output_loading_info else model

    @classmethod
    def _wanted(
        cls, config: PreTrainedConfig, stored: Collection[str], *args: Any
    ) -> dict[str, tuple[int, ...]]:
        """Shapes of the tensors that a model of this config reads from a checkpoint."""
        with torch.device("meta"):
            model = cls(config, *args)
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        # A tied tensor need not be stored.
        for name in model.all_tied_weights_keys:
            if name not in stored:
                shapes.pop(name, None)
        return shapes

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any
    ) -> None:
        """Save in our format wherever the weights came from.

        `mmdlm convert` writes the format of a published family; `mmdlm.Model.save_pretrained` all
        that `mmdlm.load` reads, tokenizers included. Of a model with an adapter only the adapter
        is written, in PEFT's format.
        """
        if has_adapter(self) and not kwargs.get("push_to_hub"):
            save_adapter(self, Path(save_directory), state_dict=kwargs.get("state_dict"))
            return
        kwargs.setdefault("save_original_format", False)
        forget_digests(Path(save_directory))
        super().save_pretrained(save_directory, *args, **kwargs)
        write_digests(Path(save_directory))

    def resize_token_embeddings(
        self,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        mean_resizing: bool = True,
    ) -> nn.Embedding:
        """Resize the embeddings, which the vocabulary in the config follows.

        Args:
            new_num_tokens: Ids of text, specials and image codes together. New ones continue the
                text: what stands behind it moves on, rows and ids.
            pad_to_multiple_of: Rows of the tensors are a multiple of this; None: of 1.
            mean_resizing: Whether new rows start from the mean of the old ones.

        Returns:
            The embedding.

        Raises:
            ValueError: Where an id that the model uses would be lost.
        """
        if type(pad_to_multiple_of) not in (int, type(None)):  # transformers says what is wrong
            return super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of)
        count = self.vocabulary.size if new_num_tokens is None else new_num_tokens
        rows = padded(count, pad_to_multiple_of)
        found = resized(self.vocabulary, count, rows=rows)
        super().resize_token_embeddings(rows, None, mean_resizing)
        head = self.lm_head
        if type(head) is nn.Linear:  # transformers has made it again
            ours = Linear(head.in_features, head.out_features, bias=False, device="meta")
            ours.weight = head.weight
            ours._is_hf_initialized = True  # type: ignore[assignment]  # not to be drawn again
            self.lm_head = ours
        tensors = [self.model.embed_tokens.weight, *self.lm_head.parameters()]
        found.arrange(tensors)
        self.vocabulary = found.vocabulary
        self.config.vocabulary = found.vocabulary.to_dict()
        return self.model.embed_tokens


for _auto in (AutoModel, AutoModelForMaskedLM, AutoModelForCausalLM, AutoModelForImageTextToText):
    _auto.register(MmdlmConfig, MmdlmForMaskedDiffusion)
