"""Options of harnesses: who wins, what is refused, and presets that a model can be asked by."""

from __future__ import annotations

from typing import Any

import pytest

from mmdlm.harnesses.options import HarnessOptions, sampling_of, updated
from mmdlm.harnesses.published import Preset, preset_named, presets
from mmdlm.pipeline.generation_config import GenerationConfig
from mmdlm.pipeline.model import Model
from mmdlm.templates.auto import LAYOUTS
from tests.harnesses.conftest import tiny

FAMILIES = {  # of the presets -> of ours, among those that need no vision tower
    "LLaDA": "llada",
    "LLaDA-V": "llada_v",
    "LaViDa": "lavida_llada",
    "Dream": "dream",
    "Dimple": "dimple",
    "MMaDA": "mmada",
    "Lumina-DiMOO": "lumina",
}


def test_arguments_of_a_task_in_our_names() -> None:
    found, stops = sampling_of(
        {"until": ["\n", ""], "stop": "Q:", "max_gen_toks": 64, "do_sample": False, "top_p": 0}
    )
    assert found == {"max_new_tokens": 64, "temperature": 0.0}
    assert stops == ("\n", "Q:")
    found, stops = sampling_of(
        {"max_new_tokens": 8, "temperature": 0.5, "top_p": 0.9, "top_k": 0, "do_sample": True}
    )
    assert found == {"max_new_tokens": 8, "temperature": 0.5, "top_p": 0.9}
    assert stops == ()
    assert sampling_of({"temperature": 0, "top_k": 5, "num_beams": 1}) == ({"temperature": 0.0}, ())
    assert sampling_of({"block_length": 4, "until": None})[0] == {"block_length": 4}


@pytest.mark.parametrize("arguments", [{"num_beams": 4}, {"blocklength": 3}, {"length_penalty": 2}])
def test_an_argument_of_other_models_is_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(arguments))):
        sampling_of(arguments)


@pytest.mark.parametrize(
    "given, word",
    [
        ({"blok_length": 3}, "did you mean block_length"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"samples": 1.5}, "samples"),
        ({"tokens_per_step": 0}, "tokens_per_step"),
        ({"tokens_per_step": 2, "num_inference_steps": 4}, "exclude each other"),
        ({"end_of_text": "late"}, "end_of_text"),
        ({"think": "yes"}, "think"),
    ],
)
def test_a_bad_option_is_refused(given: dict[str, Any], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        HarnessOptions(given)


def test_who_speaks_first_wins(llada: Model) -> None:
    preset = preset_named("d1")
    asked = {"max_new_tokens": 32, "temperature": 0.7, "top_k": 5}

    def ask(options: HarnessOptions) -> tuple[int, GenerationConfig]:
        found = options.ask(llada, task="gsm8k", requested=asked, chat=True)
        return found.length, found.config

    length, config = ask(HarnessOptions())
    assert (length, config.temperature, config.top_k) == (32, 0.7, 5)
    assert config.num_inference_steps == 256  # eight steps a token, as the tiny model's defaults
    length, config = ask(HarnessOptions({}, preset))
    assert (length, config.temperature, config.block_length) == (256, 0.0, 32)
    assert config.num_inference_steps == 128
    length, config = ask(HarnessOptions({"max_new_tokens": 128, "temperature": 0.2}, preset))
    assert (length, config.temperature) == (128, 0.2)
    assert config.num_inference_steps == 64  # as many tokens a step as the preset has
    length, config = ask(HarnessOptions({"num_inference_steps": 7, "max_new_tokens": 64}, preset))
    assert config.num_inference_steps == 7
    length, config = ask(HarnessOptions({"tokens_per_step": 4}))
    assert config.num_inference_steps == 8


def test_a_preset_has_settings_of_each_task() -> None:
    preset = preset_named("llada_1_5")
    assert preset.settings_for("gsm8k_cot")["block_length"] == 16
    assert preset.settings_for("gpqa_main_n_shot")["end_of_text"] is None
    assert preset.settings_for("mbpp_instruct")["end_of_text"] == "deprioritize"
    assert "max_new_tokens" not in preset.settings_for("another")
    with pytest.raises(ValueError, match="did you mean llada_paper"):
        preset_named("lada_paper")


@pytest.mark.parametrize("preset", presets().values(), ids=lambda preset: preset.name)
def test_a_model_of_its_family_can_be_asked_by_each_preset(preset: Preset) -> None:
    family = FAMILIES[preset.family]
    model = tiny(family)
    assert set(LAYOUTS) >= {family}
    assert all((preset.source, preset.prompt, preset.end_rule, preset.ran_with))
    for task in preset.tasks:
        name = task.task[0].replace("*", "")
        said = {**preset.settings_for(name)}
        if said.get("max_new_tokens", 0) > 256:  # the tiny model is small
            shorter = {"max_new_tokens": 256, "block_length": 32}
        else:
            shorter = {}
        ask = HarnessOptions(shorter, preset).ask(model, task=name, requested={}, chat=True)
        assert ask.config.sampler().steps >= 1
        if "num_inference_steps" in said and not shorter:
            assert ask.config.num_inference_steps == said["num_inference_steps"], name
        HarnessOptions(said)  # every name is known


def test_end_of_text_is_committed_last_or_never(llada: Model) -> None:
    last = HarnessOptions({"end_of_text": "deprioritize"})
    found = last.ask(llada, task=None, requested={}, chat=True)
    assert set(found.config.deprioritized_ids) == set(llada.prompt_template.stop_ids(llada.codec))
    never = HarnessOptions({"end_of_text": "suppress"})
    assert never.ask(llada, task=None, requested={}, chat=True).suppress_end


def test_none_takes_back_what_a_model_has() -> None:
    sure = GenerationConfig(8, order="random", threshold=0.9, threshold_exclusive=True)
    found = updated(
        sure, {"threshold": None, "threshold_exclusive": False, "order": "left_to_right"}
    )
    assert (found.threshold, found.order) == (None, "left_to_right")
    with pytest.raises(ValueError, match="cannot be imported|no Cache"):
        updated(sure, {"cache": "dul"})
