"""The configuration of the Transformer, and how a config.json of any family becomes one."""

from __future__ import annotations

import math
import os
from typing import Any, cast

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig

from mmdlm.core.blocks import check_blocks
from mmdlm.models.families.auto import MODEL_TYPES, our_config
from mmdlm.models.families.base import refuse_kernels
from mmdlm.models.quantization import check_stored
from mmdlm.models.rope import check_rope_scaling
from mmdlm.vision.checkpoint_files import reason_of

# Fields of a config that count something, of which there is one at least.
SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)


@strict
class MmdlmConfig(PreTrainedConfig):
    """Shape of the Transformer, and the vocabulary that its ids live in.

    Attributes:
        vocabulary: Fields of `Vocabulary`.
        attention_bias: Bias on the query, key and value projections (Qwen2, Dream).
        qk_norm: RMSNorm on every query and key head (Qwen3).
        rope_scaling: Stretched rotary positions, in the words of a Llama config.json.
        rope_sections: Pairs of channels of a head that turn with each axis of the position
            (Qwen2-VL, Dimple); None: positions have one axis.
        shift: Each hidden state predicts the next token, as that of an autoregressive model does
            (Dream).
        full_vocabulary: Trained over all ids, not those of the position's modality; sampling keeps
            to the modality all the same.
        prefix_attention: What stands before the first target of a document sees only itself.
        block_length: Tokens of a block of block diffusion: a token sees its own block and those
            before it; None: all of its document.
        prompt_blocks: What stands before the first target, for `block_length`; see
            `mmdlm.core.blocks.block_numbers`.
        vision: Fields of `VisionConfig`, for a model that sees; None: it does not.
        published: The family and the config.json that the weights were published with.
        text_slots: Text positions of the layout it was trained on; None: any length.
        trained_tasks: What it was trained for, see `mmdlm.templates.native.Native`; None: not
            recorded.
    """

    model_type = "mmdlm"

    vocabulary: dict | None = None  # type: ignore[type-arg]
    vocab_size: int = 0  # of the vocabulary; kept because other libraries read it here
    hidden_size: int = 256
    intermediate_size: int = 704
    num_hidden_layers: int = 8
    num_attention_heads: int = 4
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int = 2048
    rope_theta: float = 10_000.0
    rope_scaling: dict | None = None  # type: ignore[type-arg]
    rope_sections: list[int] | tuple[int, ...] | None = None
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    attention_bias: bool = False
    qk_norm: bool = False
    tie_word_embeddings: bool = False
    shift: bool = False
    full_vocabulary: bool = False
    prefix_attention: bool = False
    block_length: int | None = None
    prompt_blocks: str = "blocks"
    vision: dict | None = None  # type: ignore[type-arg]
    published: dict | None = None  # type: ignore[type-arg]
    text_slots: int | None = None
    trained_tasks: list[str] | tuple[str, ...] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        for name in SIZES:
            value = getattr(self, name)
            if value is None and name in ("num_key_value_heads", "head_dim"):
                continue
            if type(value) is not int or not 1 <= value < 2**31:
                raise ValueError(f"{name} must be a whole number from 1, not {value!r}")
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.vocabulary is not None:
            self.vocab_size = self.vocabulary["size"]
        # Here and not in transformers' validators, whose errors are no ValueError.
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd; rotary embedding needs pairs")
        if self.rope_sections is not None and sum(self.rope_sections) * 2 != self.head_dim:
            raise ValueError(
                f"rope_sections {list(self.rope_sections)} make {sum(self.rope_sections)} pairs of "
                f"channels, but head_dim {self.head_dim} has {self.head_dim // 2}"
            )
        self._check_blocks()
        check_rope_scaling(self.rope_scaling)
        for name in ("rope_theta", "rms_norm_eps"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not 0 < value < math.inf:
                raise ValueError(f"{name} must be a number above 0, not {value!r}")
        if not 0 <= self.initializer_range < math.inf:
            raise ValueError(
                f"initializer_range must be a number from 0, not {self.initializer_range!r}"
            )
        if self.published is not None and not isinstance(self.published, dict):
            raise ValueError(f"published must be an object {{...}} or null, not {self.published!r}")
        super().__post_init__(**kwargs)

    def _check_blocks(self) -> None:
        """Raise ValueError for blocks that cannot be."""
        if self.block_length is None:
            return
        check_blocks(self.block_length, self.prompt_blocks)
        if self.prefix_attention:
            raise ValueError(
                f"block_length {self.block_length} and prefix_attention exclude each other; "
                "prompt_blocks 'prefix' lets a prompt see only itself"
            )

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Read a config as transformers does; ValueError for a config.json that asks for code."""
        refuse_kernels(config_dict)
        return super().from_dict(config_dict, **kwargs)

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read a config.json, in our fields where a published config is found."""
        content, rest = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if content.get("model_type") in MODEL_TYPES:
            content = {**our_config(content), "model_type": MmdlmConfig.model_type}
        return content, rest


def read_config(content: dict[str, Any], *, tokenizer_size: int | None = None) -> MmdlmConfig:
    """Turn a config.json, ours or that of a published family, into our config.

    Raises ValueError for a family or an option that is not known here.
    """
    try:
        check_stored(content)
        if content.get("model_type") == MmdlmConfig.model_type:
            return cast(MmdlmConfig, MmdlmConfig.from_dict(content))
        return MmdlmConfig(**our_config(content, tokenizer_size=tokenizer_size))
    except (AttributeError, TypeError, LookupError, ArithmeticError) as error:
        raise ValueError(
            f"config.json does not describe a model ({type(error).__name__}: {reason_of(error)}); "
            "mend it or download it again"
        ) from error


def _published(kind: str) -> type[MmdlmConfig]:
    """Return the class that `AutoConfig` asks for by a published `model_type`."""

    class Published(MmdlmConfig):
        model_type = kind

        @classmethod
        def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
            """Translate the fields and read them as our config."""
            return MmdlmConfig.from_dict(our_config(config_dict), **kwargs)

    return Published


AutoConfig.register("mmdlm", MmdlmConfig)
for _kind in MODEL_TYPES:
    AutoConfig.register(_kind, _published(_kind))
