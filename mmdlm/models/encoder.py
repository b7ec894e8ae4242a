"""A published encoder (BERT, RoBERTa, ModernBERT ...) as a denoiser: its own network, our masks."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput, MaskedLMOutput

from mmdlm.core.host_masks import numbers_of, sent
from mmdlm.core.kv_cache import KVCache
from mmdlm.core.sequence import Batch
from mmdlm.core.vocabulary import Vocabulary
from mmdlm.models.attention import AttentionPattern
from mmdlm.models.checkpoints.checkpoint import Checkpoint, refuse_strange_tensors
from mmdlm.models.checkpoints.run_steps import RunStep, open_checkpoint
from mmdlm.models.encoder_config import MmdlmEncoderConfig, anatomy_of, first_position
from mmdlm.models.generation import MaskedDiffusionGeneration
from mmdlm.models.lora import has_adapter, save_adapter
from mmdlm.models.noisy_targets import NoisyTargets
from mmdlm.models.quantization import check_stored
from mmdlm.models.resizing import padded, resized
from mmdlm.models.token_layout import TokenLayout, check_options, given_inputs
from mmdlm.vision.digests import check_digests, forget_digests, write_digests


class MmdlmEncoder(MaskedDiffusionGeneration, PreTrainedModel):
    """A `Denoiser` (mmdlm.core) around an encoder of transformers, bit for bit the published one.

    Documents of a packed row are kept apart and positions restart in each, local layers included,
    so that every row has the logits that it has by itself. Token types are all 0.
    """

    config_class = MmdlmEncoderConfig
    base_model_prefix = "encoder"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flex_attn = True

    def __init__(self, config: MmdlmEncoderConfig) -> None:
        super().__init__(config)
        if config.vocabulary is None or not isinstance(config.encoder, PreTrainedConfig):
            raise ValueError(
                "MmdlmEncoderConfig: vocabulary or encoder is empty; make one with "
                "`mmdlm convert --from`"
            )
        self.vocabulary = Vocabulary(**config.vocabulary)
        self.anatomy = anatomy_of(config.encoder.model_type)
        if self.vocabulary.size != config.encoder.vocab_size:
            raise ValueError(
                f"the vocabulary has {self.vocabulary.size} ids, but the encoder "
                f"{config.encoder.vocab_size}; they must be as many"
            )
        self.encoder = AutoModelForMaskedLM.from_config(config.encoder)
        self.generation_config = GenerationConfig(max_length=None)
        self.post_init()
        # Only the layers: embeddings that are sharded apart could not serve as the head, too.
        layers = (m for m in self.encoder.modules() if isinstance(m, GradientCheckpointingLayer))
        self._no_split_modules = sorted({type(layer).__name__ for layer in layers})

    def see(self, batch: Batch) -> Batch:
        """Return the batch as it is: an encoder of text has no vision tower."""
        if batch.features is not None or batch.views is not None:
            raise ValueError(
                f"an encoder of type {self.config.encoder.model_type!r} sees no images, but the "
                "batch has some; convert an autoregressive model, or leave them out"
            )
        return batch

    def hidden(
        self,
        x_t: Tensor,
        batch: Batch,
        *,
        query_mask: Tensor | None = None,
        kv_cache: KVCache | None = None,
    ) -> Tensor:
        """Noisy ids [B, L] in the layout of `batch` -> [B, L, D], everywhere.

        Raises ValueError for a cache: the layers are transformers' own, and keep nothing.
        """
        if kv_cache is not None:
            raise ValueError(
                f"an encoder of type {self.config.encoder.model_type!r} keeps no keys and values; "
                "leave the cache out"
            )
        self.see(batch)
        undivided = bool(batch.host_masks.whole.numpy().all())
        seen = {"lookahead": batch.lookahead, "block": batch.block, "noisy": batch.noisy}
        return self._body(x_t, batch.position, batch.document, seen, undivided)

    def head_weight(self) -> None:
        """None: an encoder transforms its states before its head."""

    def logits_at(
        self, hidden: Tensor, positions: Tensor, *, ids: tuple[int, int] | None = None
    ) -> Tensor:
        """[B, L, D] at M marked positions [B, L] -> [M, V], or [M, stop - start] of `ids`."""
        rows = hidden.flatten(0, 1)[sent(numbers_of(positions), hidden.device)]
        x = self._transform(rows)
        decoder = self.encoder.get_submodule(self.anatomy.decoder)
        some = slice(*(ids or (None,)))
        return F.linear(
            x, decoder.weight[some], None if decoder.bias is None else decoder.bias[some]
        )

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | BlockMask | None = None,
        position_ids: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        loss_weight: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        skip_logits: bool = False,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> MaskedLMOutput | tuple[Any, ...]:
        """Map ids [B, L] to logits [B, L, V], and to the loss of masked diffusion.

        Args:
            input_ids: [B, L].
            attention_mask: See `TokenLayout.of`.
            position_ids: See `TokenLayout.of`.
            inputs_embeds: [B, L, D] in place of `input_ids`.
            labels: See `MmdlmForMaskedDiffusion.forward`, as for the next three.
            loss_weight: See there.
            num_items_in_batch: See there.
            skip_logits: See there.
            output_hidden_states: Return the encoder's hidden states.
            output_attentions: Return the encoder's weights, for which attn_implementation must be
                "eager".
            return_dict: False: a tuple.
            **kwargs: Of `IMPLIED`, which follow from the inputs.

        Returns:
            What was asked for; what was not is None, or left out of a tuple.

        Raises:
            ValueError: For inputs that do not fit each other or would have no effect.
        """
        check_options(kwargs)
        given = given_inputs(input_ids, inputs_embeds, labels, loss_weight)
        layout = TokenLayout.of(
            (given.shape[0], given.shape[1]),
            given.device,
            attention_mask=attention_mask,
            position_ids=position_ids,
        )
        targets = None
        if labels is not None:
            targets = NoisyTargets.of(
                given,
                labels,
                self.vocabulary,
                document=layout.document,
                position=layout.position,
                loss_weight=loss_weight,
                training=self.training,
            )
            input_ids = targets.corruption.x_t
        states = self._states(
            layout.position,
            self._mask_of(layout),
            input_ids=input_ids,
            inputs_embeds=inputs_embeds,
            **{
                name: getattr(self.config, name) if value is None else value
                for name, value in (
                    ("output_hidden_states", output_hidden_states),
                    ("output_attentions", output_attentions),
                )
            },
        )
        hidden = states.last_hidden_state
        loss = logits = None
        if targets is not None:
            loss = targets.loss(
                self,
                hidden,
                full_vocabulary=self.config.full_vocabulary,
                count=num_items_in_batch,
            )
        if loss is None or not skip_logits:
            logits = self.encoder.get_submodule(self.anatomy.decoder)(self._transform(hidden))
        output = MaskedLMOutput(
            loss=loss,
            logits=logits,
            hidden_states=states.hidden_states,
            attentions=states.attentions,
        )
        as_dict = self.config.return_dict if return_dict is None else return_dict
        return output if as_dict else output.to_tuple()

    def get_input_embeddings(self) -> nn.Module:
        """Return the encoder's input embeddings."""
        embeddings: nn.Module = self.encoder.get_input_embeddings()
        return embeddings

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any
    ) -> None:
        """Save as transformers does; of a model with an adapter, only the adapter."""
        if has_adapter(self) and not kwargs.get("push_to_hub"):
            save_adapter(self, Path(save_directory), state_dict=kwargs.get("state_dict"))
            return
        forget_digests(Path(save_directory))
        super().save_pretrained(save_directory, *args, **kwargs)
        write_digests(Path(save_directory))

    def resize_token_embeddings(
        self,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        mean_resizing: bool = True,
    ) -> nn.Module:
        """Resize the embeddings as transformers does; see `MmdlmForMaskedDiffusion`."""
        if type(pad_to_multiple_of) not in (int, type(None)):  # transformers says what is wrong
            return super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of)
        count = self.vocabulary.size if new_num_tokens is None else new_num_tokens
        rows = padded(count, pad_to_multiple_of)
        found = resized(self.vocabulary, count, rows=rows)
        self.encoder.resize_token_embeddings(rows, None, mean_resizing)
        decoder = self.encoder.get_submodule(self.anatomy.decoder)
        tensors = [self.get_input_embeddings().weight, decoder.weight, decoder.bias]
        found.arrange([one for one in tensors if one is not None])
        self.vocabulary = found.vocabulary
        self.config.vocabulary = found.vocabulary.to_dict()
        self.vocab_size = self.config.vocab_size = rows
        return self.get_input_embeddings()

    def _body(
        self,
        ids: Tensor,
        position: Tensor,
        document: Tensor,
        seen: Mapping[str, Tensor | None],
        undivided: bool | None,
    ) -> Tensor:
        mask = partial(self._mask, document, seen, undivided=undivided)
        hidden: Tensor = self._states(
            position, self._of_each_layer(mask), input_ids=ids
        ).last_hidden_state
        return hidden

    def _states(self, position: Tensor, mask: Any, **inputs: Any) -> BaseModelOutput:
        """Return what the encoder's body gives."""
        body = self.encoder.get_submodule(self.anatomy.body)
        start = first_position(self.config.encoder)
        output: BaseModelOutput = body(
            attention_mask=mask, position_ids=position + start, return_dict=True, **inputs
        )
        return output

    def _of_each_layer(self, mask: Callable[..., Any]) -> Any:
        """Return the mask in the form that the body takes: one, or one for each type of layer."""
        if not self.anatomy.by_layer_type:
            return mask()
        window = self.config.encoder.sliding_window
        return {"full_attention": mask(), "sliding_attention": mask(local_window=window)}

    def _mask_of(self, layout: TokenLayout) -> Any:
        """Return the mask of a call."""
        if layout.mask is None:
            return self._of_each_layer(
                partial(self._mask, layout.document, {}, undivided=layout.undivided)
            )
        if self.anatomy.by_layer_type:
            raise ValueError(
                f"an encoder of type {self.config.encoder.model_type!r} has local layers, of which "
                "a mask of pairs says nothing; give a mask [B, L]"
            )
        flex = self.config.encoder._attn_implementation == "flex_attention"
        return self._form_of(AttentionPattern.given(layout.mask, flex=flex))

    def _mask(
        self,
        document: Tensor,
        seen: Mapping[str, Tensor | None],
        *,
        local_window: int | None = None,
        undivided: bool | None = None,
    ) -> Tensor | BlockMask | None:
        """Return the pattern in the form that the attention of transformers takes as it is."""
        kernel = self.config.encoder._attn_implementation
        pattern = AttentionPattern.of(
            document,
            flex=kernel == "flex_attention",
            **seen,
            local_window=local_window,
            undivided=undivided,
        )
        return self._form_of(pattern)

    def _form_of(self, pattern: AttentionPattern) -> Tensor | BlockMask | None:
        """Return a pattern as the attention of transformers takes it."""
        if pattern.block is not None:
            return pattern.block
        # Attention of transformers takes the mask of all pairs, however long the rows are.
        dense = pattern.dense if pattern.wide is None else pattern.wide.of(slice(None))
        kernel = self.config.encoder._attn_implementation
        if dense is None or kernel != "eager" or dense.is_floating_point():
            return dense
        closed = torch.finfo(self.dtype).min  # eager attention adds its mask
        return torch.zeros_like(dense, dtype=self.dtype).masked_fill(~dense, closed)

    def _transform(self, hidden: Tensor) -> Tensor:
        for name in self.anatomy.transform:
            hidden = F.gelu(hidden) if name == "gelu" else self.encoder.get_submodule(name)(hidden)
        return hidden

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str] | None,
        *args: Any,
        config: PreTrainedConfig | None = None,
        output_loading_info: bool = False,
        checkpoint: Checkpoint | None = None,
        **kwargs: Any,
    ) -> Any:
        """Load as transformers does, except that no tensor is ever made up.

        Args:
            pretrained_model_name_or_path: As transformers has it.
            *args: As transformers has them.
            config: As transformers has it.
            output_loading_info: As transformers has it.
            checkpoint: The folder's, where it was opened already; a step of a run is one, too.
            **kwargs: As transformers has them.

        Returns:
            The model; with `output_loading_info`, also what transformers reports of it.

        Raises:
            ValueError: With the names of tensors that the checkpoint lacks, has beyond the model,
                or has in another shape, unless the caller asks for a record of them
                (`output_loading_info`); transformers would draw them at random and log a warning.
        """
        if pretrained_model_name_or_path is not None:
            folder = Path(pretrained_model_name_or_path) / (kwargs.get("subfolder") or "")
            if folder.is_dir():  # before transformers follows what its files name
                checkpoint = checkpoint or open_checkpoint(folder)
                check_stored(checkpoint.config)
                check_digests(folder)
        source = pretrained_model_name_or_path
        if checkpoint is not None and RunStep.of(checkpoint.folder) is not None:
            config = config or MmdlmEncoderConfig.from_dict(checkpoint.config)
            kwargs["state_dict"] = {name: one[...] for name, one in checkpoint.tensors.items()}
            source = None
        model, info = super().from_pretrained(
            source,
            *args,
            config=config,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # so that they reach `info` by name
            **kwargs,
        )
        if not output_loading_info and pretrained_model_name_or_path is not None:
            refuse_strange_tensors(pretrained_model_name_or_path, info)
        return (model, info) if output_loading_info else model


for _auto in (AutoModel, AutoModelForMaskedLM, AutoModelForCausalLM):
    _auto.register(MmdlmEncoderConfig, MmdlmEncoder)
