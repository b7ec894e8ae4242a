"""The Transformer against a plain float64 one; what padding, packing and saving may not change."""

from __future__ import annotations

import math
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM

from mmdlm.core.diffusion.forward import Absorbing
from mmdlm.core.diffusion.schedule import Linear
from mmdlm.core.likelihood.token_scores import token_scores
from mmdlm.core.losses import fused_cross_entropy as cross_entropy
from mmdlm.core.losses.objective import ModalityLoss, Objective
from mmdlm.core.sequence import Sequence, collate, feature_segment, pack, text_segment
from mmdlm.core.vocabulary import Modality, Vocabulary
from mmdlm.models.configuration import MmdlmConfig
from mmdlm.models.layers import RotaryEmbedding, rotate
from mmdlm.models.modeling import MmdlmForMaskedDiffusion
from tests.models.tiny import (
    TOLERANCE,
    VOCABULARY,
    document,
    random_ids,
    tiny_config,
    tiny_model,
)

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"num_key_value_heads": None},
    "grouped": {},
    "one key-value head": {"num_key_value_heads": 1},
    "bias": {"attention_bias": True},
    "qk norm": {"qk_norm": True},
    "tied head": {"tie_word_embeddings": True},
    "head_dim": {"head_dim": 12},
    "all": {"attention_bias": True, "qk_norm": True, "tie_word_embeddings": True, "head_dim": 6},
}
variants = pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS.keys())


# ---- the arithmetic -----------------------------------------------------------------------------


def plain_logits(model: MmdlmForMaskedDiffusion, ids: list[int]) -> Tensor:
    """One document through the whole network, head by head, in float64 -> [L, V]."""
    config, weights = model.config, {k: v.double() for k, v in model.state_dict().items()}
    heads, kv_heads, d = config.num_attention_heads, config.num_key_value_heads, config.head_dim

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + config.rms_norm_eps).sqrt() * weights[name]

    def linear(x: Tensor, name: str) -> Tensor:
        y = x @ weights[f"{name}.weight"].T
        return y + weights[f"{name}.bias"] if f"{name}.bias" in weights else y

    def turned(x: Tensor, position: int) -> Tensor:
        out = torch.empty_like(x)
        for i in range(d // 2):
            angle = position * config.rope_theta ** (-2 * i / d)
            a, b = x[i], x[i + d // 2]
            out[i] = a * math.cos(angle) - b * math.sin(angle)
            out[i + d // 2] = b * math.cos(angle) + a * math.sin(angle)
        return out

    x = weights["model.embed_tokens.weight"][ids]
    for n in range(config.num_hidden_layers):
        layer = f"model.layers.{n}"
        normed = norm(x, f"{layer}.input_layernorm.weight")
        mixed = []
        for h in range(heads):
            g = h // (heads // kv_heads)  # neighboring query heads share a key-value head
            query = linear(normed, f"{layer}.self_attn.q_proj")[:, h * d : (h + 1) * d]
            key = linear(normed, f"{layer}.self_attn.k_proj")[:, g * d : (g + 1) * d]
            value = linear(normed, f"{layer}.self_attn.v_proj")[:, g * d : (g + 1) * d]
            if config.qk_norm:
                query = norm(query, f"{layer}.self_attn.q_norm.weight")
                key = norm(key, f"{layer}.self_attn.k_norm.weight")
            query, key = (
                torch.stack([turned(row, position) for position, row in enumerate(rows)])
                for rows in (query, key)
            )
            mixed.append((query @ key.T / math.sqrt(d)).softmax(-1) @ value)
        x = x + linear(torch.cat(mixed, -1), f"{layer}.self_attn.o_proj")
        normed = norm(x, f"{layer}.post_attention_layernorm.weight")
        gate = linear(normed, f"{layer}.mlp.gate_proj")
        inner = gate * torch.sigmoid(gate) * linear(normed, f"{layer}.mlp.up_proj")
        x = x + linear(inner, f"{layer}.mlp.down_proj")
    x = norm(x, "model.norm.weight")
    head = "model.embed_tokens" if config.tie_word_embeddings else "lm_head"
    return x @ weights[f"{head}.weight"].T


@variants
def test_agrees_with_a_plain_float64_network(options: dict[str, Any]) -> None:
    model, ids = tiny_model(**options), random_ids(1, 9)
    torch.testing.assert_close(
        model(ids).logits[0].double(), plain_logits(model, ids[0].tolist()), **TOLERANCE
    )


def test_rotation_is_float32_and_depends_on_distance_alone() -> None:
    config = tiny_config()
    rotary = RotaryEmbedding(config)
    position = torch.tensor([[3, 10, 1003, 1010]])
    cos, sin = rotary(position)
    assert cos.dtype == sin.dtype == torch.float32
    x = torch.randn(2, 1, 1, config.head_dim, generator=torch.Generator().manual_seed(0))
    query, key = (rotate(one.expand(1, 1, 4, -1), cos, sin)[0, 0] for one in x)
    torch.testing.assert_close(query[0] @ key[1], query[2] @ key[3], atol=1e-3, rtol=0)
    # in bfloat16 position 1003 would not even be a number
    half = rotate(x[:1].expand(1, 1, 4, -1).bfloat16(), cos, sin)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half[0, 0].float(), query, atol=3e-2, rtol=2e-2)
    with torch.autocast("cpu", torch.bfloat16):
        assert rotary(position)[0].dtype == torch.float32


# ---- padding and packing ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "attention, options",
    [*(("sdpa", options) for options in VARIANTS.values()), ("flex_attention", VARIANTS["all"])],
    ids=[*(f"sdpa, {name}" for name in VARIANTS), "flex_attention, all"],
)
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()  # FlexAttention has no backward pass on a CPU
def test_padded_rows_give_the_logits_they_have_alone(
    side: str, attention: str, options: dict[str, Any]
) -> None:
    model = tiny_model(**options)
    model.config._attn_implementation = attention
    rows = [random_ids(1, length, seed=length)[0] for length in (5, 9, 1)]
    ids = torch.full((3, 11), VOCABULARY.pad_id)
    mask = torch.zeros(3, 11, dtype=torch.int64)
    places = []
    for b, row in enumerate(rows):
        start = 11 - len(row) if side == "left" else 0
        places.append(slice(start, start + len(row)))
        ids[b, places[b]], mask[b, places[b]] = row, 1
    together = model(input_ids=ids, attention_mask=mask).logits
    assert together.isfinite().all()
    for b, row in enumerate(rows):
        torch.testing.assert_close(together[b, places[b]], model(row[None]).logits[0], **TOLERANCE)
    torch.testing.assert_close(model(ids, mask.bool()).logits, together, rtol=0, atol=0)


@pytest.mark.parametrize("attention", ["sdpa", "flex_attention"])
@torch.no_grad()
def test_packed_documents_give_the_logits_they_have_alone(attention: str) -> None:
    model = tiny_model(qk_norm=True)
    model.config._attn_implementation = attention
    documents = [document(3, 4, seed=1), document(6, 2, seed=2), document(1, 5, seed=3)]
    packed = pack([*documents, document(4, 20, seed=4)], VOCABULARY, length=30)
    assert len(packed) == 2
    assert packed.document.max() == 2  # three in one row
    assert packed.is_padding.any()
    everywhere = torch.ones_like(packed.target)
    found = model.logits_at(model.hidden(packed.ids, packed), everywhere)
    found = found.unflatten(0, packed.ids.shape)
    checked = 0
    for b, row in enumerate(packed.document):
        for number in range(int(row.max()) + 1):
            alone = packed.ids[b, row == number][None]
            torch.testing.assert_close(found[b, row == number], model(alone).logits[0], **TOLERANCE)
            checked += 1
    assert checked == 4


def test_a_token_of_another_document_changes_nothing() -> None:
    model = tiny_model()
    batch = pack([document(3, 4, seed=1), document(6, 2, seed=2)], VOCABULARY, length=24)
    before = model.hidden(batch.ids, batch)
    other = batch.document == 1
    after = model.hidden(batch.ids.masked_fill(other, VOCABULARY.mask_id), batch)
    assert torch.equal(before[batch.document == 0], after[batch.document == 0])
    assert not torch.equal(before[other], after[other])


def test_feature_slots_are_filled_row_by_row() -> None:
    model = tiny_model()
    features = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    rows = [
        Sequence((feature_segment(features[:2], VOCABULARY), text_segment([1, 2, 3]))),
        Sequence((text_segment([4]), feature_segment(features[2:], VOCABULARY))),
    ]
    together = collate(rows, VOCABULARY)
    hidden = model.hidden(together.ids, together)
    for b, row in enumerate(rows):
        alone = collate([row], VOCABULARY)
        expected = model.hidden(alone.ids, alone)[0]
        torch.testing.assert_close(hidden[b, : len(row)], expected, **TOLERANCE)
    slots = together.of(Modality.FEATURE)
    reversed_features = collate(
        [Sequence((feature_segment(features[:2].flip(0), VOCABULARY), text_segment([1, 2, 3])))],
        VOCABULARY,
    )
    swapped = model.hidden(reversed_features.ids, reversed_features)
    assert slots[0, :2].all()
    assert not torch.allclose(swapped[0, 0], hidden[0, 0])


# ---- the two steps of a denoiser ----------------------------------------------------------------


@variants
def test_logits_at_are_the_logits_of_forward_where_they_are_asked_for(
    options: dict[str, Any],
) -> None:
    model = tiny_model(**options)
    batch = collate([document(3, 4, seed=1), document(6, 2, seed=2)], VOCABULARY)
    whole = model(batch.ids, ~batch.is_padding).logits
    hidden = model.hidden(batch.ids, batch)
    for positions in (batch.target, batch.of(Modality.TEXT), torch.zeros_like(batch.target)):
        found = model.logits_at(hidden, positions)
        torch.testing.assert_close(found, whole[positions], **TOLERANCE)
        for start, stop in (VOCABULARY.text, VOCABULARY.image, (7, 7)):
            found = model.logits_at(hidden, positions, ids=(start, stop))
            torch.testing.assert_close(found, whole[positions][:, start:stop], **TOLERANCE)


def test_forward_returns_what_transformers_expect() -> None:
    model, ids = tiny_model(), random_ids(2, 5)
    assert model(ids).logits.shape == (2, 5, VOCABULARY.size)
    assert torch.equal(model(ids, return_dict=False)[0], model(ids).logits)
    shifted = torch.arange(100, 105).expand(2, 5)
    torch.testing.assert_close(
        model(ids, position_ids=shifted).logits, model(ids).logits, atol=1e-3, rtol=1e-3
    )
    assert model.get_input_embeddings() is model.model.embed_tokens
    assert model.get_output_embeddings() is model.lm_head


# ---- training -----------------------------------------------------------------------------------


def loss_of(model: MmdlmForMaskedDiffusion) -> Tensor:
    batch = collate([document(3, 4, seed=1), document(6, 2, seed=2)], VOCABULARY)
    objective = Objective(process=Absorbing(Linear()))
    terms = objective(model, batch, generator=torch.Generator().manual_seed(5))
    return sum(terms.sums.values())


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("loss_normalization", ["token", "sequence", "masked_token", "batch"])
@pytest.mark.parametrize("full_vocabulary", [False, True])
def test_the_loss_is_that_of_all_logits(
    loss_normalization: Any, full_vocabulary: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In chunks of some rows, gradients included, for texts and images of unequal lengths."""
    monkeypatch.setattr(cross_entropy, "_rows", lambda *_: 4)
    model = tiny_model().double()
    batch = pack([document(3, 4, seed=0), document(9, 6, seed=1)], VOCABULARY, length=28)
    part = ModalityLoss(loss_normalization=loss_normalization)
    objective = Objective(
        Absorbing(Linear()), text=part, image=part, full_vocabulary=full_vocabulary
    )
    generator = torch.Generator().manual_seed(0)
    corruption = objective.corrupt(batch, VOCABULARY, generator=generator)
    terms = objective.terms(model, batch, corruption)
    sum(terms.sums.values(), torch.zeros(())).backward()
    found = gradients(model)
    model.zero_grad()

    logits = model.logits_at(model.hidden(corruption.x_t, batch), batch.target)
    documents = batch.document[batch.target]
    expected = {}
    for name, modality in (("text", Modality.TEXT), ("image", Modality.IMAGE)):
        of_kind = batch.of(modality)[batch.target]
        start, stop = (0, VOCABULARY.size) if full_vocabulary else VOCABULARY.range(modality)
        total = torch.zeros(())
        for n in (of_kind & corruption.is_noised[batch.target]).nonzero().flatten().tolist():
            own = logits[n, start:stop].log_softmax(-1)[int(batch.ids[batch.target][n]) - start]
            loss = -own * corruption.weight[batch.target][n]
            answer = int((of_kind & (documents == documents[n])).sum())
            total = total + (loss / answer if loss_normalization == "sequence" else loss)
        expected[name] = total
        assert terms.sums[name].item() == pytest.approx(total.item(), rel=1e-5)
    sum(expected.values(), torch.zeros(())).backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-4, msg=name)


class Largest(TorchDispatchMode):
    """The most elements that a tensor has had."""

    elements = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, given: Any = (), named: Any = None
    ) -> Any:
        result = function(*given, **(named or {}))
        for one in tree_leaves(result):
            if isinstance(one, Tensor):
                self.elements = max(self.elements, one.numel())
        return result


def test_all_logits_never_exist_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither forward nor backward; the largest are an activation and the head's gradient."""
    monkeypatch.setattr(cross_entropy, "_rows", lambda *_: 4)
    words = Vocabulary.build(text_size=500, eos_id=0)
    model = tiny_model(vocabulary=words.to_dict())
    text = torch.randint(500, (60,), generator=torch.Generator().manual_seed(0))
    batch = collate([Sequence((text_segment(text, target=True),))] * 8, words)
    objective = Objective(Absorbing(Linear()))
    corruption = objective.corrupt(batch, words, generator=torch.Generator().manual_seed(0))
    masked = int(corruption.is_noised.sum())
    with Largest() as largest:
        objective.terms(model, batch, corruption).sums["text"].backward()
    assert model.lm_head.weight.numel() <= largest.elements < masked * 500 / 4
    with Largest() as largest:
        log_prob, _ = token_scores(
            model, corruption.x_t, batch, where=corruption.is_noised, entropy=True
        )
        log_prob.exp().sum().backward()
    assert model.lm_head.weight.numel() <= largest.elements < masked * 500 / 4
    with Largest() as largest:
        model(corruption.x_t)
    assert largest.elements >= masked * 500  # the plain way is seen


def test_what_a_batch_has_none_of_makes_no_gradient_of_the_head(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """But that there is one at all, where it has neither words nor codes."""
    calls, model = [], tiny_model()
    module = sys.modules[token_scores.__module__]
    log_prob = module.linear_log_prob  # type: ignore[attr-defined]
    monkeypatch.setattr(
        module, "linear_log_prob", lambda *a, **k: calls.append(1) or log_prob(*a, **k)
    )
    batch = collate([document(5, 0, seed=0)], VOCABULARY)
    for where, expected in ((batch.target, 1), (torch.zeros_like(batch.target), 2)):
        calls.clear()
        token_scores(model, batch.ids, batch, where=where)[0].sum().backward()
        assert len(calls) == expected
        assert model.lm_head.weight.grad is not None


def test_a_step_gives_every_parameter_a_gradient() -> None:
    model = tiny_model(attention_bias=True, qk_norm=True).train()
    loss_of(model).backward()
    assert gradients(model).keys() == dict(model.named_parameters()).keys()
    for name, gradient in gradients(model).items():
        assert gradient.abs().max() > 0, name


def test_gradient_checkpointing_gives_equal_gradients() -> None:
    plain, thrifty = tiny_model().train(), tiny_model().train()
    thrifty.gradient_checkpointing_enable()
    calls = []
    layer = thrifty.model.layers[0].self_attn
    layer.register_forward_hook(lambda *_: calls.append(1))
    for model in (plain, thrifty):
        loss_of(model).backward()
    assert len(calls) == 2  # once more in the backward pass
    torch.testing.assert_close(gradients(thrifty), gradients(plain), rtol=0, atol=0)


@variants
def test_bfloat16_autocast(options: dict[str, Any]) -> None:
    model = tiny_model(**options).train()
    exact = loss_of(model)
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(model)
    torch.testing.assert_close(loss, exact, rtol=3e-2, atol=0)
    assert loss.dtype == torch.float32
    loss.backward()
    assert {gradient.dtype for gradient in gradients(model).values()} == {torch.float32}


@pytest.mark.slow
@torch.no_grad()
def test_flex_attention_under_autocast() -> None:
    """Autocast does not reach into it: query, key and value must have one dtype by themselves."""
    model = tiny_model(qk_norm=True, attention_bias=True)
    exact = loss_of(model)
    model.config._attn_implementation = "flex_attention"
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(loss_of(model), exact, rtol=3e-2, atol=0)


def test_a_model_in_bfloat16_runs() -> None:
    model = tiny_model(qk_norm=True)
    exact = model(random_ids(2, 6)).logits
    found = model.to(torch.bfloat16)(random_ids(2, 6)).logits
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), exact, rtol=0.1, atol=0.1)


def test_residual_branches_start_small() -> None:
    config = tiny_config(num_hidden_layers=8, hidden_size=64, intermediate_size=128)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MmdlmForMaskedDiffusion(config)
    layer = model.model.layers[3]
    std, small = config.initializer_range, config.initializer_range / math.sqrt(16)
    for linear in (layer.self_attn.q_proj, layer.mlp.gate_proj, layer.mlp.up_proj, model.lm_head):
        assert float(linear.weight.detach().std()) == pytest.approx(std, rel=0.1)
    for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
        assert float(linear.weight.detach().std()) == pytest.approx(small, rel=0.1)
    assert torch.equal(layer.input_layernorm.weight, torch.ones(64))


def test_lora_wraps_and_trains() -> None:
    peft = pytest.importorskip("peft")
    base, ids = tiny_model(), random_ids(2, 7)
    before = base(ids).logits
    frozen = {name: p.clone() for name, p in base.named_parameters()}
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    torch.testing.assert_close(model(input_ids=ids).logits, before, rtol=0, atol=0)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 2 * 2 * 2  # layers x projections x (A, B)
    optimizer = torch.optim.SGD(trained, lr=0.1)
    losses = []
    for _ in range(4):
        loss = loss_of(model)  # a PeftModel passes `hidden` and `logits_at` on
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    merged = model.merge_and_unload()
    for name, parameter in merged.named_parameters():
        touched = "q_proj" in name or "v_proj" in name
        assert torch.equal(parameter, frozen[name]) != touched, name


# ---- saving and loading -------------------------------------------------------------------------


@variants
@pytest.mark.parametrize("auto", [AutoModel, AutoModelForMaskedLM, MmdlmForMaskedDiffusion])
def test_save_and_load(auto: Any, options: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_model(**options, text_slots=6, full_vocabulary=True)
    model.save_pretrained(tmp_path)
    loaded = auto.from_pretrained(tmp_path)
    assert isinstance(loaded, MmdlmForMaskedDiffusion)
    assert loaded.vocabulary == VOCABULARY
    assert not loaded.training
    assert (loaded.config.text_slots, loaded.config.full_vocabulary) == (6, True)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    ids = random_ids(2, 7)
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_a_saved_config_names_no_code(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(config, MmdlmConfig)
    assert not hasattr(config, "auto_map")
    assert config.vocab_size == VOCABULARY.size
    names = ["config.json", "digests.json", "model.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names


def test_a_tied_head_is_stored_once_and_stays_tied(tmp_path: Path) -> None:
    tiny_model(tie_word_embeddings=True).save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert len([t for t in stored.values() if t.shape == (VOCABULARY.size, 32)]) == 1
    loaded = AutoModel.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_loads_in_the_dtype_that_is_asked_for(dtype: torch.dtype, tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    model = AutoModel.from_pretrained(tmp_path, dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}], ids=str)
@pytest.mark.parametrize("tied", [False, True])
def test_device_map(device_map: Any, tied: bool, tmp_path: Path) -> None:
    model, ids = tiny_model(tie_word_embeddings=tied), random_ids(2, 7)
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path, device_map=device_map)
    if torch.cuda.is_available() and device_map == "auto":
        loaded.to("cpu")
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, **TOLERANCE)


def test_layers_that_stay_on_disk(tmp_path: Path) -> None:
    """Each is loaded as it is reached, with the hooks that also spread a model over GPUs."""
    model, ids = tiny_model(), random_ids(2, 7)
    mask = torch.ones_like(ids).index_fill(1, torch.tensor([5, 6]), 0)
    model.save_pretrained(tmp_path)
    places = dict.fromkeys(["model.embed_tokens", "model.layers.0", "model.norm", "lm_head"], "cpu")
    loaded = AutoModel.from_pretrained(
        tmp_path, device_map={**places, "model.layers.1": "disk"}, offload_folder=tmp_path / "off"
    )
    assert loaded.model.layers[1].mlp.up_proj.weight.is_meta
    torch.testing.assert_close(loaded(ids, mask).logits, model(ids, mask).logits, **TOLERANCE)


@pytest.fixture
def damaged(tmp_path: Path) -> Any:
    """A function that changes the tensors of a saved model and gives its folder."""
    tiny_model(qk_norm=True).save_pretrained(tmp_path / "whole")

    def damage(change: Any) -> Path:
        folder = tmp_path / "damaged"
        shutil.copytree(tmp_path / "whole", folder)
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return damage


@pytest.mark.parametrize("auto", [AutoModel, AutoModelForMaskedLM])
@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.up_proj.weight", "lm_head.weight", "model.norm.weight"]
)
def test_a_missing_tensor_is_named(auto: Any, name: str, damaged: Any) -> None:
    folder = damaged(lambda tensors: tensors.pop(name))
    with pytest.raises(ValueError, match=f"missing.*{name}") as error:
        auto.from_pretrained(folder)
    assert str(folder) in str(error.value)


def test_an_unexpected_tensor_is_named(damaged: Any) -> None:
    folder = damaged(lambda tensors: tensors.update({"model.extra.weight": torch.zeros(3)}))
    with pytest.raises(ValueError, match=r"unexpected.*model\.extra\.weight"):
        AutoModel.from_pretrained(folder)


@pytest.mark.parametrize("shape", [(48, 31), (32, 48), (48 * 32,)])
def test_a_misshapen_tensor_is_named(shape: tuple[int, ...], damaged: Any) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    folder = damaged(lambda tensors: tensors.update({name: torch.zeros(shape)}))
    with pytest.raises(ValueError, match=f"mismatched.*{name}"):
        AutoModel.from_pretrained(folder)


def test_sizes_that_do_not_fit_each_other() -> None:
    with pytest.raises(ValueError, match=r"num_attention_heads 4 is not a multiple of .* 3"):
        tiny_model(num_key_value_heads=3)
    with pytest.raises(ValueError, match="head_dim 7 is odd"):
        tiny_model(head_dim=7)
    with pytest.raises(ValueError, match="vocabulary is empty"):
        MmdlmForMaskedDiffusion(MmdlmConfig())
