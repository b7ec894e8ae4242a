"""An adapter beside a base in fewer bits: what learns, what is kept, and what is refused."""

from __future__ import annotations

import json
import shutil
import signal
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

import mmdlm
from mmdlm.cli import main as cli
from mmdlm.core.kernels.linear import Linear
from mmdlm.models.attention import AttentionPattern
from mmdlm.models.auto import load_denoiser
from mmdlm.models.configuration import read_config
from mmdlm.models.lora import TEMPLATE
from mmdlm.models.modeling import MmdlmForMaskedDiffusion
from mmdlm.models.quantization import quantization_config
from tests.data_pipelines.tiny_vision import TOWER
from tests.models import foreign
from tests.train.test_chat import recipe as talks
from tests.train.test_chat import said, tokenizer
from tests.train.test_sft import arguments, changed, fails, recipe, start, weights  # noqa: F401
from tests.train.tiny import Run, logged, sft, trajectory
from train.checkpoints.frozen_params import Frozen
from train.stages.low_rank import LowRank

SQUARE = {"class_path": "mmdlm.vision.encoders.square.Square", "init_args": {"size": 8, "grid": 2}}
KINDS = [("int8", "torchao"), ("4bit", "bitsandbytes"), ("8bit", "bitsandbytes")]


def in_process(recipe: Path, out: Path, *more: str) -> None:  # noqa: F811
    """Train here; other processes would import torchao again."""
    argv, threads = sys.argv, torch.get_num_threads()
    try:
        sft(arguments(recipe, out, *more))
    finally:
        sys.argv = argv
        torch.set_num_threads(threads)


def needs(*packages: str) -> None:
    for package in packages:
        if find_spec(package) is None:
            pytest.skip(f"{package} is not installed")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, start: Path) -> Path:  # noqa: F811
    """That of other tests, in widths that bitsandbytes multiplies on a CPU."""
    folder = tmp_path_factory.mktemp("base")
    shutil.copytree(start, folder, dirs_exist_ok=True)
    config = MmdlmForMaskedDiffusion.from_pretrained(start).config
    config.update({"hidden_size": 64, "intermediate_size": 128, "head_dim": 16})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        MmdlmForMaskedDiffusion(config).save_pretrained(folder)
    return folder


@pytest.fixture
def qlora(recipe: Path, base: Path) -> Path:  # noqa: F811
    """The recipe of 24 GB in small: quantized base, matrices, layers computed again."""
    return changed(
        recipe,
        "qlora.yaml",
        model__start_from=str(base),
        model__quantization="int8",
        model__recompute=True,
        model__lora={"rank": 4, "alpha": 8, "dropout": 0.1, "targets": ["q_proj", "down_proj"]},
        training={
            "max_steps": 5,
            "gradient_accumulation_steps": 2,
            "ema": 0.0,
            "save_steps": 2,
            "logging_steps": 1,
            "optimizer": {
                "class_path": "train.optimizer.AdamW",
                "init_args": {"learning_rate": 0.01},
            },
        },
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind, package", KINDS)
def test_a_killed_run_continues_exactly_and_its_adapter_is_asked(
    kind: str, package: str, qlora: Path, base: Path, tmp_path: Path
) -> None:
    needs(package, "peft")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    given = ["--model.quantization", kind]
    other = Run(sft, arguments(qlora, killed, *given), "step_00000004", folder=tmp_path)
    in_process(qlora, whole, *given)
    assert other.exit_code() == -signal.SIGKILL
    assert not (killed / "step_00000004").exists()
    in_process(qlora, killed, *given)
    assert len(logged(whole)) == 5
    assert trajectory(killed) == trajectory(whole)

    # the adapter is all that is written, in checkpoints and at the end, and only it has states
    assert not (whole / "final").exists()
    adapter = load_file(whole / "adapter" / "adapter_model.safetensors")
    again = load_file(killed / "adapter" / "adapter_model.safetensors")
    assert len(adapter) == 8
    assert all(torch.equal(again[name], tensor) for name, tensor in adapter.items())
    assert any(bool(tensor.any()) for name, tensor in adapter.items() if "lora_B" in name)
    stored = weights(whole / "step_00000005")
    assert sorted(stored) == sorted(
        f"denoiser.{name.removeprefix('base_model.model.').replace('.weight', '.default.weight')}"
        for name in adapter
    )
    optimizer = torch.load(whole / "step_00000005" / "optimizer.bin")
    assert len(optimizer["state"]) == len(adapter)

    # what was trained is what is asked
    given = {"device": "cpu", "quantization": kind}
    tuned = mmdlm.load(base, adapter=whole / "adapter", **given)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        before = mmdlm.load(base, **given).denoiser(ids).logits
        assert float((tuned.denoiser(ids).logits - before).abs().max()) > 1e-3
    # a step of the run is asked over whole weights, unless it is told otherwise
    step = mmdlm.load(whole, device="cpu")
    merged = mmdlm.load(base, device="cpu", adapter=whole / "adapter", merge_adapter=True)
    for name, tensor in merged.denoiser.state_dict().items():
        torch.testing.assert_close(step.denoiser.state_dict()[name], tensor, msg=name)
    options: Any = {"max_new_tokens": 4, "num_inference_steps": 4}
    assert isinstance(tuned.answer("hi", **options), str)
    assert isinstance(tuned.chat([{"role": "user", "content": "hi"}], **options), str)


def test_what_was_trained_beside_a_base_without_chat_template_chats(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The adapter carries the template that it was trained with, and how answers are decoded."""
    needs("torchao", "peft")
    base = tmp_path / "start"
    foreign.autoregressive("qwen2", tmp_path / "theirs", tokenizer=tokenizer(None))
    assert cli.main(["convert", "--from", str(tmp_path / "theirs"), str(base)]) == 0
    low = {"rank": 2, "targets": ["q_proj"]}
    generation_config = {"answer": {"num_inference_steps": 3}}
    path = talks(
        tmp_path,
        {"start_from": str(base), "lora": low, "quantization": "int8"},
        generation_config=generation_config,
    )
    in_process(path, tmp_path / "out", "--training.max_steps", "1")
    adapter = tmp_path / "out" / "adapter"
    more = ["--adapter", str(adapter), "--quantization", "int8"]
    (line,) = said(base, ["say cat"], monkeypatch, capsys, *more)
    assert line
    assert mmdlm.load(base, adapter=adapter, device="cpu").defaults.answer.num_inference_steps == 3
    (adapter / TEMPLATE).write_bytes(b"\xff\xfe")
    assert cli.main(["chat", "--model", str(base), *more]) == 2
    assert f"{adapter / TEMPLATE} cannot be read" in capsys.readouterr().err


def test_a_base_with_other_scales_is_another(base: Path) -> None:
    """Though its whole numbers are the same."""
    needs("torchao")
    options: Any = {"device_map": "cpu", "dtype": torch.float32}
    options["quantization_config"] = quantization_config(
        "int8", dtype=torch.float32, device=torch.device("cpu")
    )
    found = []
    for factor in (1, 1, 2):
        model = load_denoiser(base, **options).requires_grad_(False)
        layer = model.model.layers[0].mlp.up_proj
        layer.weight.scale.mul_(factor)
        frozen = Frozen.of(model)
        assert frozen is not None
        found.append(frozen.fingerprint)
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize(
    "options, says",
    [
        (
            {"model__quantization": "3bit"},
            "quantization '3bit' is not known; take 4bit, 8bit, int8, float8",
        ),
        (
            {"model__quantization": "INT8"},
            "quantization 'INT8' is not known; take 4bit, 8bit, int8, float8",
        ),
        ({"model__quantization": "int4"}, "quantization 'int4' has no gradient; take 4bit"),
        ({"model__lora": None}, "quantized weights have no gradient; give `model.lora`"),
        ({"model__start_from": None}, "give model.start_from, a model to start from"),
        (
            {"model__vision": {"tower": TOWER, "tiling": SQUARE}},
            "lack the vision adapter of `model.",
        ),
    ],
)
def test_what_cannot_be_quantized(
    options: dict[str, Any], says: str, qlora: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert says in fails(changed(qlora, "bad.yaml", **options), capsys)


@pytest.mark.parametrize("options", [{"model__quantization": None, "model__lora": None}, {}])
def test_a_base_that_was_saved_in_fewer_bits(
    options: dict[str, Any],
    qlora: Path,
    base: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = Path(shutil.copytree(base, tmp_path / "stored"))
    content = json.loads((folder / "config.json").read_text())
    content["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(content))
    said = fails(changed(qlora, "bad.yaml", model__start_from=str(folder), **options), capsys)
    assert f"{folder} holds quantized weights, which have no gradient" in said


# ---- what 24 GB hold ----------------------------------------------------------------------------

RECIPE = Path(__file__).parents[2] / "configs" / "sft" / "llada_qlora_24gb.yaml"
LLADA_8B = {
    "model_type": "llada",
    "d_model": 4096,
    "n_layers": 32,
    "n_heads": 32,
    "n_kv_heads": 32,
    "mlp_hidden_size": 12288,
    "max_sequence_length": 4096,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
    "weight_tying": False,
    "vocab_size": 126464,
    "embedding_size": 126464,
    "mask_token_id": 126336,
    "eos_token_id": 126081,
    "pad_token_id": 126081,
}


class Attended(torch.autograd.Function):
    """What fused attention keeps for its backward pass: its inputs and its output."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, out)
        return out


def kept_by_a_layer(model: MmdlmForMaskedDiffusion, rows: int, length: int) -> int:
    """Bytes that the backward pass of one layer finds, on the meta device."""
    shape = rows, length, model.config.hidden_size
    x = torch.empty(shape, dtype=torch.bfloat16, device="meta", requires_grad=True)
    place = torch.arange(length, device="meta").expand(rows, length)
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.model.layers[0](x, model.model.rotary(place), AttentionPattern())
    return sum(t.untyped_storage().nbytes() for c, t in kept.items() if c not in weights)


@pytest.mark.slow
def test_the_recipe_of_24_gb_says_what_was_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is allocated: all of it lies on the meta device."""
    given = yaml.safe_load(RECIPE.read_text())
    config = read_config(LLADA_8B)
    with torch.device("meta"):
        model = MmdlmForMaskedDiffusion(config).to(torch.bfloat16)
    whole = {id(parameter): parameter for parameter in model.parameters()}
    assert sum(map(Tensor.numel, whole.values())) == 8_015_581_184
    layers = [module.weight.numel() for module in model.model.modules() if type(module) is Linear]
    rest = sum(map(Tensor.numel, whole.values())) - sum(layers)
    LowRank(**given["model"]["lora"]).onto(model.train(), seed=0)
    low = sum(p.numel() for p in model.parameters() if p.requires_grad)
    data = given["data"]
    rows, length = data["batch_size"] * (1 + given["objective"]["complementary"]), data["length"]
    monkeypatch.setattr("mmdlm.models.layers.attend", lambda q, k, v, _: Attended.apply(q, k, v))
    counted = {
        "of weights": sum(layers) * (0.5 + 4 / 64) + rest * 2,
        "of matrices": low * (4 + 4 + 8),
        "of inputs": 2 * rows * length * config.hidden_size * config.num_hidden_layers,
        "of one layer": kept_by_a_layer(model, rows, length),
    }
    said = " ".join(line.removeprefix("# ") for line in RECIPE.read_text().splitlines())
    for what, size in counted.items():
        assert f"{size / 1e9:.1f} GB {what}" in said, (what, size)
    total = sum(counted.values())
    assert f": {total / 1e9:.1f} GB." in said
    assert total < 0.75 * 24e9
