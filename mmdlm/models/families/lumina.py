"""Lumina-DiMOO (arXiv:2510.06308): LLaDA with 8,192 image codes, a line end after each row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from mmdlm.core.vocabulary import Vocabulary
from mmdlm.models.families.base import Json
from mmdlm.models.families.llada import Llada, special_ids, vocabulary_size

FIRST_CODE, CODES = 126356, 8192
BEGIN_IMAGE_ID, END_IMAGE_ID = 126349, 126350
ARCHITECTURE = "LLaDAForMultiModalGeneration"


class LuminaDimoo(Llada):
    """Lumina-DiMOO; its config.json differs from LLaDA's only in the architecture and the size."""

    name: ClassVar[str] = "lumina"
    image_tokenizer: ClassVar[str | None] = "Alpha-VLLM/Lumina-DiMOO/vqvae"

    def matches(self, config: Json) -> bool:
        named = ARCHITECTURE in (config.get("architectures") or ())
        sized = vocabulary_size(config) == FIRST_CODE + CODES if "d_model" in config else False
        return "d_model" in config and "mm_vision_tower" not in config and (named or sized)

    def shape(self, config: Json) -> Json:
        return {**super().shape(config), "full_vocabulary": True}

    def vocabulary(self, config: Json, *, tokenizer_size: int | None = None) -> Vocabulary:
        """Return the vocabulary, whose last ids are the codes."""
        size = vocabulary_size(config)
        codes = config.get("codebook_size") or min(CODES, size // 2)
        first = FIRST_CODE if size >= FIRST_CODE + codes else size - codes  # a test model is small
        markers = (BEGIN_IMAGE_ID, END_IMAGE_ID)
        begin, end = markers if max(markers) < first else (first - 2, first - 1)
        ids = special_ids(config)
        if ids["mask_id"] >= first:
            ids = {"mask_id": first - 3, "eos_id": first - 4, "pad_id": first - 4}
        return Vocabulary(
            size=size,
            text=(0, first),
            image=(first, first + codes),
            begin_image_id=begin,
            end_image_id=end,
            **ids,
        )

    def published_config(self, ours: Mapping[str, Any]) -> Json:
        start, stop = ours["vocabulary"]["image"]
        if start == stop:
            raise ValueError(
                "Lumina-DiMOO draws, but this model has no image codes; write it as 'llada'"
            )
        return {
            **super().published_config(ours),
            "architectures": [ARCHITECTURE],
            "codebook_size": stop - start,  # not in the published one, where it is 8,192
        }
