"""Fine-tuning: what it learns is what it answers, killed it continues, published losses hold."""

from __future__ import annotations

import copy
import io
import json
import signal
import socket
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import mmdlm
from data_pipelines.shards.shards import Sample, write_shard
from data_pipelines.sources.conversations import Conversation, apply_chat_template
from data_pipelines.sources.end_of_text import FilledTail, NoTail
from data_pipelines.sources.source import Source
from data_pipelines.sources.vision_samples import attach_vision
from mmdlm.core.diffusion.forward import Absorbing
from mmdlm.core.diffusion.schedule import Linear
from mmdlm.core.kernels import linear
from mmdlm.core.losses.objective import ModalityLoss, Objective
from mmdlm.core.losses.token_losses import CrossEntropy, WeightedCrossEntropy
from mmdlm.core.sequence import Batch, collate
from mmdlm.core.vocabulary import Vocabulary
from mmdlm.models.configuration import MmdlmConfig
from mmdlm.models.modeling import MmdlmForMaskedDiffusion
from mmdlm.templates.auto import LAYOUTS
from mmdlm.vision.encoders.adapter import VisionConfig
from tests.core.fakes import VOCABULARY, TinyDenoiser, ragged, rng
from tests.data_pipelines.tiny_vision import SQUARE, TILES, TOWER, plain
from tests.models.tiny import tiny_model
from tests.templates.tiny import words_of
from tests.train.tiny import Run, be_one_of_two, logged, sft, shard_weights, trajectory
from train.stages.denoising import Coefficients, DenoisingStage
from train.stages.examples import described
from train.stages.low_rank import LowRank
from train.stages.meter import MEASURED
from train.stages.start import PRODUCTS, add_vision_adapter, recompute_layers

TALKS = [("hi", "yes"), ("no?", "so."), ("2+2", "4.0"), ("name", "Bob")]


def talk(number: int) -> Sample:
    """Two questions; the second one is asked again in each conversation."""
    first, second = TALKS[number % 4], TALKS[(number + 1 + number // 4) % 4]
    turns = [
        {"role": role, "content": text}
        for pair in (first, second)
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
    return {"__key__": f"{number:03d}", "json": json.dumps({"messages": turns}).encode()}


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of LLaDA's family with random weights."""
    folder = tmp_path_factory.mktemp("start")
    words = words_of("llada")
    config = MmdlmConfig(
        vocabulary=words.vocabulary.to_dict(),
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        published={"family": "llada", "config": _published(words.vocabulary)},
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        MmdlmForMaskedDiffusion(config).save_pretrained(folder)
    words.tokenizer.save_pretrained(folder)
    return folder


def _published(vocabulary: Vocabulary) -> dict[str, Any]:
    """What LLaDA's own config.json says of a vocabulary."""
    return {
        "model_type": "llada",
        "d_model": 48,
        "vocab_size": vocabulary.size,
        "embedding_size": vocabulary.size,
        "mask_token_id": vocabulary.mask_id,
        "eos_token_id": vocabulary.eos_id,
        "pad_token_id": vocabulary.pad_id,
    }


@pytest.fixture
def recipe(tmp_path: Path, start: Path) -> Path:
    write_shard(tmp_path / "talks" / "0.tar", map(talk, range(8)))
    config: dict[str, Any] = {
        "model": {
            "start_from": str(start),
            "lora": {"rank": 4, "alpha": 8, "dropout": 0.2, "targets": ["q_proj", "down_proj"]},
        },
        "data": {
            "sources": [
                {
                    "urls": str(tmp_path / "talks"),
                    "to_sequence": {
                        "class_path": "data_pipelines.sources.conversations.Conversation",
                        "init_args": {
                            "answers": "one",
                            "tail": "data_pipelines.sources.end_of_text.RandomTail",
                        },
                    },
                }
            ],
            "batch_size": 2,
            "length": 140,
            "packed": True,
            "shuffle_buffer": 5,
        },
        "objective": {
            "process": {
                "class_path": "mmdlm.core.diffusion.forward.Absorbing",
                "init_args": {"schedule": "mmdlm.core.diffusion.schedule.Linear"},
            },
            "text": {"loss_normalization": "sequence"},
            "complementary": True,
        },
        "training": {
            "max_steps": 10,
            "gradient_accumulation_steps": 2,
            "ema": 0.9,
            "save_steps": 3,
            "logging_steps": 1,
        },
        "threads": 1,
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(config))
    return path


def changed(recipe: Path, name: str, **options: Any) -> Path:
    """The recipe with other values, by dotted names with __ for dots."""
    config = json.loads(recipe.read_text())
    for place, value in options.items():
        *outer, last = place.split("__")
        inner = config
        for part in outer:
            inner = inner[int(part) if part.isdigit() else part]
        inner[last] = value
    path = recipe.with_name(name)
    path.write_text(json.dumps(config))
    return path


def arguments(recipe: Path, out: Path, *more: str) -> list[str]:
    return ["--config", str(recipe), "--out", str(out), *more]


def train(recipe: Path, out: Path, *more: str) -> None:
    run = Run(sft, arguments(recipe, out, *more), folder=recipe.parent)
    assert run.exit_code() == 0, run.errors.read_text()[-3000:]


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


# ---- runs ---------------------------------------------------------------------------------------


LEFT_TO_RIGHT: Any = {"max_new_tokens": 8, "num_inference_steps": 8, "block_length": 1}


@pytest.mark.slow
def test_what_it_has_learned_it_answers(recipe: Path, tmp_path: Path) -> None:
    """All weights; asked through the library, by the template that it was trained with."""
    tail = {
        "class_path": "data_pipelines.sources.end_of_text.FilledTail",
        "init_args": {"longest": 4},
    }
    learn = changed(
        recipe,
        "learn.yaml",
        model__lora=None,
        objective__text={
            "loss": "mmdlm.core.losses.token_losses.CrossEntropy",
            "loss_normalization": "masked_token",
        },
        data__packed=False,
        data__batch_size=8,
        data__length=96,
        data__sources__0__to_sequence__init_args={"answers": "one", "tail": tail},
        training={
            "max_steps": 400,
            "ema": 0.0,
            "save_steps": 1000,
            "optimizer": {
                "class_path": "train.optimizer.AdamW",
                "init_args": {"learning_rate": 3e-3},
            },
            "schedule": {"class_path": "train.optimizer.Cosine", "init_args": {"warmup": 20}},
        },
    )
    train(learn, tmp_path / "out")
    model = mmdlm.load(tmp_path / "out" / "final")
    for question, answer in TALKS:
        assert model.answer(question, **LEFT_TO_RIGHT) == answer
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "no?"},
    ]
    assert model.chat(messages, **LEFT_TO_RIGHT) == "so."
    shown = (tmp_path / "out" / "examples.txt").read_text()
    assert "\N{MATHEMATICAL LEFT WHITE SQUARE BRACKET}yes<|eot_id|>" in shown


@pytest.mark.slow
def test_a_run_that_is_killed_continues_exactly(recipe: Path, tmp_path: Path, start: Path) -> None:
    """With dropout, a random turn of each conversation, and random tails."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    reference = Run(sft, arguments(recipe, whole), folder=tmp_path)
    for before in ("step_00000006", "step_00000009"):
        run = Run(sft, arguments(recipe, killed), before, folder=tmp_path)
        assert run.exit_code() == -signal.SIGKILL
    assert not (killed / "step_00000009").exists()
    train(recipe, killed)
    assert reference.exit_code() == 0, reference.errors.read_text()[-3000:]
    assert len(logged(whole)) == 10
    assert trajectory(killed) == trajectory(whole)
    for name, tensor in weights(whole / "final").items():
        assert torch.equal(weights(killed / "final")[name], tensor), name

    # the adapter alone is what was added to the weights
    merged = mmdlm.load(start, adapter=whole / "adapter", merge_adapter=True).denoiser
    before = weights(start)
    for name, tensor in weights(whole / "final").items():
        torch.testing.assert_close(merged.state_dict()[name], tensor, atol=1e-6, rtol=1e-5)
        moved = not torch.equal(before[name], tensor)
        assert moved == name.endswith(("q_proj.weight", "down_proj.weight")), name

    # what is frozen is in no checkpoint, and known when it is another
    stored = weights(whole / "step_00000010")
    assert all(".lora_" in name for name in stored)
    other = tmp_path / "other"
    other.mkdir()
    for path in start.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    tensors = weights(other)
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    (other / "digests.json").unlink()  # of the weights as they were
    more = ["--model.start_from", str(other), "--training.max_steps", "11"]
    run = Run(sft, arguments(recipe, whole, *more), folder=tmp_path)
    assert run.exit_code() == 2
    assert "beside other frozen weights" in run.errors.read_text()


def one_of_two(arguments: list[str], rank: int, port: int, sharded: bool) -> None:
    be_one_of_two(rank, port)
    if sharded:
        shard_weights("TRANSFORMER_BASED_WRAP")
    linear._LEAST = 0  # as in models that are not tiny
    sft(arguments)


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch without gloo")
@pytest.mark.parametrize("sharded", [False, True])
def test_two_processes_equal_one_with_twice_the_accumulation(
    sharded: bool, recipe: Path, tmp_path: Path
) -> None:
    """As accelerate launches them: on the same conversations in their order, without noise.

    Each holds the weights, or, under FSDP2, a part of each layer's. Answers are of unequal lengths,
    so that a mean of the processes' means is another loss.
    """
    samples = [
        {
            "__key__": f"{n}",
            "json": json.dumps({"prompt": f"q{n}", "completion": "yes" * (1 + n % 5)}).encode(),
        }
        for n in range(8)
    ]
    write_shard(tmp_path / "talks" / "0.tar", samples)
    all_masked = {
        "class_path": "mmdlm.core.diffusion.schedule.Linear",
        "init_args": {"eps": 0.9999999},
    }
    tail = "data_pipelines.sources.end_of_text.NoTail"
    options: dict[str, Any] = {
        "model__lora": None,
        "data__batch_size": 1,
        "data__packed": False,
        "data__shuffle_buffer": 0,
        "data__sources__0__to_sequence__init_args": {"answers": "last", "tail": tail},
        "objective__process__init_args__schedule": all_masked,
        "objective__text": {
            "loss": "mmdlm.core.losses.token_losses.CrossEntropy",
            "loss_normalization": "masked_token",
        },
        "objective__complementary": False,
        "training__max_steps": 3,
        "training__ema": 0.0,
    }
    both = changed(recipe, "both.yaml", **options, training__gradient_accumulation_steps=1)
    one = changed(recipe, "one.yaml", **options, training__gradient_accumulation_steps=2)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    two = tmp_path / "two"
    runs = [
        Run(one_of_two, arguments(both, two), rank, port, sharded, folder=tmp_path)
        for rank in (0, 1)
    ]
    train(one, tmp_path / "alone")
    for run in runs:
        assert run.exit_code() == 0, run.errors.read_text()[-3000:]
    assert [entry["step"] for entry in logged(two)] == [1, 2, 3]
    assert set(MEASURED) <= set(logged(two)[-1])
    for alone, summed in zip(logged(tmp_path / "alone"), logged(two), strict=True):
        for name in set(alone) - set(MEASURED):
            assert summed[name] == pytest.approx(alone[name], rel=1e-4, abs=1e-6), name
    for name, tensor in weights(tmp_path / "alone" / "final").items():
        torch.testing.assert_close(weights(two / "final")[name], tensor, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("onednn", [False, True])
def test_selective_recomputation_computes_no_product_twice(
    onednn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Operations of forward and backward are those without it, all layers' once more with True."""
    monkeypatch.setattr(linear, "_LEAST", 0 if onednn else 1 << 60)
    model, batch = tiny_model(vocabulary=VOCABULARY.to_dict()).train(), ragged()
    at = batch.target
    found = {}
    for recompute in (False, "selective", True):
        twin = copy.deepcopy(model)
        recompute_layers(twin, recompute)
        with Products() as products:
            twin.hidden(batch.ids, batch, query_mask=at)[at].square().sum().backward()
        gradients = {name: p.grad for name, p in twin.named_parameters() if p.grad is not None}
        found[recompute] = products.count, gradients
    assert found["selective"][0] == found[False][0] < found[True][0]
    for recompute in ("selective", True):
        torch.testing.assert_close(found[recompute][1], found[False][1], rtol=0, atol=0)


class Products(TorchDispatchMode):
    """Counts matrix products, and attention."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().split("::")[-1].removesuffix(".default")
        self.count += name in PRODUCTS or name.startswith("_scaled_dot_product")
        return func(*args, **(kwargs or {}))


@pytest.mark.slow
def test_layers_that_are_recomputed_learn_the_same(recipe: Path, tmp_path: Path) -> None:
    """Their dropout too."""
    for name, option in (("kept", "false"), ("again", "true")):
        train(recipe, tmp_path / name, "--model.recompute", option, "--training.max_steps", "4")
    assert trajectory(tmp_path / "kept") == trajectory(tmp_path / "again")


@pytest.mark.slow
def test_a_language_model_is_given_eyes(recipe: Path, tmp_path: Path, start: Path) -> None:
    """As LLaVA begins: the projector alone learns, beside weights in half precision."""
    turns = [
        {"from": "human", "value": "<image>\nwhat?"},
        {"from": "gpt", "value": "red"},
    ]
    samples = [
        {
            "__key__": f"{n}",
            "png": plain(n * 40),
            "json": json.dumps({"conversations": turns}).encode(),
        }
        for n in range(4)
    ]
    write_shard(tmp_path / "seen" / "0.tar", samples)
    config = json.loads(recipe.read_text())
    del config["model"]["lora"]
    config["model"]["vision"] = {
        "tower": TOWER,
        "tiling": {
            "class_path": "mmdlm.vision.encoders.square.Square",
            "init_args": {"size": 8, "grid": 2},
        },
    }
    config["model"]["parts"] = {"frozen": ["vision_tower", "denoiser"]}
    config["data"]["sources"][0]["urls"] = str(tmp_path / "seen")
    config["data"]["length"] = 300
    config["model"]["dtype"] = "bfloat16"
    recipe.write_text(json.dumps(config))
    train(recipe, tmp_path / "out", "--training.max_steps", "3", "--training.ema", "0")
    assert "<image: 4 features>" in (tmp_path / "out" / "examples.txt").read_text()
    after, before = weights(tmp_path / "out" / "final"), weights(start)
    assert all(torch.equal(after[n], t.bfloat16().float()) for n, t in before.items())
    stored = weights(tmp_path / "out" / "step_00000003")
    assert stored
    assert all(".vision.projector." in name for name in stored)
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}
    assert mmdlm.load(tmp_path / "out" / "final").prompt_template.family == "llada_v"


def test_eyes_are_given_another_tiling() -> None:
    """Tower and projector stay; what begins a row of a mosaic is new."""
    square = VisionConfig(tower=TOWER, tiling=SQUARE)
    tiles = VisionConfig(tower=TOWER, tiling=TILES)
    model = small()
    add_vision_adapter(model, square, None, seed=0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    add_vision_adapter(model, tiles, None, seed=1)
    after = model.state_dict()
    assert set(after) - set(before) == {"vision.newline"}
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert model.config.vision == tiles.to_dict()
    for config, weights_of_it, named in (
        (replace(tiles, projector="linear"), None, "projector"),
        (square, Path("x"), "vision_tower_weights"),
        (tiles, None, "none"),
    ):
        with pytest.raises(ValueError, match=f"sees already.*here {named} would be another"):
            add_vision_adapter(model, config, weights_of_it, seed=0)


# ---- losses -------------------------------------------------------------------------------------


def talks(tail: Any) -> Batch:
    """Three conversations of unequal length, over a vocabulary of bytes."""
    words = words_of("llada")
    source = Source("x", Conversation(tail=tail))
    (spoken,) = attach_vision(
        apply_chat_template([source], LAYOUTS["llada"], words, length=60, packed=False), None
    )
    sequences = [
        spoken.to_sequence(
            {
                "__key__": "k",
                "json": json.dumps({"prompt": question, "completion": answer}).encode(),
            },
            words.vocabulary,
            tokenizer=words.tokenizer,
            generator=rng(),
        )
        for question, answer in TALKS[:3]
    ]
    return collate(sequences, words.vocabulary, length=60)


def loss_of(objective: Objective, batch: Batch) -> tuple[float, Tensor, Tensor, Tensor]:
    """The loss of a step; cross-entropy, masks and times of it, [B, L] or [2 B, L]."""
    denoiser = TinyDenoiser(words_of("llada").vocabulary)
    noise = objective.corrupt(batch, denoiser.vocabulary, generator=rng(3))
    terms = objective.terms(denoiser, batch, noise)
    loss = float(terms.sums["text"].detach() / terms.counts["text"])
    copies = len(noise.x_t) // len(batch)
    twice = batch.rows(torch.arange(len(batch)).repeat(copies))
    everywhere = torch.ones_like(twice.target)
    logits = denoiser.logits_at(denoiser.hidden(noise.x_t, twice), everywhere)
    ids = denoiser.vocabulary.text
    entropy = F.cross_entropy(
        logits[:, slice(*ids)], twice.ids.clamp_max(ids[1] - 1).flatten(), reduction="none"
    )
    return loss, entropy.view_as(twice.ids), noise.is_noised, noise.p_mask


PROCESS, SLOPE = Absorbing(schedule=Linear(eps=1e-3)), 1 - 1e-3


def test_the_loss_of_llada_divides_by_each_answer_with_its_padding() -> None:
    """Sum of CE / p over an answer, by its length, mean over documents. arXiv:2502.09992.

    Ours has the bound's p' / p for 1 / p, which is 0.999 of it where p never quite reaches 0.
    """
    batch = talks(FilledTail())
    objective = Objective(PROCESS, text=ModalityLoss(WeightedCrossEntropy(), "sequence"))
    loss, entropy, masked, p = loss_of(objective, batch)
    lengths = batch.target.sum(1)
    assert (lengths + (~batch.target).sum(1)).tolist() == [60] * 3  # the padding is learned
    assert len(set(lengths.tolist())) > 1
    rows = (torch.where(masked, SLOPE * entropy / p, 0.0)).sum(1) / lengths
    assert loss == pytest.approx(float(rows.mean().detach()), rel=1e-4)
    short = talks(NoTail())
    assert short.target.sum(1).tolist() == [len(answer) + 1 for _, answer in TALKS[:3]]


def test_the_loss_of_d1_divides_by_all_answers_of_the_batch() -> None:
    """Sum of CE / t over all positions that are no prompt. arXiv:2504.12216."""
    batch = talks(FilledTail())
    objective = Objective(PROCESS, text=ModalityLoss(WeightedCrossEntropy(), "token"))
    loss, entropy, masked, p = loss_of(objective, batch)
    expected = torch.where(masked, SLOPE * entropy / p, 0.0).sum() / batch.target.sum()
    assert loss == pytest.approx(float(expected.detach()), rel=1e-4)


def test_the_loss_of_lavida_is_a_mean_over_both_copies() -> None:
    """Each answer token is masked in one of them; nothing is divided by t. arXiv:2505.16839."""
    batch = talks(FilledTail())
    objective = Objective(
        PROCESS, text=ModalityLoss(CrossEntropy(), "masked_token"), complementary=True
    )
    loss, entropy, masked, _ = loss_of(objective, batch)
    first, second = masked.chunk(2)
    assert torch.equal(first ^ second, batch.target)
    assert loss == pytest.approx(float(entropy[masked].mean().detach()), rel=1e-4)


# ---- low rank -----------------------------------------------------------------------------------


def small() -> MmdlmForMaskedDiffusion:
    config = MmdlmConfig(
        vocabulary=words_of("llada").vocabulary.to_dict(),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    return MmdlmForMaskedDiffusion(config)


def test_matrices_change_nothing_at_first_and_are_merged_as_peft_does() -> None:
    model, batch = small().eval(), talks(NoTail())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    hidden = model.hidden(batch.ids, batch)
    state = torch.get_rng_state()
    adapted = LowRank(rank=2, alpha=6.0, targets=("v_proj", "up_proj")).onto(model, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(model.hidden(batch.ids, batch), hidden)
    learning = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(learning) == 4
    assert all(".lora_" in name for name in learning)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.normal_(generator=rng(2))
    trained = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    changed_hidden = model.hidden(batch.ids, batch)
    merged = adapted.merged(trained)
    assert set(merged) == set(before)
    adapted.remove()
    torch.testing.assert_close(model.hidden(batch.ids, batch), hidden)
    model.load_state_dict(merged)
    # The sums are taken in another order, of large numbers; a wrong merge is off by about one.
    found = model.hidden(batch.ids, batch)
    torch.testing.assert_close(found, changed_hidden, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "options, says",
    [
        ({"rank": 0}, "rank is 0"),
        ({"alpha": 0.0}, "alpha is 0.0"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"targets": ()}, "targets is empty"),
    ],
)
def test_low_rank_without_meaning(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        LowRank(**options)


def test_dropout_follows_from_the_generator() -> None:
    model = small().train()
    LowRank(dropout=0.5, targets=("q_proj",)).onto(model, seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.normal_(generator=rng(2))
    stage = DenoisingStage(model, Objective(PROCESS), Coefficients())
    batch = talks(NoTail())
    noises = [stage.draw(batch, generator=rng(seed)) for seed in (1, 1, 2)]

    def loss(noise: Any) -> float:
        return float(stage(batch, noise)["text"].detach())

    assert loss(noises[0]) == loss(noises[1]) == loss(noises[0])
    other = type(noises[0])(noises[0].corruption, None, noises[2].seed)
    assert loss(other) != loss(noises[0])


# ---- what is shown ------------------------------------------------------------------------------


def test_documents_are_shown_with_what_is_learned() -> None:
    words = words_of("llada")
    source = Source("x", Conversation(tail=FilledTail()))
    (spoken,) = attach_vision(
        apply_chat_template([source], LAYOUTS["llada"], words, length=40, packed=False), None
    )
    sample: Sample = {"json": json.dumps({"prompt": "hi", "completion": "yes"}).encode()}
    options: Any = {"tokenizer": words.tokenizer, "generator": rng()}
    sequence = spoken.to_sequence(sample, words.vocabulary, **options)
    header = "<|start_header_id|>{}<|end_header_id|>\n\n"
    assert described(sequence, words, opened="[", closed="]") == (
        f"<|startoftext|>{header.format('user')}hi<|eot_id|>{header.format('assistant')}"
        "[yes<|eot_id|><|endoftext|> x 11 ]"
    )


def test_a_person_sees_colors(recipe: Path, tmp_path: Path) -> None:
    from train.stages.examples import show_examples

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    words, terminal = words_of("llada"), Terminal()
    source = Source(str(tmp_path / "talks"), Conversation())
    sources = attach_vision(
        apply_chat_template([source], LAYOUTS["llada"], words, length=140, packed=False), None
    )
    options: Any = {"length": 140, "count": 1, "max_broken": 0.0, "folder": tmp_path}
    show_examples(sources, words, terminal=terminal, **options)
    assert "\x1b[1;32myes<|eot_id|>\x1b[0m" in terminal.getvalue()
    assert "\x1b" not in (tmp_path / "examples.txt").read_text()


# ---- bad input ----------------------------------------------------------------------------------


def fails(recipe: Path, capsys: pytest.CaptureFixture[str], *more: str) -> str:
    """Status 2 and one sentence, in this process."""
    argv, threads = sys.argv, torch.get_num_threads()
    try:
        with pytest.raises(SystemExit) as status:
            sft(arguments(recipe, recipe.parent / "out", *more))
    finally:
        sys.argv = argv
        torch.set_num_threads(threads)
    assert status.value.code == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "Traceback" not in said
    assert not (recipe.parent / "out" / "log.jsonl").exists()
    return said


@pytest.mark.parametrize(
    "options, says",
    [
        ({"model__start_from": "nowhere"}, "no model 'nowhere'"),
        ({"model__lora__targets": ["w1"]}, "the model has no 'w1' among its layers"),
        ({"model__lora__rank": 0}, "rank is 0"),
        ({"model__lora__ranks": 1}, "ranks"),
        ({"model__parts": {"frozen": ["denoiser"]}}, "denoiser"),
        ({"model__vision_tower_weights": "x"}, "there is no model.vision that they are for"),
        (
            {"model__shape": {}},
            "a model to start from, or model.shape, the shape of a new one; both",
        ),
        ({"start_from": "nowhere"}, "did you mean model.start_from?"),
        (
            {"data__sources__0__to_sequence__init_args__tail": "FilledTail"},
            "leaves nothing to pack",
        ),
        ({"data__length": 20, "data__max_broken": 0.0}, "do not fit in a row of 20"),
    ],
)
def test_a_bad_recipe(
    options: dict[str, Any], says: str, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert says in fails(changed(recipe, "bad.yaml", **options), capsys)


def test_conversations_that_start_with_the_assistant_stop_the_run(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two in a hundred are more than may be skipped; they are named with their reason."""
    turned = [{"role": "assistant", "content": "x"}, {"role": "user", "content": "y"}]
    broken = {"json": json.dumps({"messages": turned}).encode()}
    samples = [{"__key__": f"b{n}", **broken} for n in range(2)]
    write_shard(recipe.parent / "talks" / "0.tar", [*samples, *map(talk, range(8))])
    said = fails(recipe, capsys)
    assert "2 of 2 samples are broken" in said
    assert "sample b0: the conversation starts with the assistant" in said


def test_conversations_that_start_with_the_assistant_are_skipped_where_they_may_be(
    recipe: Path, tmp_path: Path
) -> None:
    """The twin: named once each where the run is watched, and counted in its checkpoints."""
    turned = [{"role": "assistant", "content": "x"}, {"role": "user", "content": "y"}]
    broken = {"json": json.dumps({"messages": turned}).encode()}
    samples = [{"__key__": f"b{n}", **broken} for n in range(2)]
    write_shard(tmp_path / "talks" / "0.tar", [*samples, *map(talk, range(8))])
    lenient = changed(recipe, "lenient.yaml", data__max_broken=0.5, training__max_steps=6)
    run = Run(sft, arguments(lenient, tmp_path / "out", "--examples", "0"), folder=tmp_path)
    assert run.exit_code() == 0, run.errors.read_text()[-3000:]
    assert [entry["step"] for entry in logged(tmp_path / "out")] == [1, 2, 3, 4, 5, 6]
    warned = [line for line in run.errors.read_text().splitlines() if "skipped" in line]
    for number in range(2):
        reason = f"sample b{number}: the conversation starts with the assistant"
        assert sum(reason in line for line in warned) == 1
    state = torch.load(tmp_path / "out" / "step_00000006" / "loader_0.pt")
    (worker,) = state["workers"]
    (source,) = worker["sources"]
    tally = source["stats"]
    assert tally["broken"] >= 2
    assert tally["good"] + tally["broken"] == source["taken"]
    assert {one["key"] for one in tally["listed"]} == {"b0", "b1"}
