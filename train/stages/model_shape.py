"""The shape of a new Transformer, for runs that start from nothing."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal

import torch
from transformers import PreTrainedTokenizerFast

from data_pipelines.room import check_room
from mmdlm.core.vocabulary import Vocabulary
from mmdlm.models.configuration import MmdlmConfig
from mmdlm.models.costs import Costs
from mmdlm.models.modeling import MmdlmForMaskedDiffusion
from mmdlm.vision.tokenizers.base import ImageTokenizer

Attention = Literal["sdpa", "flex_attention"]
USUAL_POSITIONS = 2048


@dataclass(frozen=True)
class Shape:
    """Shape of a new Transformer; the fields are those of `MmdlmConfig`.

    Attributes:
        text_slots: None: as many as the sources have, where each of them has some, and otherwise
            any number; see `train.stages.row_lengths`.
        max_position_embeddings: None: as many as a row of the data has tokens; `USUAL_POSITIONS` at
            least where texts have any length, since more is learned later.
    """

    hidden_size: int = 256
    intermediate_size: int = 704
    num_hidden_layers: int = 8
    num_attention_heads: int = 4
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int | None = None
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    attention_bias: bool = False
    qk_norm: bool = False
    tie_word_embeddings: bool = False
    text_slots: int | None = None

    def build(
        self,
        words: PreTrainedTokenizerFast,
        images: ImageTokenizer | None,
        *,
        seed: int,
        attention: Attention,
    ) -> MmdlmForMaskedDiffusion:
        """With random weights, which follow from the seed; over the ids of both tokenizers.

        Raises ValueError for a text tokenizer without an end of text, and for a shape that no
        memory holds.
        """
        if words.eos_token_id is None:
            raise ValueError("the text tokenizer has no end-of-text token; set its eos_token")
        vocabulary = Vocabulary.build(
            text_size=len(words),
            eos_id=words.eos_token_id,
            image_codes=images.codebook_size if images is not None else 0,
        )
        given = {name: value for name, value in asdict(self).items() if value is not None}
        config = MmdlmConfig(vocabulary=vocabulary.to_dict(), **given)
        weights = 4 * Costs(config).parameters
        check_room(
            f"model (hidden_size {self.hidden_size}, intermediate_size {self.intermediate_size}, "
            f"{self.num_hidden_layers} layers, {vocabulary.size} ids)",
            {"weights": weights, "gradients": weights},
            mend="its shape or its vocabulary",
        )
        config._attn_implementation = attention
        with torch.random.fork_rng():  # the caller's state stays
            torch.manual_seed(seed)
            return MmdlmForMaskedDiffusion(config)
