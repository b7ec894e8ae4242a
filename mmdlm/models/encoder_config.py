"""The configuration of a published encoder as a denoiser, and where the encoder's parts lie."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig

from mmdlm.models.families.base import refuse_kernels


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
    vocab_size: int = 0  # of the vocabulary; kept because other libraries read it here
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
        if self.vocabulary is not None:
            self.vocab_size = self.vocabulary["size"]
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Read a config as transformers does; ValueError for a config.json that asks for code."""
        refuse_kernels(config_dict)
        return super().from_dict(config_dict, **kwargs)

    @property
    def max_position_embeddings(self) -> int:
        """Tokens of the longest document that the encoder takes."""
        assert isinstance(self.encoder, PreTrainedConfig)
        return int(self.encoder.max_position_embeddings) - first_position(self.encoder)


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
