"""The call of our Transformer as transformers' callers make it: ids, masks, labels, images."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from transformers import Cache, DynamicCache, PreTrainedConfig
from transformers.modeling_outputs import CausalLMOutputWithPast

from mmdlm.core.blocks import hidden_beside_clean, in_blocks
from mmdlm.core.sequence import (
    Batch,
    Segment,
    Sequence,
    Views,
    collate,
    image_segment,
    text_segment,
)
from mmdlm.core.vocabulary import Modality, Vocabulary
from mmdlm.models.attention import AttentionPattern
from mmdlm.models.generation import MaskedDiffusionGeneration, prompted
from mmdlm.models.noisy_targets import NoisyTargets
from mmdlm.models.token_layout import TokenLayout, check_options, given_inputs
from mmdlm.models.transformer import MmdlmModel, MmdlmPreTrainedModel
from mmdlm.vision.encoders.adapter import VisionAdapter
from mmdlm.vision.encoders.pixel_values import unstacked

# Newer versions of transformers call it `cache`.
_PAST = next(
    one.name for one in fields(CausalLMOutputWithPast) if one.name in ("cache", "past_key_values")
)


@dataclass(frozen=True)
class SeenImages:
    """What a vision adapter saw in the images of a call.

    Attributes:
        position: [B, L], or [B, L, A] where slots have rows and columns.
        features: [F, D] of the slots; None: there are no images.
        slots: [B, L] bool, where features stand; None: there are no images.
    """

    position: Tensor
    features: Tensor | None = None
    slots: Tensor | None = None

    def put(self, embeddings: Tensor) -> Tensor:
        """Put the features into the embeddings [B, L, D] of their slots."""
        if self.features is None or self.slots is None:
            return embeddings
        return embeddings.masked_scatter(
            self.slots[..., None].to(embeddings.device), self.features.to(embeddings.dtype)
        )


@dataclass(frozen=True)
class Wanted:
    """Outputs beside the logits: lists to be filled, or None where they are not wanted."""

    states: list[Tensor] | None
    weights: list[Tensor] | None

    @classmethod
    def of(
        cls,
        config: PreTrainedConfig,
        *,
        output_hidden_states: bool | None,
        output_attentions: bool | None,
    ) -> Wanted:
        """Take what is not given from the config."""
        if output_hidden_states is None:
            output_hidden_states = config.output_hidden_states
        if output_attentions is None:
            output_attentions = config.output_attentions
        return cls([] if output_hidden_states else None, [] if output_attentions else None)


class TransformersCall(MaskedDiffusionGeneration, MmdlmPreTrainedModel):
    """`forward` and `generate` of `MmdlmForMaskedDiffusion`."""

    vocabulary: Vocabulary
    model: MmdlmModel
    lm_head: torch.nn.Module
    vision: VisionAdapter | None

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
        mm_token_type_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_sizes: Tensor | None = None,
        batch_num_images: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Map ids [B, L] to logits [B, L, V], and to the loss of masked diffusion.

        These are the logits that the network was published with: under `shift` those at i predict
        token i + 1.

        Args:
            input_ids: [B, L].
            attention_mask: See `TokenLayout.of`.
            position_ids: See `TokenLayout.of`.
            inputs_embeds: [B, L, D] in place of `input_ids`.
            labels: [B, L] clean ids at targets, -100 at context. Targets are masked at random here,
                whatever stands there in `input_ids`, unless `loss_weight` says that they are.
            loss_weight: See `NoisyTargets.of`.
            num_items_in_batch: What the sum of the loss is divided by; None: the targets.
            skip_logits: With labels: return no logits; the head runs only at masked targets.
            mm_token_type_ids: [B, L], 1 at slots of images.
            pixel_values: [C, 3, H, W] crops of all images, uint8 or normalized.
            image_sizes: [N, 2] (height, width) of the images before they were cut.
            batch_num_images: [B] images of each row; None: one a row.
            past_key_values: Keys and values of tokens to the left, which all tokens see, and to
                which those of these tokens are added. Those to the left do not see these tokens.
                Newer versions of transformers call it `cache`, as may be done here.
            use_cache: Return `past_key_values`, new ones where none are given.
            output_hidden_states: Return the states that enter each layer, and the result.
            output_attentions: Return the weights of each layer [B, H, L, L]. They are computed in
                plain operations ("eager") whatever attn_implementation is.
            return_dict: False: a tuple.
            **kwargs: Of `IMPLIED`, which follow from the inputs.

        Returns:
            What was asked for; what was not is None, or left out of a tuple.

        Raises:
            ValueError: For inputs that do not fit each other or would have no effect.
        """
        past_key_values = kwargs.pop("cache", past_key_values)
        check_options(kwargs)
        given = given_inputs(input_ids, inputs_embeds, labels, loss_weight)
        if labels is None:
            self._check_prompts()
        past = self._past(past_key_values, use_cache)
        layout = TokenLayout.of(
            (given.shape[0], given.shape[1]),
            given.device,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past=0 if past is None else past.get_seq_length(),
        )
        images = self._look(layout, mm_token_type_ids, pixel_values, image_sizes, batch_num_images)
        targets = None
        if labels is not None:
            targets = NoisyTargets.of(
                given,
                labels,
                self.vocabulary,
                document=layout.document,
                position=images.position,
                features=images.features,
                slots=images.slots,
                loss_weight=loss_weight,
                training=self.training,
            )
            input_ids = targets.corruption.x_t
        wanted = Wanted.of(
            self.config,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
        )
        if inputs_embeds is None:
            inputs_embeds = self.model.embed_tokens(input_ids)
        hidden = self.model(
            images.put(inputs_embeds),
            images.position,
            layout.document,
            pattern=self._pattern(layout, targets, wanted.weights),
            record=wanted.states,
            past=past,
        )
        loss = None
        if targets is not None:
            loss = targets.loss(
                self,
                self._scored_states(targets, hidden),
                full_vocabulary=self.config.full_vocabulary,
                count=num_items_in_batch,
            )
        output = CausalLMOutputWithPast(
            loss=loss,
            logits=None if skip_logits and loss is not None else self.lm_head(hidden),
            **{_PAST: past},
            hidden_states=None if wanted.states is None else tuple(wanted.states),
            attentions=None if wanted.weights is None else tuple(wanted.weights),
        )
        as_dict = self.config.return_dict if return_dict is None else return_dict
        return output if as_dict else output.to_tuple()

    def _scored_states(self, targets: NoisyTargets, hidden: Tensor) -> Tensor:
        """Return the states [B, L, D] that the loss reads, each at the token that it predicts.

        A model of blocks sees the blocks before its own clean: `hidden`, of noisy ids only, has the
        logits, and the loss has a pass of its own over both copies.
        """
        if self.block_length is None:
            return self._aligned(hidden, targets.batch.position)
        corruption = targets.corruption
        return hidden_beside_clean(
            self, corruption.x_t, targets.batch, query_mask=corruption.loss_mask
        )

    def _past(self, past_key_values: Cache | None, use_cache: bool | None) -> Cache | None:
        """Return the cache to be added to; None: keys and values are not kept."""
        if past_key_values is None and not use_cache:
            return None
        if self.config.block_length is not None:
            raise ValueError(
                "use_cache: a model of blocks keeps them by its own sampler, generate(...); leave "
                "the cache out"
            )
        if self.training and any(layer.gradient_checkpointing for layer in self.model.layers):
            raise ValueError(
                "use_cache: layers that are computed again in the backward pass keep nothing; "
                "leave the cache out"
            )
        if past_key_values is not None and not isinstance(past_key_values, Cache):
            raise ValueError(
                f"past_key_values must be a Cache of transformers, such as DynamicCache(), not "
                f"{type(past_key_values).__name__}"
            )
        return DynamicCache() if past_key_values is None else past_key_values

    def _pattern(
        self, layout: TokenLayout, targets: NoisyTargets | None, weights: list[Tensor] | None
    ) -> AttentionPattern:
        """Return what tokens see."""
        kernel = self.config._attn_implementation
        plain = kernel == "eager" or weights is not None
        flex = kernel == "flex_attention" and not plain
        seen = self._seen(layout, targets)
        if layout.mask is not None:
            if any(part is not None for part in seen.values()):
                raise ValueError(
                    f"{' and '.join(k for k, part in seen.items() if part is not None)} of this "
                    "model say what tokens see, and a mask of pairs, or a cache under a mask, "
                    "would take their place; give a mask [B, L]"
                )
            pattern = AttentionPattern.given(layout.mask, flex=flex)
        elif plain:
            pattern = AttentionPattern.of(
                layout.document, flex=False, **seen, undivided=layout.undivided
            )
        else:
            pattern = self.model.pattern(layout.document, seen, undivided=layout.undivided)
        return pattern.in_plain_operations(weights=weights) if plain else pattern

    def _seen(self, layout: TokenLayout, targets: NoisyTargets | None) -> dict[str, Any]:
        """Return what of the config says what tokens see, where it says anything."""
        seen: dict[str, Any] = {"prefix": None, "block": None}
        if targets is not None:
            if self.config.prefix_attention:
                seen["prefix"] = targets.batch.prefix
            seen["block"] = self.in_blocks(targets.batch).block
        elif self.config.block_length is not None:
            position = layout.position if layout.position.ndim == 2 else layout.position.amax(-1)
            seen["block"] = position // self.config.block_length
        return seen

    @property
    def block_length(self) -> int | None:
        """Tokens of a block of block diffusion; None: there are no blocks."""
        return self.config.block_length

    def in_blocks(self, batch: Batch) -> Batch:
        """Return the batch in blocks, unless it says itself how it is cut."""
        if self.config.block_length is None or batch.block is not None:
            return batch
        return in_blocks(batch, self.config.block_length, prompt=self.config.prompt_blocks)

    def _check_prompts(self) -> None:
        """Raise ValueError for a model that has to know where prompts end, without labels."""
        if self.config.prefix_attention:
            what, stops = "prefix_attention", "what is a prefix"
        elif self.config.block_length is not None and self.config.prompt_blocks != "blocks":
            what, stops = f"prompt_blocks {self.config.prompt_blocks!r}", "where a prompt ends"
        else:
            return
        raise ValueError(
            f"{what}: {stops} follows from targets, which this call does not know; give labels, or "
            "use hidden and logits_at"
        )

    def _look(
        self,
        layout: TokenLayout,
        mm_token_type_ids: Tensor | None,
        pixel_values: Tensor | None,
        image_sizes: Tensor | None,
        batch_num_images: Tensor | None,
    ) -> SeenImages:
        """Return the features of a call's images, and the positions that these make."""
        position = layout.position
        if pixel_values is None:
            if mm_token_type_ids is not None and bool(mm_token_type_ids.any()):
                raise ValueError(
                    "mm_token_type_ids marks slots of images, but there are none; give "
                    "pixel_values and image_sizes"
                )
            return SeenImages(position)
        if self.vision is None:
            raise ValueError(
                "pixel_values were given to a model without a vision adapter; take one that sees, "
                "such as LLaDA-V"
            )
        if mm_token_type_ids is None or image_sizes is None:
            raise ValueError(
                "pixel_values need mm_token_type_ids and image_sizes; give all that the processor "
                "makes"
            )
        views = unstacked(
            pixel_values,
            image_sizes,
            self.vision.config.tiling,
            batch_num_images=batch_num_images,
        )
        slots = mm_token_type_ids == 1
        count, room = int(slots.sum()), sum(image.slots for image in views)
        if count != room:
            raise ValueError(
                f"mm_token_type_ids marks {count} slots, but the images fill {room}; give those "
                "that the processor of this model makes"
            )
        if self.config.rope_sections is not None and position.ndim == 2:
            position = _on_axes(layout, slots, views, self.vocabulary)
        return SeenImages(position, self.vision(views), slots)

    def _to_write(
        self, input_ids: Tensor, attention_mask: Tensor | None, count: int, **given: Any
    ) -> Batch:
        """Lay out prompts [B, L] and so many targets behind each."""
        batch = prompted(input_ids, attention_mask, count, self.vocabulary)
        if given["mm_token_type_ids"] is not None:
            given["mm_token_type_ids"] = F.pad(given["mm_token_type_ids"], (0, count))
        images = self._look(TokenLayout(batch.position, batch.document, None), **given)
        if images.slots is None:
            return batch
        return replace(
            batch,
            modality=batch.modality.masked_fill(images.slots, int(Modality.FEATURE)),
            features=images.features,
            axes=images.position if images.position.ndim == 3 else None,
        )

    def _aligned(self, hidden: Tensor, position: Tensor) -> Tensor:
        """[B, L, D] such that each state predicts the token at its own position.

        With `shift` that is its left neighbor's; the first token of a document keeps its own.
        Source: arXiv:2508.15487, section 2 (the shift of the autoregressive model is kept).
        """
        if not self.config.shift:
            return hidden
        return torch.where((position == 0)[..., None], hidden, hidden.roll(1, dims=1))


def _on_axes(
    layout: TokenLayout, slots: Tensor, views: tuple[Views, ...], vocabulary: Vocabulary
) -> Tensor:
    """Return positions [B, L, A] of rows with images, as `collate` counts them."""
    images = iter(views)
    real = layout.document >= 0
    documents = [
        Sequence(tuple(_segments(row[here].cpu(), images, vocabulary)))
        for row, here in zip(slots, real, strict=True)
    ]
    batch = collate(documents, vocabulary)
    axes = batch.axes
    if axes is None:
        return layout.position
    position = torch.zeros(*real.shape, axes.shape[-1], dtype=torch.int64)
    position[real.cpu()] = axes[~batch.is_padding]
    return position.to(slots.device)


def _segments(marks: Tensor, images: Iterator[Views], vocabulary: Vocabulary) -> Iterator[Segment]:
    """Yield the segments of a row [L] bool, true at slots; what its text says does not matter."""
    start = 0
    while start < len(marks):
        if bool(marks[start]):
            image = next(images)
            yield image_segment(image, vocabulary)
            start += image.slots
            continue
        rest = marks[start:].nonzero()
        stop = start + int(rest[0]) if len(rest) else len(marks)
        yield text_segment([vocabulary.eos_id] * (stop - start))
        start = stop
