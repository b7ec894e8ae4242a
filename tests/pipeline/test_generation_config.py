"""The settings that a checkpoint carries: plain values, strictly read."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

import pytest

import mmdlm
from mmdlm.core.diffusion.schedule import Cosine, Shifted
from mmdlm.core.sampling.cache import Delayed, Dual, Prefix, Stable
from mmdlm.core.sampling.guidance import ClassifierFreeGuidance
from mmdlm.core.sampling.order import Confidence, Entropy, LeftToRight, Random
from mmdlm.core.sampling.remasking import Remasking
from mmdlm.core.sampling.unmasking import (
    Ancestral,
    CatchUpTransfer,
    EntropyBound,
    Factor,
    PlannedTransfer,
    ScheduledTransfer,
    Threshold,
    UniformTransfer,
)
from mmdlm.pipeline.generation_config import GenerationConfig
from mmdlm.pipeline.presets import PresetName
from mmdlm.pipeline.task_defaults import Defaults


def written(folder: Path, content: object) -> Path:
    path = folder / "generation_config.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_a_decoding_is_a_sampler_in_plain_values() -> None:
    plain = GenerationConfig(7).sampler()
    assert (plain.steps, plain.order, plain.unmasking) == (7, Confidence(), UniformTransfer())
    assert plain.remask is None
    rich = GenerationConfig(
        7, order_temperature=2.0, schedule="cosine", remask=0.1, top_p=0.9, block_length=4
    ).sampler(suppress_tokens=(3,))
    assert rich.order == Confidence(2.0)
    assert rich.unmasking == ScheduledTransfer(Cosine())
    assert rich.remask == Remasking(0.1)
    assert (rich.top_p, rich.block_length, rich.suppress_tokens) == (0.9, 4, (3,))
    assert GenerationConfig(7, order="left_to_right").sampler().order == LeftToRight()


@dataclass(frozen=True)
class Own(LeftToRight):
    """An order that has no name."""


@dataclass(frozen=True)
class OwnCache(Dual):
    """A cache that has no name."""


def test_a_class_of_ones_own_is_used_and_not_stored(tmp_path: Path) -> None:
    own = Defaults().in_each_task(order=Own(), schedule=UniformTransfer())
    assert own.text_to_image.sampler().order == Own()
    assert own.text_to_image.sampler().unmasking == UniformTransfer()
    with pytest.raises(ValueError, match=r"text_to_image.order Own\(\) is a class of your own"):
        own.to_json()
    cached = Defaults(caption=GenerationConfig(5, cache=OwnCache(), cache_refresh=3))
    assert cached.caption.sampler().cache == OwnCache(3)
    with pytest.raises(ValueError, match=r"caption.cache OwnCache\(.*\) is a class of your own"):
        cached.to_json()
    usual = Defaults(caption=GenerationConfig(5, order="margin"))
    assert Defaults.from_json(written(tmp_path, usual.to_json())) == usual
    path = {"caption": {"order": {"class_path": "tests.pipeline.test_generation_config.Own"}}}
    with pytest.raises(ValueError, match="is not one of 'confidence'"):  # a file imports nothing
        Defaults.from_json(written(tmp_path, path))
    with pytest.raises(ValueError, match=r"which order Own\(\) does not look at"):
        GenerationConfig(3, order=Own(), order_temperature=1.0)


def test_what_is_given_for_each_task_takes_the_place_of_what_excludes_it() -> None:
    noisy = Defaults().in_each_task(order="random")  # drawings have noise on their confidence
    assert noisy.text_to_image.order_temperature == 0.0
    shifted = Defaults(caption=GenerationConfig(4, schedule="shifted", shift=0.5))
    assert shifted.in_each_task(schedule="cosine").caption.shift == GenerationConfig.shift
    bound = Defaults(caption=GenerationConfig(4, order="entropy", entropy_bound=0.1))
    assert bound.in_each_task(order="margin").caption.entropy_bound is None


def test_decodings_of_published_systems(tmp_path: Path) -> None:
    """As a checkpoint carries them, and what becomes of them."""
    dream = {"reproduce": "dream", "order": "entropy", "top_p": 0.95, "published_defects": True}
    dream |= {"order_temperature": 0.1, "order_decay": "none"}
    lumina = {"reproduce": "lumina", "guidance_scale": [3.5, 5], "order_decay": "none"}
    dimple = {
        "reproduce": "dimple",
        "threshold": 0.95,
        "threshold_exclusive": True,
        "order": "random",
    }
    lavida = {
        "schedule": "shifted",
        "shift": 0.5,
        "suppress_tokens": [3, 4],
        "deprioritized_ids": [5],
    }
    content = {"infill": dream, "text_to_image": lumina, "caption": dimple, "inpaint": lavida}
    read = Defaults.from_json(written(tmp_path, content))

    sampler = read.infill.sampler()
    assert (sampler.order, sampler.unmasking) == (Entropy(0.1, "none"), Ancestral())
    assert (sampler.score_after_temperature, sampler.allow_mask_token) == (True, True)
    sampler = read.text_to_image.sampler()
    assert sampler.order == Confidence(1.0, "none")
    assert sampler.unmasking == MASKGIT
    assert sampler.guidance == ClassifierFreeGuidance((3.5, 5))
    sampler = read.caption.sampler(suppress_tokens=(9,))
    assert sampler.unmasking == Threshold(0.95, fallback=CatchUpTransfer(), exclusive=True)
    assert (sampler.order, sampler.suppress_tokens) == (Random(), (9,))
    sampler = read.inpaint.sampler(suppress_tokens=(9,))
    assert sampler.unmasking == PlannedTransfer(Shifted(0.5))
    assert (sampler.suppress_tokens, sampler.deprioritized_ids) == ((3, 4, 9), (5,))
    assert GenerationConfig(3, schedule="ancestral").sampler().unmasking == Ancestral(drawn=True)


MASKGIT = ScheduledTransfer(Cosine(), least=1, strict=True)
RULES = {"llada": UniformTransfer(), "mmada": MASKGIT, "lumina": MASKGIT, "dream": Ancestral()}
RULES |= {"dimple": CatchUpTransfer(), "lavida": PlannedTransfer(Shifted(1 / 3))}
RULES |= {"sdar": UniformTransfer(), "fast_dllm": UniformTransfer()}


@pytest.mark.parametrize("name", get_args(PresetName))
def test_a_preset_sets_what_only_a_published_sampler_does(name: PresetName) -> None:
    ours = GenerationConfig(5, reproduce=name, order_temperature=1.0).sampler()
    assert ours.unmasking == RULES[name]
    assert (ours.full_vocabulary, ours.allow_mask_token) == (False, False)
    assert ours.order == Confidence(1.0, "linear")
    assert ours.score_after_temperature == (name in ("dream", "sdar", "fast_dllm"))
    assert ours.first_alone == (name == "fast_dllm")
    assert ours.top_p_first == (name in ("dream", "dimple"))
    theirs = GenerationConfig(
        5, reproduce=name, published_defects=True, order_temperature=1.0, schedule="cosine"
    ).sampler()
    assert theirs.unmasking == ScheduledTransfer(Cosine())  # what is given wins
    any_id = name in ("llada", "mmada", "dream", "dimple", "sdar", "fast_dllm")
    assert (theirs.full_vocabulary, theirs.allow_mask_token) == (any_id, any_id)
    assert theirs.order == Confidence(1.0, "compounding" if name == "mmada" else "linear")


def test_a_preset_takes_the_place_of_a_schedule_in_all_tasks() -> None:
    shifted = Defaults(caption=GenerationConfig(4, schedule="shifted", shift=0.5))
    caption = shifted.in_each_task(reproduce="dimple").caption
    assert (caption.schedule, caption.sampler().unmasking) == (None, CatchUpTransfer())


def test_what_the_file_does_not_say_stays(tmp_path: Path) -> None:
    assert Defaults.from_json(tmp_path / "generation_config.json") == Defaults()
    path = written(tmp_path, {"caption": {"temperature": 0.5}, "fit": "crop"})
    expected = replace(Defaults(), caption=replace(Defaults().caption, temperature=0.5), fit="crop")
    assert Defaults.from_json(path) == expected


@pytest.mark.parametrize(
    "content, says",
    [
        ("{", "cannot be read"),
        ([1], "the file must hold an object"),
        ({"captions": {}}, "unknown key 'captions'; known are text_to_image, inpaint, caption"),
        ({"caption": {"step": 3}}, "unknown key 'caption.step'; known are num_inference_steps"),
        ({"caption": 3}, "caption must hold an object"),
        ({"caption": {"num_inference_steps": 0}}, "caption.num_inference_steps must be a whole"),
        ({"caption": {"num_inference_steps": 2.5}}, "got 2.5"),
        ({"caption": {"num_inference_steps": True}}, "got True"),
        ({"caption": {"temperature": "hot"}}, "caption.temperature must be a finite number"),
        ({"caption": {"temperature": -1}}, "caption.temperature must not be negative, got -1"),
        ({"caption": {"top_p": 2}}, "top_p must lie in (0, 1], got 2"),
        ({"caption": {"remask": 2}}, "eta must lie in [0, 1], got 2"),
        ({"caption": {"order": "torch.nn.Linear"}}, "'torch.nn.Linear' is not one of 'confidence'"),
        ({"caption": {"order": ["a"]}}, "is not one of 'confidence'"),
        ({"caption": {"order": "random", "order_temperature": 1}}, "order 'random' does not look"),
        ({"caption": {"order_decay": "slow"}}, "'slow' is not one of 'linear', 'compounding'"),
        ({"caption": {"shift": 2}}, "shift 2 belongs to schedule 'shifted', not to 'linear'"),
        ({"caption": {"shift": 0, "schedule": "shifted"}}, "shift must be above 0, got 0"),
        ({"caption": {"threshold": 1.5}}, "threshold must lie in [0, 1], got 1.5"),
        ({"caption": {"threshold_exclusive": True}}, "threshold_exclusive needs a threshold"),
        (
            {"caption": {"published_defects": 1}},
            "caption.published_defects must be true or false, got 1",
        ),
        (
            {"caption": {"published_defects": True}},
            "caption.published_defects needs a published sampler; name one by reproduce",
        ),
        (
            {"caption": {"reproduce": "dreem"}},
            "caption.reproduce 'dreem' is not one of 'llada', 'mmada', 'lumina', 'dream', "
            "'dimple', 'lavida', 'sdar', 'fast_dllm'; did you mean dream?",
        ),
        (
            {"caption": {"num_inference_step": 3}},
            "unknown key 'caption.num_inference_step'; known are num_inference_steps",
        ),
        ({"caption": {"suppress_tokens": 3}}, "suppress_tokens must be a list of token ids, got 3"),
        (
            {"caption": {"deprioritized_ids": ["a"]}},
            "deprioritized_ids must be a list of token ids, got ('a',)",
        ),
        ({"caption": {"guidance_scale": []}}, "guidance_scale must be a finite number, got ()"),
        ({"caption": {"guidance_scale": [1, "a"]}}, "guidance_scale must be a finite number"),
        ({"caption": {"schedule": "even"}}, "'even' is not one of 'linear', 'cosine'"),
        ({"fit": "squeeze"}, "fit 'squeeze' is not one of 'crop', 'pad', 'stretch'"),
        ({"max_text_tokens": 1}, "max_text_tokens must be a whole number above 1, got 1"),
    ],
)
def test_bad_settings_are_one_sentence_that_names_the_file(
    tmp_path: Path, content: object, says: str
) -> None:
    path = written(tmp_path, content)
    with pytest.raises(ValueError, match=re.escape(says)) as caught:
        Defaults.from_json(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


# ---- faster --------------------------------------------------------------------------------------


def test_parallel_rules_and_caches_by_name():
    assert GenerationConfig(8, factor=0.5).sampler().unmasking == Factor(0.5)
    bound = GenerationConfig(8, entropy_bound=0.2, order="entropy", schedule="cosine").sampler()
    assert bound.unmasking == EntropyBound(0.2, fallback=ScheduledTransfer(Cosine()))
    ordered = GenerationConfig(8, threshold=0.9, in_order=True).sampler().unmasking
    assert ordered == Threshold(0.9, in_order=True)
    once = GenerationConfig(8, factor=0.5, distinct=True).sampler().unmasking
    assert once == Factor(0.5, distinct=True)
    assert GenerationConfig(8).sampler().cache is None
    assert GenerationConfig(8, cache="dual").sampler().cache == Dual()
    assert GenerationConfig(8, cache="delayed").sampler().cache == Delayed(refresh=8)
    assert GenerationConfig(8, cache="prefix", cache_refresh=3).sampler().cache == Prefix(refresh=3)
    assert GenerationConfig(8, cache="stable", cache_refresh=1).sampler().cache == Stable(refresh=1)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"cache": "all"}, "cache 'all' is not one of"),
        ({"cache_refresh": 3}, "cache_refresh 3 needs a cache"),
        ({"cache": "dual", "cache_refresh": 0}, "cache_refresh must be a whole number"),
        ({"threshold": 0.9, "factor": 1.0}, "threshold and factor exclude each other"),
        ({"factor": -1.0}, "factor must not be negative"),
        ({"entropy_bound": 0.1}, "needs order 'entropy'"),
        ({"in_order": True}, "in_order needs one of threshold"),
        ({"distinct": True}, "distinct needs one of threshold"),
        ({"in_order": 1, "threshold": 0.9}, "in_order must be true or false"),
    ],
)
def test_what_does_not_go_together(options, message):
    with pytest.raises(ValueError, match=message):
        GenerationConfig(8, **options)


def test_values_in_each_task():
    faster = Defaults().in_each_task(cache="dual", threshold=0.9, factor=None)
    assert faster.caption == replace(Defaults().caption, cache="dual", threshold=0.9)
    assert faster.text_to_image.guidance_scale == Defaults().text_to_image.guidance_scale
    sure = Defaults(
        answer=GenerationConfig(8, threshold=0.95, threshold_exclusive=True, order_decay="none")
    )
    other = sure.in_each_task(factor=1.0).answer
    assert (other.threshold, other.threshold_exclusive, other.factor) == (None, False, 1.0)
    again = sure.in_each_task(factor=1.0).in_each_task(threshold=0.8).answer
    assert (again.threshold, again.factor) == (0.8, None)
    bound = sure.in_each_task(entropy_bound=0.1, order="entropy", order_temperature=0.0)
    assert isinstance(bound.answer.sampler().unmasking, EntropyBound)
    assert (faster.fit, faster.max_new_tokens) == (Defaults().fit, Defaults().max_new_tokens)


@pytest.mark.slow
def test_a_model_takes_orders_schedules_and_published_samplers() -> None:
    model = mmdlm.load("emoji", device="cpu")
    other = model.with_generation(order=Own(), schedule="cosine")
    samplers = [getattr(other.defaults, task).sampler() for task in ("caption", "text_to_image")]
    assert all(one.order == Own() for one in samplers)
    assert all(one.unmasking == ScheduledTransfer(Cosine()) for one in samplers)
    published = model.with_generation(reproduce="dream", published_defects=True)
    assert published.defaults.caption.sampler().allow_mask_token
    assert not model.defaults.caption.sampler().allow_mask_token
    assert model.with_generation(entropy_bound=0.1).defaults.caption.order == "entropy"
    with pytest.raises(ValueError, match="entropy_bound 0.1 needs order 'entropy'"):
        model.with_generation(entropy_bound=0.1, order="random")
    with pytest.raises(ValueError, match="published_defects needs a published sampler"):
        model.with_generation(published_defects=True)
