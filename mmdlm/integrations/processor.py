"""What `AutoProcessor` gives for our models: conversations and images in, tensors of a call out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any, Self

import torch
from PIL import Image
from torch import Tensor
from transformers import (
    AutoProcessor,
    BatchFeature,
    PreTrainedTokenizerFast,
    ProcessorMixin,
)

from mmdlm.core.sequence import Segment, image_segment, text_segment
from mmdlm.core.vocabulary import Modality, Vocabulary
from mmdlm.models.checkpoints.run_steps import open_checkpoint, parts_of
from mmdlm.models.configuration import MmdlmConfig, read_config
from mmdlm.pipeline.hub import find_checkpoint
from mmdlm.pipeline.inputs import ImageLike, pillow_image
from mmdlm.pipeline.loading import load_text_tokenizer
from mmdlm.templates.auto import prompt_template_for
from mmdlm.templates.conversation import IMAGE, turns_of
from mmdlm.templates.prompt_template import PromptTemplate
from mmdlm.templates.text_codec import TextCodec
from mmdlm.vision.encoders.adapter import VisionConfig
from mmdlm.vision.encoders.crops import CropViews
from mmdlm.vision.encoders.pixel_values import stacked
from mmdlm.vision.encoders.tiling import Tiling

Row = tuple[list[Segment], list[Image.Image], list[CropViews]]


class MmdlmProcessor(ProcessorMixin):
    """Lay out prompts by the template of the model's family, and cut its images.

    It gives all that the model's `forward` and `generate` want: `input_ids` and `attention_mask`,
    padded on the left, and with images `mm_token_type_ids` (1 at slots), `pixel_values`,
    `image_sizes` and `batch_num_images`.

    Args:
        tokenizer: Of the text.
        vocabulary: Of the model.
        prompt_template: Of its family.
        tiling: How images are cut; None: the model sees none.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        vocabulary: Vocabulary,
        prompt_template: PromptTemplate,
        tiling: Tiling | None = None,
    ) -> None:
        self.tokenizer, self.vocabulary = tokenizer, vocabulary
        self.prompt_template, self.tiling = prompt_template, tiling
        self.chat_template = tokenizer.chat_template

    @classmethod
    def get_attributes(cls) -> list[str]:
        """Return the parts that are stored: the rest is in the model's config.json."""
        return ["tokenizer"]

    @classmethod
    def from_pretrained(cls, name: str | PathLike[str], **options: Any) -> Self:
        """Open the processor of a model.

        Args:
            name: A bundled name, a folder, or a repository of the Hugging Face Hub.
            **options: Of `AutoProcessor`, none of which has an effect.

        Returns:
            The processor.

        Raises:
            ValueError: If the model is not found, or is none of ours.
        """
        folder = find_checkpoint(name)
        tokenizer = load_text_tokenizer(parts_of(folder))
        config = read_config(open_checkpoint(folder).config, tokenizer_size=len(tokenizer))
        if config.vocabulary is None:
            raise ValueError(f"{folder}: config.json has no vocabulary; download it again")
        vision = None if config.vision is None else VisionConfig.from_dict(config.vision)
        template = prompt_template_for(
            (config.published or {}).get("family"),
            seeing=vision is not None,
            tasks=config.trained_tasks,
        )
        vocabulary = Vocabulary(**config.vocabulary)
        return cls(tokenizer, vocabulary, template, None if vision is None else vision.tiling)

    def save_pretrained(self, folder: str | PathLike[str], **options: Any) -> None:
        """Write the tokenizer, into the folder of the model, whose config.json has the rest."""
        self.tokenizer.save_pretrained(folder, **options)

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        *,
        return_tensors: str = "pt",
    ) -> BatchFeature:
        """Lay out texts as they are, with no template.

        Args:
            images: One image, those of one text, or a list of those of each; see `load_image`.
            text: One text or several, with `<image>` where an image stands.
            return_tensors: "pt" is all there is.

        Returns:
            The tensors of a call.

        Raises:
            ValueError: For as many images as no text asks for.
        """
        if text is None:
            raise ValueError("give a text, with <image> where an image stands")
        texts = [text] if isinstance(text, str) else list(text)
        rows = []
        for said, some in zip(texts, _of_each(images, len(texts)), strict=True):
            opened, views = self._look(some)
            pieces = said.split(IMAGE)
            if len(pieces) - 1 != len(views):
                raise ValueError(
                    f"a text has {len(pieces) - 1} {IMAGE}, but {len(views)} images were given; "
                    "write one for each"
                )
            segments = [text_segment(self._codec.encode_with_specials(pieces[0]))]
            for view, piece in zip(views, pieces[1:], strict=True):
                segments.append(image_segment(view, self.vocabulary))
                segments.append(text_segment(self._codec.encode_with_specials(piece)))
            rows.append((segments, opened, views))
        return self._stacked(rows, return_tensors)

    def apply_chat_template(
        self,
        conversation: Sequence[Any],
        *,
        add_generation_prompt: bool = True,
        tokenize: bool = True,
        return_dict: bool = True,
        return_tensors: str = "pt",
    ) -> BatchFeature | Tensor:
        """Lay out a conversation, or several, up to where the assistant's answer begins.

        Args:
            conversation: Messages {"role": ..., "content": ...}; content is a text, or a list of
                {"type": "text", "text": ...} and {"type": "image", "image": ...}. Or several such
                conversations.
            add_generation_prompt: Must be true: the last message is the user's.
            tokenize: Must be true: an image has no text.
            return_dict: False: only `input_ids`.
            return_tensors: "pt" is all there is.

        Returns:
            The tensors of a call.

        Raises:
            ValueError: For what is no conversation.
        """
        if not add_generation_prompt or not tokenize:
            raise ValueError(
                "apply_chat_template gives the tokens of a prompt; leave add_generation_prompt and "
                "tokenize as they are"
            )
        several = bool(conversation) and isinstance(conversation[0], list | tuple)
        rows = [self._asked(one) for one in (conversation if several else [conversation])]
        batch = self._stacked(rows, return_tensors)
        return batch if return_dict else batch["input_ids"]

    def decode(self, *args: Any, **kwargs: Any) -> str:
        """Decode as the tokenizer does."""
        return str(self.tokenizer.decode(*args, **kwargs))

    def batch_decode(self, *args: Any, **kwargs: Any) -> list[str]:
        """Decode as the tokenizer does."""
        return list(self.tokenizer.batch_decode(*args, **kwargs))

    @property
    def _codec(self) -> TextCodec:
        return TextCodec(self.tokenizer, self.vocabulary)

    def _asked(self, conversation: Any) -> Row:
        """Return the prompt of a conversation."""
        messages, given = [], []
        for message in conversation:
            content, images = _said(message)
            messages.append({"role": message["role"], "content": content})
            given += images
        self.prompt_template.require("chat", self.tokenizer)
        opened, views = self._look(given)
        asked = self.prompt_template.chat_prompt(self._codec, turns_of(messages, views), length=1)
        return list(asked.sequence.segments[: asked.output_segments[0]]), opened, views

    def _look(self, images: Sequence[ImageLike]) -> tuple[list[Image.Image], list[CropViews]]:
        """Open the images of a row and cut them."""
        if images and self.tiling is None:
            raise ValueError(
                f"this model ({self.prompt_template.family}) has no vision adapter; call the tasks "
                "of mmdlm.load(...), or leave images out"
            )
        opened = [pillow_image(one) for one in images]
        return opened, [] if self.tiling is None else self.tiling.views(opened)

    def _stacked(self, rows: Sequence[Row], return_tensors: str) -> BatchFeature:
        """Return rows as tensors, padded on the left."""
        if return_tensors != "pt":
            raise ValueError(f"return_tensors {return_tensors!r} is not known here; give 'pt'")
        length = max(sum(len(one.ids) for one in segments) for segments, _, _ in rows)
        ids = torch.full((len(rows), length), self.vocabulary.pad_id)
        real, slots = torch.zeros_like(ids), torch.zeros_like(ids)
        for row, (segments, _, _) in enumerate(rows):
            known = torch.cat([one.ids for one in segments])
            seen = [torch.full_like(o.ids, o.modality == Modality.FEATURE) for o in segments]
            start = length - len(known)
            ids[row, start:], real[row, start:], slots[row, start:] = known, 1, torch.cat(seen)
        found: dict[str, Any] = {"input_ids": ids, "attention_mask": real}
        views = [view for _, _, some in rows for view in some]
        if views:
            found["mm_token_type_ids"] = slots
            found["pixel_values"] = stacked(views)
            found["image_sizes"] = torch.tensor(
                [[one.height, one.width] for _, opened, _ in rows for one in opened]
            )
            found["batch_num_images"] = torch.tensor([len(opened) for _, opened, _ in rows])
        return BatchFeature(found)


def _of_each(images: Any, count: int) -> list[list[ImageLike]]:
    """Return the images of each of some texts."""
    if images is None:
        return [[] for _ in range(count)]
    given = list(images) if isinstance(images, list | tuple) else [images]
    if count == 1 and not (given and isinstance(given[0], list | tuple)):
        return [given]
    if len(given) != count:
        raise ValueError(
            f"images of {len(given)} texts, but there are {count}; give a list for each"
        )
    return [list(one) if isinstance(one, list | tuple) else [one] for one in given]


def _said(message: Mapping[str, Any]) -> tuple[str, list[ImageLike]]:
    """Return the text of a message, with `<image>` where an image stands, and its images."""
    content = message["content"]
    if isinstance(content, str):
        return content, []
    text, images = "", []
    for part in content:
        if part.get("type") == "text":
            text += part["text"]
            continue
        source = next((part[key] for key in ("image", "path", "url") if part.get(key)), None)
        if part.get("type") != "image" or source is None:
            raise ValueError(
                f'{part!r} is no part of a message; give {{"type": "text", "text": ...}} or '
                '{"type": "image", "image": ...}'
            )
        text += IMAGE
        images.append(source)
    return text, images


AutoProcessor.register(MmdlmConfig, MmdlmProcessor)
