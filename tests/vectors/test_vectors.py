"""Outputs of the original implementations, found in folders and not named here.

Every sub-folder of MMDLM_VECTORS (one folder, or several with os.pathsep between them; default:
../shared/vectors and ../shared/vectors_block, seen from the repository) is one checkpoint with
`config.json`, `model.safetensors` and `expected.safetensors`. The family in its config picks the
check, so that a new vector of a known family needs no new test.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModel

from mmdlm.core.blocks import doubled, hidden_beside_clean, in_blocks
from mmdlm.core.diffusion.forward import Absorbing, Corruption
from mmdlm.core.diffusion.schedule import Cosine, Linear
from mmdlm.core.losses.objective import ModalityLoss, Objective
from mmdlm.core.sampling.block_rules import BlockTransfer
from mmdlm.core.sampling.cache import FinishedBlocks
from mmdlm.core.sampling.guidance import ClassifierFreeGuidance
from mmdlm.core.sampling.order import Confidence, Entropy, LeftToRight, Margin, Order
from mmdlm.core.sampling.sampler import Sampler
from mmdlm.core.sampling.unmasking import (
    Ancestral,
    ScheduledTransfer,
    Threshold,
    UnmaskingRule,
)
from mmdlm.core.sequence import (
    NO_DOCUMENT,
    Batch,
    Sequence,
    collate,
    image_segment,
    pack,
    text_segment,
)
from mmdlm.core.vocabulary import Modality, Vocabulary
from mmdlm.models.attention import AttentionPattern
from mmdlm.models.modeling import MmdlmForMaskedDiffusion
from mmdlm.pipeline.convert import convert
from mmdlm.vision.image_files import open_image
from mmdlm.vision.tokenizers.auto import load_image_tokenizer
from mmdlm.vision.tokenizers.magvit2 import Magvit2Tokenizer

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared"
GIVEN = os.environ.get("MMDLM_VECTORS")
VECTORS = (
    [Path(one) for one in GIVEN.split(os.pathsep)]
    if GIVEN
    else [SHARED / "vectors", SHARED / "vectors_block"]
)

pytestmark = pytest.mark.vectors


def check_magvit2(folder: Path) -> None:
    """The same codes, except where a channel is all but zero, and the same pixels."""
    tokenizer = load_image_tokenizer(folder)
    assert isinstance(tokenizer, Magvit2Tokenizer)
    expected = load_file(folder / "expected.safetensors")
    pixels, codes = expected["pixel_values"], expected["codes"]
    with torch.no_grad():
        z = tokenizer.encoder(pixels)
        reconstruction = tokenizer.decode(codes)
    torch.testing.assert_close(z, expected["encoder_out"], atol=1e-4, rtol=1e-4)
    decided = (z.abs() > 1e-5).all(1).flatten(1)  # [N, K]
    assert decided.float().mean() > 0.9
    assert torch.equal(tokenizer.encode(pixels)[decided], codes[decided])
    torch.testing.assert_close(reconstruction, expected["reconstruction"], atol=1e-4, rtol=0)


# ---- language models -----------------------------------------------------------------------------


def published(folder: Path) -> tuple[MmdlmForMaskedDiffusion, dict[str, Tensor], dict[str, Any]]:
    """The model as transformers' Auto class reads it, and what the original said."""
    model = AutoModel.from_pretrained(folder)
    assert isinstance(model, MmdlmForMaskedDiffusion)
    settings = json.loads((folder / "expected.json").read_text())
    return model, load_file(folder / "expected.safetensors"), settings


def answers(model: MmdlmForMaskedDiffusion, prompt: Tensor, length: int) -> Batch:
    """Prompts [B, P] followed by `length` open tokens each."""
    hole = torch.zeros(length, dtype=torch.int64)
    return collate(
        [Sequence((text_segment(row), text_segment(hole, target=True))) for row in prompt],
        model.vocabulary,
    )


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def check_neighbors_change_nothing(model: MmdlmForMaskedDiffusion, ids: Tensor) -> None:
    """A padded or packed row has the states that it has alone."""
    rows = [row[: len(row) - 3 * i] for i, row in enumerate(ids)]
    documents = [Sequence((text_segment(row),)) for row in rows]
    vocabulary = model.vocabulary
    with torch.no_grad():
        alone = [
            model.hidden(row[None], collate([doc], vocabulary))[0]
            for row, doc in zip(rows, documents, strict=True)
        ]
        padded = collate(documents, vocabulary)
        packed = pack(documents, vocabulary, length=sum(map(len, rows)) + 5)
        for batch in (padded, packed):
            hidden = model.hidden(batch.ids, batch)
            found = [
                hidden[b][batch.document[b] == d]
                for b in range(len(batch))
                for d in range(int(batch.document[b].max()) + 1)
            ]
            for one in alone:
                gaps = [
                    float((one - other).abs().max()) for other in found if other.shape == one.shape
                ]
                assert min(gaps) < 1e-5


def check_there_and_back(folder: Path, tmp_path: Path) -> None:
    """Their tensors and config come back bit for bit."""
    family = AutoModel.from_pretrained(folder).config.published["family"]
    list(convert(folder, tmp_path / "ours"))
    list(convert(tmp_path / "ours", tmp_path / "theirs", to=family))
    back = load_file(tmp_path / "theirs" / "model.safetensors")
    original = load_file(folder / "model.safetensors")
    assert back.keys() == original.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in original.items())
    assert all(back[name].dtype == tensor.dtype for name, tensor in original.items())
    config = json.loads((folder / "config.json").read_text())
    assert json.loads((tmp_path / "theirs" / "config.json").read_text()) == config


def check_llada(folder: Path) -> None:
    """Logits, and every decoding that the vector has: whole, in blocks, with guidance."""
    model, expected, settings = published(folder)
    with torch.no_grad():
        logits = model(expected["input_ids"]).logits
    torch.testing.assert_close(logits, expected["logits"], atol=1e-4, rtol=0)
    check_neighbors_change_nothing(model, expected["input_ids"])
    for name, ids in expected.items():
        if not name.startswith("gen"):
            continue
        wanted = settings[name]
        sampler = Sampler(
            wanted["steps"],
            block_length=wanted["block_length"],
            temperature=wanted.get("temperature", 0.0),
            guidance=ClassifierFreeGuidance(wanted.get("cfg_scale", 0.0) + 1),
            full_vocabulary=True,
            allow_mask_token=True,
        )
        batch = answers(model, expected["prompt"], wanted["gen_length"])
        assert torch.equal(sampler(model, batch, generator=generator()).ids, ids), name


def drawing(model: MmdlmForMaskedDiffusion, ids: Tensor, mask: Tensor) -> Batch:
    """A published row, padding marked by 0, in which the masked tokens are image codes to draw."""
    open_codes = (ids == model.vocabulary.mask_id) & mask.bool()
    return Batch(
        ids=ids,
        modality=torch.where(open_codes, int(Modality.IMAGE), int(Modality.TEXT)),
        target=open_codes,
        document=torch.where(mask.bool(), 0, NO_DOCUMENT),
        segment=torch.zeros_like(ids),
        position=(mask.cumsum(-1) - 1).clamp_min(0),
    )


def check_mmada(folder: Path) -> None:
    """Logits beside padding, images with and without guidance, and text that follows."""
    model, expected, settings = published(folder)
    check_neighbors_change_nothing(model, expected["mmu_prompt"])
    model = model.double()
    ids, mask = expected["input_ids"], expected["attention_mask"]
    with torch.no_grad():
        logits = model(ids, mask).logits[mask.bool()]
    torch.testing.assert_close(
        logits, expected["logits_pairwise_mask"][mask.bool()], atol=1e-4, rtol=0
    )
    batch = drawing(model, ids, mask)
    other = drawing(model, expected["uncond_input_ids"], expected["uncond_attention_mask"])
    for task, codes in (("t2i", "t2i_codes"), ("t2i_cfg", "t2i_codes_cfg")):
        wanted = settings[task]
        assert wanted.get("temperature", 0.0) == 0.0
        sampler = Sampler(
            wanted["timesteps"],
            order=Confidence(),
            unmasking=ScheduledTransfer(Cosine(), least=1, strict=True),
            guidance=ClassifierFreeGuidance(wanted["guidance_scale"] + 1),
        )
        drawn = sampler(model, batch, generator=generator(), unconditional=other).ids
        drawn = model.vocabulary.codes(drawn[batch.target]).view(len(ids), -1)
        assert torch.equal(drawn, expected[codes]), task
    wanted = settings["mmu"]
    sampler = Sampler(
        wanted["steps"],
        block_length=wanted["block_length"],
        full_vocabulary=True,
        allow_mask_token=True,
    )
    batch = answers(model, expected["mmu_prompt"], wanted["max_new_tokens"])
    written = sampler(model, batch, generator=generator()).ids
    assert torch.equal(written, expected["mmu_generate"])


def check_dream(folder: Path) -> None:
    """The raw logits, and the three orders of its decoding, which see them moved by one."""
    model, expected, settings = published(folder)
    with torch.no_grad():
        logits = model(expected["input_ids"]).logits
    torch.testing.assert_close(logits, expected["logits"], atol=1e-4, rtol=0)
    check_neighbors_change_nothing(model, expected["input_ids"])
    wanted = settings["gen"]
    assert wanted["temperature"] == wanted["alg_temp"] == 0.0
    orders: dict[str, Order] = {
        "gen_entropy": Entropy(),
        "gen_maskgit_plus": Confidence(),
        "gen_topk_margin": Margin(),
    }
    for name, order in orders.items():
        sampler = Sampler(
            wanted["steps"],
            order=order,
            unmasking=Ancestral(Linear(wanted["eps"])),
            full_vocabulary=True,
            allow_mask_token=True,
        )
        batch = answers(model, expected["prompt"], wanted["max_new_tokens"])
        assert torch.equal(sampler(model, batch, generator=generator()).ids, expected[name]), name


def check_llada_v(folder: Path) -> None:
    """Crops to the level, what the tower and the adapter make of them, and the logits around."""
    model, expected, settings = published(folder)
    assert model.vision is not None
    vocabulary = model.vocabulary
    (views,) = model.vision.config.tiling.views([open_image(folder / "image.png")])
    assert torch.equal(views.crops, expected["pixel_values_u8"])
    assert views.slots == settings["n_image_tokens"]
    (row,) = expected["input_ids"]
    (place,) = (row == settings["image_token_index"]).nonzero()[0].tolist()
    document = Sequence(
        (
            text_segment(row[:place]),
            image_segment(views, vocabulary),
            text_segment(row[place + 1 :]),
        )
    )
    with torch.no_grad():
        (seen,) = model.vision.look([views])
        tower = expected["tower_features_crop0"]
        torch.testing.assert_close(seen.crops[0], tower, atol=1e-3, rtol=0)
        batch = model.see(collate([document], vocabulary))
        torch.testing.assert_close(batch.features, expected["image_embeds"], atol=1e-3, rtol=0)
        hidden = model.hidden(batch.ids, batch)
        logits = model.logits_at(hidden, torch.ones_like(batch.target))
    first, last = expected["logits_first8"], expected["logits_last10"]
    torch.testing.assert_close(logits[: len(first)], first, atol=1e-3, rtol=0)
    torch.testing.assert_close(logits[-len(last) :], last, atol=1e-3, rtol=0)
    check_neighbors_change_nothing(model, row[row >= 0].repeat(2, 1))


def check_block_logits(model: MmdlmForMaskedDiffusion, expected: dict[str, Tensor]) -> None:
    """Raw logits under the block-causal mask of each block length that the vector has."""
    ids = expected["input_ids"]
    shift, model.config.shift = model.config.shift, False
    batch = collate([Sequence((text_segment(row),)) for row in ids], model.vocabulary)
    names = [name for name in expected if name.startswith("logits_block")]
    assert names
    with torch.no_grad():
        for name in names:
            hidden = model.hidden(ids, in_blocks(batch, int(name.removeprefix("logits_block"))))
            logits = model.logits_at(hidden, torch.ones_like(batch.target)).view(*ids.shape, -1)
            torch.testing.assert_close(logits, expected[name], atol=1e-4, rtol=0)
    model.config.shift = shift


def check_both(model: MmdlmForMaskedDiffusion, sampler: Sampler, batch: Batch) -> Tensor:
    """The ids that a sampler writes, with the cache of finished blocks and without."""
    anew = sampler(model, batch, generator=generator()).ids
    kept = replace(sampler, cache=FinishedBlocks())(model, batch, generator=generator()).ids
    assert torch.equal(kept, anew)
    return kept


def check_training(
    model: MmdlmForMaskedDiffusion,
    batch: Batch,
    corruption: Corruption,
    *,
    mask: Tensor,
    logits: Tensor,
    losses: Objective,
) -> float:
    """What each token sees, the raw logits of the noisy copy, and the loss, which is returned.

    `mask` is that of the doubled row of one document, noisy copy first.
    """
    assert batch.block is not None
    layout = doubled(batch)
    assert layout.block is not None
    pattern = AttentionPattern.of(
        layout.document, flex=False, block=layout.block, noisy=layout.noisy
    )
    assert pattern.dense is not None
    if len(set(batch.document[0].tolist())) == 1:
        assert torch.equal(pattern.dense[0, 0], mask.bool())
    with torch.no_grad():
        shift, model.config.shift = model.config.shift, False
        hidden = hidden_beside_clean(model, corruption.x_t, batch)
        model.config.shift = shift
        found = model.logits_at(hidden, torch.ones_like(batch.target))
        torch.testing.assert_close(found.view(logits.shape), logits, atol=1e-4, rtol=0)
        terms = losses.terms(model, batch, replace(corruption, block=batch.block))
    return float(terms.sums["text"] / terms.counts["text"])


def check_sdar_training(
    model: MmdlmForMaskedDiffusion, expected: dict[str, Tensor], name: str, settings: dict[str, Any]
) -> None:
    """One or several documents in a row, padding being one; all labels are counted."""
    ids, position = expected[f"{name}_input_ids"], expected[f"{name}_position_ids"].clone()
    padding = settings["padding"]
    position[:, ids.shape[1] - padding :] = torch.arange(padding)
    masked, target = expected[f"{name}_masked"].bool(), expected[f"{name}_labels"] != -100
    document = (position == 0).long().cumsum(1) - 1
    batch = Batch(
        ids=ids,
        modality=torch.full_like(ids, int(Modality.TEXT)),
        target=target,
        document=document,
        segment=document,
        position=position,
    )
    batch = in_blocks(batch, settings["block_size"])
    noisy = expected[f"{name}_noisy_rows"].bool()  # where the masked tokens stand
    logits = torch.zeros(*ids.shape, model.vocabulary.size)
    starts = (position == 0)[0].nonzero()[:, 0].tolist()
    columns: list[int] = []  # of the noisy copy: per document x_t, then x_0
    for start, stop in zip(starts, [*starts[1:], ids.shape[1]], strict=True):
        columns += range(2 * start, 2 * start + stop - start)
    logits[0] = expected[f"{name}_logits"][0, columns]
    assert torch.equal(noisy[0, columns], masked[0])
    p_mask = torch.ones(ids.shape)
    p_mask[masked] = expected[f"{name}_p_mask"]
    corruption = Corruption(
        x_t=expected[f"{name}_doubled_ids"][:, columns],
        is_noised=masked,
        loss_mask=masked,
        t=p_mask,
        p_mask=p_mask,
        slope=torch.ones_like(p_mask),
        weight=1 / p_mask,
    )
    objective = Objective(Absorbing(Linear()), full_vocabulary=True)
    mask = expected[f"{name}_mask"]
    loss = check_training(model, batch, corruption, mask=mask, logits=logits, losses=objective)
    assert loss == pytest.approx(float(expected[f"{name}_loss"]), abs=1e-4)


def check_sdar(folder: Path) -> None:
    """Logits by block length, and its orders: static, dynamic and one after the other."""
    model, expected, settings = published(folder)
    check_block_logits(model, expected)
    check_neighbors_change_nothing(model, expected["input_ids"])
    model.config.block_length = None  # rows say themselves how they are cut
    for name, ids in expected.items():
        if not name.startswith("gen"):
            continue
        wanted = settings[name]
        prompt, block, strategy = (
            expected[wanted["prompt"]],
            wanted["block_length"],
            wanted["remasking_strategy"],
        )
        unmasking: UnmaskingRule = BlockTransfer(block)
        if strategy == "low_confidence_dynamic":
            unmasking = Threshold(wanted["confidence_threshold"], fallback=unmasking)
        sampler = Sampler(
            wanted["denoising_steps"],
            steps_per_block=True,
            order=LeftToRight() if strategy == "sequential" else Confidence(),
            unmasking=unmasking,
            full_vocabulary=True,
        )
        batch = in_blocks(answers(model, prompt, ids.shape[1] - prompt.shape[1]), block)
        assert torch.equal(check_both(model, sampler, batch), ids), name
    for name in ("train", "train_packed"):
        check_sdar_training(model, expected, name, settings[name])


def check_fast_dllm(folder: Path) -> None:
    """Logits by block length, and what it writes in pieces of a block, with and without a stop."""
    model, expected, settings = published(folder)
    check_block_logits(model, expected)
    check_neighbors_change_nothing(model, expected["input_ids"])
    model.config.block_length = None
    for name, ids in expected.items():
        if not name.startswith("gen") or name == "gen_block_cache":  # stale keys within a block
            continue
        wanted = settings[name]
        prompt, block, piece = (
            expected[wanted["prompt"]],
            wanted["block_size"],
            wanted["small_block_size"],
        )
        unmasking: UnmaskingRule = BlockTransfer(piece)
        if wanted["threshold"] < 1:
            unmasking = Threshold(wanted["threshold"], fallback=unmasking)
        sampler = Sampler(
            piece,
            block_length=piece,
            steps_per_block=True,
            first_alone=True,
            unmasking=unmasking,
            full_vocabulary=True,
            stop_ids=(wanted["stop_token"],) if "stop_token" in wanted else (),
        )
        turns = wanted["max_new_tokens"] // block
        new = turns * block - prompt.shape[1] % block + 1
        batch = in_blocks(answers(model, prompt, new), block)
        written = check_both(model, sampler, batch)
        assert torch.equal(written[:, : ids.shape[1]], ids), name
        if "stop_token" not in wanted:
            assert written.shape == ids.shape, name
    check_fast_dllm_training(model, expected, settings["train"]["bd_size"])


def check_fast_dllm_training(
    model: MmdlmForMaskedDiffusion, expected: dict[str, Tensor], block: int
) -> None:
    """Both complementary copies: each label counts once, and each state predicts the next token."""
    ids, labels = expected["train_input_ids"], expected["train_labels"]
    x_t = expected["train_doubled_ids"][:, : ids.shape[1]]  # two copies of each row
    masked = expected["train_doubled_labels"] != -100
    masked[:, 0] = False  # nothing comes before it
    twice = ids.repeat(2, 1)
    document = torch.zeros_like(twice)
    batch = Batch(
        ids=twice,
        modality=torch.full_like(twice, int(Modality.TEXT)),
        target=(labels != -100).repeat(2, 1),
        document=document,
        segment=document,
        position=torch.arange(ids.shape[1]).expand_as(twice),
    )
    ones = torch.ones(twice.shape)
    corruption = Corruption(x_t, masked, masked, ones, ones, ones, ones)
    objective = Objective(
        Absorbing(Linear()),
        text=ModalityLoss(loss_normalization="masked_token"),
        full_vocabulary=True,
    )
    loss = check_training(
        model,
        in_blocks(batch, block),
        corruption,
        mask=expected["train_mask"],
        logits=expected["train_logits"],
        losses=objective,
    )
    assert loss == pytest.approx(float(expected["train_loss"]), abs=1e-4)


class Said:
    """A denoiser whose logits [B, L, V] are known; only its vocabulary and its head are asked."""

    def __init__(self, logits: Tensor, mask_id: int) -> None:
        size = logits.shape[-1]
        self.logits = logits
        self.vocabulary = Vocabulary(
            size=size, text=(0, size - 1), image=(size, size), mask_id=mask_id, eos_id=0, pad_id=0
        )

    def hidden(self, x_t: Tensor, batch: Batch, **_: Any) -> Tensor:
        return self.logits

    def head_weight(self) -> None:
        return None

    def logits_at(self, hidden: Tensor, positions: Tensor, *, ids: tuple[int, int]) -> Tensor:
        return hidden[positions][:, slice(*ids)]


def check_bd3lm(folder: Path) -> None:
    """Its mask, and its loss from its own logits: clipped, resampled, of one token, of a row."""
    settings = json.loads((folder / "expected.json").read_text())
    config = json.loads((folder / "config.json").read_text())
    expected = load_file(folder / "expected.safetensors")
    ids, mask_id = expected["x0"], settings["mask_index"]
    zero = torch.zeros_like(ids)
    batch = Batch(
        ids=ids,
        modality=torch.full_like(ids, int(Modality.TEXT)),
        target=torch.ones_like(ids).bool(),
        document=zero,
        segment=zero,
        position=torch.arange(ids.shape[1]).expand_as(ids),
    )
    layout = doubled(in_blocks(batch, config["block"]))
    pattern = AttentionPattern.of(
        layout.document, flex=False, block=layout.block, noisy=layout.noisy
    )
    assert pattern.dense is not None
    assert torch.equal(pattern.dense[0, 0], expected["mask_doubled"].bool())
    for name, case in settings["cases"].items():
        x_t, t = expected[f"{name}_xt"], expected[f"{name}_t"].expand(ids.shape)
        cut = in_blocks(batch, case["block"])
        assert cut.block is not None
        assert all(len(set(t[0, cut.block[0] == b].tolist())) == 1 for b in cut.block[0].unique())
        masked = x_t == mask_id
        ones = torch.ones_like(t)
        weight = ones if case["eps_min"] > 0.5 else 1 / t
        scored = replace(batch, target=expected[f"{name}_token_mask"].bool())
        masked = masked & scored.target
        corruption = Corruption(x_t, masked, masked, t, t, ones, weight)
        denoiser: Any = Said(expected[f"{name}_logits"], mask_id)
        terms = Objective(Absorbing(Linear())).terms(denoiser, scored, corruption)
        loss = float(terms.sums["text"] / terms.counts["text"])
        assert loss == pytest.approx(float(expected[f"{name}_loss"]), rel=1e-5), name


# What to check per family: the `_class_name` or `model_type` of a config.
CHECKS: dict[str, Callable[[Path], None]] = {
    "MAGVITv2": check_magvit2,
    "llada": check_llada,
    "mmada": check_mmada,
    "Dream": check_dream,
    "llava_llada": check_llada_v,
    "sdar": check_sdar,
    "BD3LM-DIT": check_bd3lm,
    "Fast_dLLM_Qwen": check_fast_dllm,
}


def folders() -> list:
    """One parameter per vector; a single skipped one where there are none."""
    found = sorted(path.parent for folder in VECTORS for path in folder.glob("*/config.json"))
    if not found:
        listed = " and ".join(map(str, VECTORS))
        reason = f"no vectors in {listed}; set MMDLM_VECTORS to their folder"
        return [pytest.param(None, id="none", marks=pytest.mark.skip(reason=reason))]
    return [pytest.param(path, id=path.name) for path in found]


def family_in(folder: Path) -> str:
    """The name that `CHECKS` has for a vector; skips those of families that are not here yet."""
    config = json.loads((folder / "config.json").read_text())
    family = config.get("_class_name") or config.get("model_type")
    if family not in CHECKS or "LLaDAMoEModelLM" in config.get("architectures", ()):
        pytest.skip(f"family {family!r} is not implemented yet")
    return str(family)


@pytest.mark.parametrize("folder", folders())
def test_matches_the_original_implementation(folder: Path) -> None:
    CHECKS[family_in(folder)](folder)


@pytest.mark.parametrize("folder", folders())
def test_comes_back_bit_for_bit(folder: Path, tmp_path: Path) -> None:
    if "model_type" not in json.loads((folder / "config.json").read_text()):
        pytest.skip("an image tokenizer is stored here as it is published")
    family_in(folder)
    check_there_and_back(folder, tmp_path)
