"""Our models under transformers' signature: masks, labels, images, caches, kernels, graphs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMaskedLM,
    DynamicCache,
)

from mmdlm.core.diffusion.forward import Absorbing
from mmdlm.core.diffusion.schedule import Linear
from mmdlm.core.losses.objective import Objective
from mmdlm.core.sequence import Sequence, collate, image_segment, pack, text_segment
from mmdlm.models import attention
from mmdlm.models.encoder import MmdlmEncoder
from mmdlm.models.modeling import MmdlmForMaskedDiffusion
from mmdlm.models.noisy_targets import IGNORED, NoisyTargets
from mmdlm.vision.encoders.adapter import VisionConfig
from mmdlm.vision.encoders.anyres import Anyres
from mmdlm.vision.encoders.natural import Natural
from mmdlm.vision.encoders.pixel_values import stacked, unstacked
from mmdlm.vision.encoders.square import Square
from tests.models.test_encoder import CONFIGS
from tests.models.test_encoder import tiny as tiny_encoder
from tests.models.tiny import TOLERANCE, VOCABULARY, document, random_ids, tiny_config, tiny_model

SIGLIP = {
    "model_type": "siglip_vision_model",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
ANYRES = Anyres(size=8, grid=2, shapes=((1, 1), (2, 1), (1, 2)))


def image(width: int, height: int) -> Image.Image:
    levels = torch.arange(width * height * 3).reshape(height, width, 3) * 7 % 256
    return Image.fromarray(levels.to(torch.uint8).numpy())


# ---- masks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", ["sdpa", "eager", "flex_attention"])
@torch.no_grad()
def test_a_mask_of_pairs_is_a_mask_of_tokens(kernel: str) -> None:
    model, ids = tiny_model(), random_ids(2, 10)
    model.set_attn_implementation(kernel)
    mask = torch.ones(2, 10, dtype=torch.int64)
    mask[1, 6:] = 0
    expected = model(ids, mask).logits[mask.bool()]
    pairs = (mask[:, None, None, :] & mask[:, None, :, None]).bool()
    pairs |= torch.eye(10, dtype=torch.bool)  # so that padding sees something
    torch.testing.assert_close(model(ids, pairs).logits[mask.bool()], expected, **TOLERANCE)
    if kernel != "flex_attention":
        added = torch.zeros(2, 1, 10, 10).masked_fill(~pairs, torch.finfo(torch.float32).min)
        torch.testing.assert_close(model(ids, added).logits[mask.bool()], expected, **TOLERANCE)


@torch.no_grad()
def test_flex_takes_no_added_floats() -> None:
    model, ids = tiny_model(), random_ids(1, 4)
    model.set_attn_implementation("flex_attention")
    with pytest.raises(ValueError, match="bool mask"):
        model(ids, torch.zeros(1, 1, 4, 4))


@torch.no_grad()
def test_positions_that_begin_again_begin_a_document() -> None:
    model, ids = tiny_model(), random_ids(1, 9)
    packed = model(ids, position_ids=torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])).logits
    torch.testing.assert_close(packed[:, :4], model(ids[:, :4]).logits, **TOLERANCE)
    torch.testing.assert_close(packed[:, 4:], model(ids[:, 4:]).logits, **TOLERANCE)


@pytest.mark.parametrize(
    "given, reason",
    [
        ({}, "either input_ids or inputs_embeds"),
        ({"input_ids": torch.zeros(1, 3).long(), "inputs_embeds": torch.zeros(1, 3, 32)}, "one of"),
        ({"input_ids": torch.zeros(1, 3).long(), "attention_mask": torch.ones(1, 4)}, "1 x 3"),
        ({"input_ids": torch.zeros(1, 3).long(), "labels": torch.zeros(1, 4).long()}, "labels"),
        ({"inputs_embeds": torch.zeros(1, 3, 32), "labels": torch.zeros(1, 3).long()}, "input_ids"),
        ({"input_ids": torch.zeros(1, 3).long(), "loss_weight": torch.ones(1, 3)}, "give labels"),
        ({"input_ids": torch.zeros(1, 3).long(), "head_mask": torch.ones(2)}, "head_mask"),
        ({"input_ids": torch.zeros(1, 3).long(), "past_key_values": ((1,),)}, "DynamicCache"),
        ({"input_ids": torch.zeros(1, 3).long(), "pixel_values": torch.ones(1, 3, 8, 8)}, "vision"),
    ],
)
def test_what_does_not_fit_is_refused(given: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        tiny_model()(**given)


# ---- outputs -------------------------------------------------------------------------------------


@torch.no_grad()
def test_hidden_states_and_weights() -> None:
    model, ids = tiny_model(), random_ids(2, 6)
    output = model(ids, output_hidden_states=True, output_attentions=True)
    assert len(output.hidden_states) == 3
    assert torch.equal(model.lm_head(output.hidden_states[-1]), output.logits)
    assert torch.equal(output.hidden_states[0], model.model.embed_tokens(ids))
    assert [one.shape for one in output.attentions] == [(2, 4, 6, 6)] * 2
    torch.testing.assert_close(output.attentions[0].sum(-1), torch.ones(2, 4, 6))
    torch.testing.assert_close(output.logits, model(ids).logits, **TOLERANCE)


@torch.no_grad()
def test_a_cache_holds_tokens_that_do_not_see_what_follows() -> None:
    model, ids = tiny_model(), random_ids(2, 9)
    cache = model(ids[:, :5], use_cache=True).past_key_values
    after = model(ids[:, 5:], past_key_values=cache).logits
    pairs = torch.ones(9, 9, dtype=torch.bool)
    pairs[:5, 5:] = False
    expected = model(ids, pairs[None, None].expand(2, 1, -1, -1)).logits
    torch.testing.assert_close(after, expected[:, 5:], **TOLERANCE)
    assert cache.get_seq_length() == 9
    mask = torch.ones(2, 9, dtype=torch.int64)
    mask[1, :2] = 0
    cache = model(ids[:, :5], mask[:, :5], past_key_values=DynamicCache()).past_key_values
    after = model(ids[:, 5:], mask, past_key_values=cache).logits
    alone = model(ids[1:, 2:5], use_cache=True).past_key_values
    alone = model(ids[1:, 5:], past_key_values=alone).logits
    torch.testing.assert_close(after[1:], alone, **TOLERANCE)


# ---- labels --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        *({}, {"shift": True}, {"prefix_attention": True}, {"full_vocabulary": True}),
        *({"block_length": 4}, {"block_length": 3, "prompt_blocks": "causal", "shift": True}),
    ],
)
def test_labels_give_the_loss_of_our_own_objective(options: dict[str, Any]) -> None:
    model = tiny_model(**options)
    batch = collate([document(6, 4, seed=0), document(3, 5, seed=1)], VOCABULARY)
    objective = Objective(Absorbing(Linear()), full_vocabulary=bool(options.get("full_vocabulary")))
    corruption = objective.corrupt(batch, VOCABULARY, generator=torch.Generator().manual_seed(3))
    terms = objective.terms(model, batch, corruption)
    expected = sum(terms.sums.values()) / sum(terms.counts.values())
    given = {
        "input_ids": corruption.x_t,
        "attention_mask": (~batch.is_padding).long(),
        "labels": batch.ids.masked_fill(~batch.target, IGNORED),
        "loss_weight": corruption.weight,
    }
    loss = model(**given).loss
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    (ours,) = torch.autograd.grad(expected, [model.model.layers[0].mlp.up_proj.weight])
    (theirs,) = torch.autograd.grad(loss, [model.model.layers[0].mlp.up_proj.weight])
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(
        model(**given, num_items_in_batch=100).loss * 100, sum(terms.sums.values())
    )
    alone = model(**given, skip_logits=True)
    assert alone.logits is None
    assert torch.equal(alone.loss, loss)


def test_targets_are_masked_here_whatever_stands_there() -> None:
    model, ids = tiny_model().train(), random_ids(4, 12).clamp(1, 22)
    labels = ids.clone()
    labels[:, :3] = IGNORED
    torch.manual_seed(0)
    first = model(ids, labels=labels)
    hidden = ids.masked_fill(labels != IGNORED, VOCABULARY.mask_id)
    torch.manual_seed(0)
    again = model(hidden, labels=labels)
    assert torch.equal(first.loss, again.loss)
    assert not torch.equal(model(ids, labels=labels).loss, first.loss)
    model.eval()
    assert torch.equal(model(ids, labels=labels).loss, model(ids, labels=labels).loss)
    assert not torch.equal(
        model(ids.flip(0), labels=labels.flip(0)).loss, model(ids, labels=labels).loss
    )


def test_the_drawn_loss_is_the_bound_on_average() -> None:
    """With a model that knows nothing, cross-entropy is log V, and so is the bound."""
    model = tiny_model().eval()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    ids = torch.randint(0, 23, (256, 8), generator=torch.Generator().manual_seed(0))
    loss = model(ids, labels=ids).loss.detach()
    assert abs(float(loss) / torch.tensor(23.0).log() - 1) < 0.1


def test_ids_without_a_modality_are_no_targets() -> None:
    labels = torch.tensor([[VOCABULARY.mask_id, VOCABULARY.pad_id, 5]])
    targets = NoisyTargets.of(
        labels,
        labels,
        VOCABULARY,
        document=torch.zeros(1, 3).long(),
        position=torch.arange(3)[None],
    )
    assert targets.batch.target.tolist() == [[False, False, True]]


# ---- images --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tiling", [Square(size=8, grid=2), ANYRES, Natural(patch=4, max_patches=9)]
)
def test_pixel_values_are_views(tiling: Any) -> None:
    pictures = [[image(8, 8)], [image(12, 9), image(9, 12)]]
    views = [one for some in pictures for one in tiling.views(some)]
    sizes = [[one.height, one.width] for some in pictures for one in some]
    again = unstacked(stacked(views), sizes, tiling, batch_num_images=[1, 2])
    for ours, theirs in zip(again, views, strict=True):
        assert ours.layout == theirs.layout
        assert torch.equal(ours.crops, theirs.crops)
    with pytest.raises(ValueError, match="batch_num_images"):
        unstacked(stacked(views), sizes, tiling, batch_num_images=[1, 1])
    with pytest.raises(ValueError, match="crops"):
        unstacked(stacked(views)[1:], sizes, tiling, batch_num_images=[1, 2])


@torch.no_grad()
def test_a_model_sees_in_its_call_what_it_sees_in_a_batch() -> None:
    config = tiny_config(vision=VisionConfig(tower=SIGLIP, tiling=ANYRES).to_dict())
    torch.manual_seed(0)
    model = MmdlmForMaskedDiffusion(config).eval()
    (view,) = ANYRES.views([image(20, 9)])
    words = torch.randint(0, 23, (5,))
    sequence = Sequence((image_segment(view, VOCABULARY), text_segment(words, target=True)))
    batch = model.see(collate([sequence], VOCABULARY))
    expected = model.lm_head(model.hidden(batch.ids, batch))
    slots = torch.tensor([[1] * view.slots + [0] * 5])
    given = {
        "pixel_values": stacked([view]),
        "image_sizes": torch.tensor([[9, 20]]),
        "mm_token_type_ids": slots,
    }
    output = model(batch.ids, **given)
    torch.testing.assert_close(output.logits, expected, **TOLERANCE)
    assert model(batch.ids, labels=batch.ids.masked_fill(slots == 1, IGNORED), **given).loss > 0
    with pytest.raises(ValueError, match="slots"):
        model(batch.ids, **{**given, "mm_token_type_ids": torch.zeros_like(slots)})
    with pytest.raises(ValueError, match="pixel_values"):
        model(batch.ids, mm_token_type_ids=slots)
    written = model.generate(batch.ids, max_new_tokens=4, **given)
    assert written.shape == (1, batch.ids.shape[1] + 4)


# ---- kernels and graphs --------------------------------------------------------------------------


def varlen(query: Tensor, key: Tensor, value: Tensor, mask: None, **given: Any) -> Tensor:
    """What FlashAttention computes, run by run; [B, L, H, d]."""
    ends = given["cu_seq_lens_q"]
    assert mask is None
    assert given["is_causal"] is False
    if ends is None:
        ends = torch.arange(len(query) + 1) * query.shape[1]
    else:
        assert given["max_length_q"] == int(ends.diff().max())
    flat = [x.reshape(-1, *x.shape[-2:]) for x in (query, key, value)]
    runs = [
        torch.nn.functional.scaled_dot_product_attention(
            *(x[a:b].transpose(0, 1)[None] for x in flat), enable_gqa=True
        )[0].transpose(0, 1)
        for a, b in zip(ends.tolist(), ends.tolist()[1:], strict=False)
    ]
    return torch.cat(runs).view(query.shape)


@torch.no_grad()
def test_flash_attention_gets_the_runs_of_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_flash_attention_forward", varlen)
    model = tiny_model()
    batch = pack([document(n, 3, seed=n) for n in (2, 3, 4)], VOCABULARY, length=16)
    ids, mask = random_ids(2, 6), torch.ones(2, 6, dtype=torch.int64)
    mask[0, :2] = 0
    expected = model.hidden(batch.ids, batch), model(ids).logits, model(ids, mask).logits
    model.config._attn_implementation_internal = "flash_attention_2"
    found = model.hidden(batch.ids, batch), model(ids).logits, model(ids, mask).logits
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, **TOLERANCE)


def of_bert(kind: str) -> MmdlmEncoder:
    (config,) = (one for one in CONFIGS if one.model_type == kind)
    return tiny_encoder(config)


@pytest.mark.slow
@pytest.mark.parametrize(
    "make, kernel",
    [(tiny_model, "sdpa"), (tiny_model, "eager"), (partial(of_bert, "modernbert"), "sdpa")],
    ids=["ours", "eager", "modernbert"],
)
@torch.no_grad()
def test_one_graph_for_any_length(make: Callable[[], Any], kernel: str) -> None:
    model = make()
    model.set_attn_implementation(kernel)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=True)
    rows, length = torch.export.Dim("rows", min=2), torch.export.Dim("length", min=2)
    given = inputs(2, 12)
    exported = torch.export.export(
        model, (), given, dynamic_shapes={name: {0: rows, 1: length} for name in given}
    ).module()
    for shape in ((2, 12), (3, 7)):
        given = inputs(*shape)
        expected = model(**given).logits
        torch.testing.assert_close(exported(**given).logits, expected, **TOLERANCE)
        torch.testing.assert_close(compiled(**given).logits, expected, **TOLERANCE)


def inputs(rows: int, length: int) -> dict[str, Tensor]:
    """Ids that every model knows, and a mask with padding on the left."""
    mask = torch.ones(rows, length, dtype=torch.int64)
    mask[0, :2] = 0
    return {"input_ids": random_ids(rows, length).clamp(5, 20), "attention_mask": mask}


# ---- Auto classes --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "auto", [AutoModelForMaskedLM, AutoModelForCausalLM, AutoModelForImageTextToText]
)
@torch.no_grad()
def test_auto_classes_open_a_resized_model(auto: Any, tmp_path: Path) -> None:
    model, ids = tiny_model(), random_ids(1, 5)
    before = model(ids.clamp(max=22)).logits[..., :23]
    model.resize_token_embeddings(VOCABULARY.size + 3)
    model.save_pretrained(tmp_path / "model")
    again = auto.from_pretrained(tmp_path / "model")
    assert isinstance(again, MmdlmForMaskedDiffusion)
    assert again.vocabulary == model.vocabulary
    assert again.config.vocab_size == VOCABULARY.size + 3
    torch.testing.assert_close(again(ids.clamp(max=22)).logits[..., :23], before, **TOLERANCE)
