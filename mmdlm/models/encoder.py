"""A published encoder (BERT, RoBERTa, ModernBERT ...) as a denoiser: its own network, our masks."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MaskedLMOutput

from mmdlm.core.host_masks import numbers_of, sent
from mmdlm.core.kv_cache import KVCache
from mmdlm.core.sequence import NO_DOCUMENT, Batch
from mmdlm.core.vocabulary import Vocabulary
from mmdlm.models.attention import AttentionPattern
from mmdlm.models.checkpoints.checkpoint import Checkpoint, refuse_strange_tensors
from mmdlm.models.checkpoints.run_steps import RunStep, open_checkpoint
from mmdlm.models.families.base import refuse_kernels
from mmdlm.models.lora import has_adapter, save_adapter
from mmdlm.models.quantization import check_stored
from mmdlm.models.resizing import padded, resized
from mmdlm.vision.digests import check_digests, forget_digests, write_digests


@dataclass(frozen=True)
class Anatomy:
    """Where the parts of an encoder's masked-language model lie.

    Attributes:
        body: The network below the head.
        transform: What stands between the body and the decoder, module after module; after "gelu"
            is the activation, where it is no module.
        decoder: The linear map to the vocabulary.
        padded_start: Positions count from pad_token_id + 1 (fairseq's habit).
        by_layer_type: The body takes a mask for each type of layer.
    """

    body: str
    transform: tuple[str, ...]
    decoder: str
    padded_start: bool = False
    by_layer_type: bool = False


_BERT = Anatomy("bert", ("cls.predictions.transform",), "cls.predictions.decoder")
_ROBERTA = Anatomy(
    "roberta", ("lm_head.dense", "gelu", "lm_head.layer_norm"), "lm_head.decoder", padded_start=True
)

# By `model_type` of transformers.
ENCODERS: dict[str, Anatomy] = {
    "bert": _BERT,
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "camembert": _ROBERTA,
    "modernbert": Anatomy("model", ("head",), "decoder", by_layer_type=True),
    "eurobert": Anatomy("model", (), "lm_head"),
}


@strict
class MmdlmEncoderConfig(PreTrainedConfig):
    """The encoder's own config, and the vocabulary that its ids live in.

    Attributes:
        vocabulary: Fields of `Vocabulary`.
        encoder: Config of the masked-language model, one of `ENCODERS`.
        full_vocabulary: Trained over all ids, not those of the position's modality.
        text_slots: Text positions of the layout it was trained on; None: any length.
        trained_tasks: What it was trained for, see `mmdlm.templates.native.Native`; None: not
            recorded.
    """

    model_type = "mmdlm_encoder"
    sub_configs: ClassVar = {"encoder": AutoConfig}

    vocabulary: dict | None = None  # type: ignore[type-arg]
    encoder: dict | PreTrainedConfig | None = None  # type: ignore[type-arg]
    full_vocabulary: bool = False
    text_slots: int | None = None
    trained_tasks: list[str] | tuple[str, ...] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if isinstance(self.encoder, dict):
            refuse_kernels(self.encoder)
            fields = copy.deepcopy(self.encoder)  # transformers writes into nested ones
            kind = fields.pop("model_type", None)
            anatomy_of(kind)
            self.encoder = AutoConfig.for_model(kind, **fields)
        if isinstance(self.encoder, PreTrainedConfig):
            _refuse_decoders(self.encoder)
            # its own tensors are tied, by its own config; here there are none
            self.tie_word_embeddings = bool(self.encoder.tie_word_embeddings)
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Read a config as transformers does; ValueError for a config.json that asks for code."""
        refuse_kernels(config_dict)
        return super().from_dict(config_dict, **kwargs)

    @property
    def vocab_size(self) -> int:
        """Ids of the vocabulary."""
        return int(self.vocabulary["size"]) if self.vocabulary else 0

    @property
    def max_position_embeddings(self) -> int:
        """Tokens of the longest document that the encoder takes."""
        assert isinstance(self.encoder, PreTrainedConfig)
        return int(self.encoder.max_position_embeddings) - first_position(self.encoder)


class MmdlmEncoder(PreTrainedModel):
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
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        return_dict: bool | None = None,
    ) -> MaskedLMOutput | tuple[Tensor]:
        """Map ids [B, L] and a mask [B, L], 0 at padding, to logits [B, L, V].

        Padding, on either side, changes no other logits: positions are counted over real tokens.
        """
        undivided = True if attention_mask is None else None
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if position_ids is None:
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
        document = torch.where(attention_mask.bool(), 0, NO_DOCUMENT)
        hidden = self._body(input_ids, position_ids, document, {}, undivided)
        logits = self.encoder.get_submodule(self.anatomy.decoder)(self._transform(hidden))
        if return_dict is False or not (return_dict or self.config.return_dict):
            return (logits,)
        return MaskedLMOutput(logits=logits)

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
        count = self.vocabulary.size if new_num_tokens is None else new_num_tokens
        rows = padded(count, pad_to_multiple_of)
        found = resized(self.vocabulary, count, rows=rows)
        self.encoder.resize_token_embeddings(rows, None, mean_resizing)
        decoder = self.encoder.get_submodule(self.anatomy.decoder)
        tensors = [self.get_input_embeddings().weight, decoder.weight, decoder.bias]
        found.arrange([one for one in tensors if one is not None])
        self.vocabulary = found.vocabulary
        self.config.vocabulary = found.vocabulary.to_dict()
        return self.get_input_embeddings()

    def _body(
        self,
        ids: Tensor,
        position: Tensor,
        document: Tensor,
        seen: Mapping[str, Tensor | None],
        undivided: bool | None,
    ) -> Tensor:
        config = self.config.encoder
        mask: Any = self._mask(document, seen, undivided=undivided)
        if self.anatomy.by_layer_type:
            local = self._mask(
                document, seen, local_window=config.sliding_window, undivided=undivided
            )
            mask = {"full_attention": mask, "sliding_attention": local}
        body = self.encoder.get_submodule(self.anatomy.body)
        hidden: Tensor = body(
            ids, attention_mask=mask, position_ids=position + first_position(config)
        ).last_hidden_state
        return hidden

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
        if pattern.block is not None:
            return pattern.block
        # Attention of transformers takes the mask of all pairs, however long the rows are.
        dense = pattern.dense if pattern.wide is None else pattern.wide.of(slice(None))
        if dense is None or kernel != "eager":
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
                or has in another shape; transformers would draw them at random and log a warning.
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
        refuse_strange_tensors(pretrained_model_name_or_path, info)
        return (model, info) if output_loading_info else model


def anatomy_of(model_type: object) -> Anatomy:
    """Where an encoder's parts lie; ValueError lists the encoders that are known."""
    if not isinstance(model_type, str) or model_type not in ENCODERS:
        raise ValueError(
            f"an encoder of type {model_type!r} is not known here; known are {', '.join(ENCODERS)}"
        )
    return ENCODERS[model_type]


def first_position(encoder: PreTrainedConfig) -> int:
    """Return what the encoder calls the position of a document's first token."""
    if not anatomy_of(encoder.model_type).padded_start:
        return 0
    return int(encoder.pad_token_id) + 1


def _refuse_decoders(encoder: PreTrainedConfig) -> None:
    for key in ("is_decoder", "add_cross_attention"):
        if getattr(encoder, key, False):
            raise ValueError(f"the encoder's config has {key} = true; that is no encoder")
    if getattr(encoder, "position_embedding_type", "absolute") != "absolute":
        raise ValueError(
            f"the encoder's config has position_embedding_type = "
            f"{encoder.position_embedding_type!r}; transformers knows only 'absolute'"
        )


AutoConfig.register("mmdlm_encoder", MmdlmEncoderConfig)
AutoModel.register(MmdlmEncoderConfig, MmdlmEncoder)
AutoModelForMaskedLM.register(MmdlmEncoderConfig, MmdlmEncoder)
