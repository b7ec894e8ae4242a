"""MMaDA (arXiv:2505.15809): LLaDA with the codes of an image tokenizer after its text ids."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from mmdlm.core.vocabulary import Vocabulary
from mmdlm.models.families.base import Json, required
from mmdlm.models.families.llada import Llada, special_ids, vocabulary_size

BEGIN_IMAGE_ID, END_IMAGE_ID = 126084, 126085
# LLaDA pads its embedding beyond its tokenizer; MMaDA's codes begin where the tokenizer ends.
TOKENIZER_SIZE = {126464: 126349}


class Mmada(Llada):
    """MMaDA 8B base and MixCoT: drawn codes and text in one vocabulary, trained over all of it."""

    name: ClassVar[str] = "mmada"
    model_types: ClassVar[tuple[str, ...]] = ("mmada", "llada")
    image_tokenizer: ClassVar[str | None] = "showlab/magvitv2"

    def matches(self, config: Json) -> bool:
        return "d_model" in config and bool(config.get("codebook_size"))

    def shape(self, config: Json) -> Json:
        return {**super().shape(config), "full_vocabulary": True}

    def vocabulary(self, config: Json, *, tokenizer_size: int | None = None) -> Vocabulary:
        """Return the vocabulary: codes follow the tokenizer's last id, not the padded table."""
        size, codes = vocabulary_size(config), int(required(config, "codebook_size"))
        padded = config.get("llm_vocab_size") or size - codes
        first = int(tokenizer_size or TOKENIZER_SIZE.get(padded, padded))
        if first + codes > size:
            raise ValueError(
                f"{first} text ids and {codes} image codes do not fit in the {size} rows of the "
                "embedding; the tokenizer or config.json belongs to another model"
            )
        markers = (BEGIN_IMAGE_ID, END_IMAGE_ID)
        begin, end = markers if max(markers) < first else (first - 2, first - 1)  # a test model
        return Vocabulary(
            size=size,
            text=(0, first),
            image=(first, first + codes),
            begin_image_id=begin,
            end_image_id=end,
            **special_ids(config),
        )

    def published_config(self, ours: Mapping[str, Any]) -> Json:
        words = ours["vocabulary"]
        codes = words["image"][1] - words["image"][0]
        if not codes:
            raise ValueError("MMaDA draws, but this model has no image codes; write it as 'llada'")
        # Rows before the codes, those that the tokenizer does not use included.
        padded, first = words["size"] - codes, words["image"][0]
        return {
            **super().published_config(ours),
            "architectures": ["MMadaModelLM"],
            "model_type": "mmada",
            "llm_vocab_size": padded if TOKENIZER_SIZE.get(padded, padded) == first else first,
            "codebook_size": codes,
            "new_vocab_size": words["size"],
        }
