"""`transformers.Trainer`, PEFT and the collator over our models, on tiny ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

import mmdlm
import mmdlm.integrations
from mmdlm.core.diffusion.forward import Absorbing
from mmdlm.core.diffusion.schedule import Cosine, Linear
from mmdlm.core.losses.objective import ModalityLoss, Objective
from mmdlm.core.losses.weighting import ContextAdaptive
from mmdlm.core.sequence import Sequence, collate, text_segment
from mmdlm.experimental.uniform import Uniform
from mmdlm.integrations.collator import MaskedDiffusionCollator
from mmdlm.integrations.trainer import MaskedDiffusionConfig, MaskedDiffusionTrainer, tokenized
from mmdlm.models.modeling import MmdlmForMaskedDiffusion
from mmdlm.models.noisy_targets import IGNORED
from mmdlm.templates.chat_template import PLAIN
from tests.models.tiny import VOCABULARY, tiny_model

EXAMPLES = [
    {"input_ids": [3, 4, 5, 6, 7, 8, 9], "completion_mask": [0, 0, 1, 1, 1, 1, 1]},
    {"input_ids": [4, 5, 6], "labels": [IGNORED, 5, 6]},
    {"input_ids": [10, 11, 12, 13, 14]},
]


# ---- the collator --------------------------------------------------------------------------------


def test_a_batch_is_padded_and_noisy_only_at_targets() -> None:
    torch.manual_seed(0)
    batch = MaskedDiffusionCollator(VOCABULARY, pad_to_multiple_of=4)(EXAMPLES)
    ids, labels, real = (batch[name] for name in ("input_ids", "labels", "attention_mask"))
    assert ids.shape == labels.shape == (3, 8)
    assert real.sum(1).tolist() == [7, 3, 5]
    assert (labels != IGNORED).sum(1).tolist() == [5, 2, 5]
    masked = ids == VOCABULARY.mask_id
    assert masked.any()
    assert not (masked & (labels == IGNORED)).any()
    assert torch.equal(ids[real.bool() & ~masked], labels_or(ids, EXAMPLES)[real.bool() & ~masked])
    assert torch.equal(batch["loss_weight"] > 0, masked)


def labels_or(ids: torch.Tensor, examples: list[dict[str, Any]]) -> torch.Tensor:
    """The clean ids of examples, padded as `ids` are."""
    clean = torch.zeros_like(ids)
    for row, example in enumerate(examples):
        clean[row, : len(example["input_ids"])] = torch.tensor(example["input_ids"])
    return clean


@pytest.mark.parametrize(
    "objective",
    [
        Objective(Absorbing(Linear(eps=1e-3))),
        Objective(Absorbing(Cosine()), complementary=True),
        Objective(
            Absorbing(Linear(), exact_count=True), text=ModalityLoss(weighting=ContextAdaptive())
        ),
    ],
    ids=["linear", "complementary", "cart"],
)
def test_the_loss_of_a_batch_is_the_objective(objective: Objective) -> None:
    model = tiny_model()
    torch.manual_seed(1)
    collator = MaskedDiffusionCollator(VOCABULARY, objective=objective)
    loss = model(**collator(EXAMPLES)).loss
    torch.manual_seed(1)
    generator = torch.Generator().manual_seed(int(torch.randint(2**62, ())))
    marks = [
        example.get("completion_mask", [1] * len(example["input_ids"])) for example in EXAMPLES
    ]
    marks[1] = [0, 1, 1]
    batch = collate(
        [
            Sequence((text_segment(one["input_ids"], target=torch.tensor(mark).bool()),))
            for one, mark in zip(EXAMPLES, marks, strict=True)
        ],
        VOCABULARY,
    )
    terms = objective(model, batch, generator=generator)
    expected = sum(terms.sums.values()) / sum(terms.counts.values())
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)


def test_without_noise_the_model_masks_and_processes_mask_differently() -> None:
    clean = MaskedDiffusionCollator(VOCABULARY, noise=False)(EXAMPLES)
    assert "loss_weight" not in clean
    assert not (clean["input_ids"] == VOCABULARY.mask_id).any()
    batches = []
    for rank in (0, 1):
        torch.manual_seed(0)
        batches.append(MaskedDiffusionCollator(VOCABULARY, rank=rank)(EXAMPLES)["input_ids"])
    assert not torch.equal(*batches)


def test_short_answers_are_filled_with_ends() -> None:
    batch = MaskedDiffusionCollator(VOCABULARY, fill_with_eos=True, noise=False)(EXAMPLES)
    assert batch["labels"][1].tolist() == [IGNORED, 5, 6, *[VOCABULARY.eos_id] * 4]
    assert batch["attention_mask"].all()


def test_examples_are_cut() -> None:
    batch = MaskedDiffusionCollator(VOCABULARY, max_length=4)(EXAMPLES)
    assert batch["labels"].shape == (3, 4)


@pytest.mark.parametrize(
    "examples, reason",
    [
        ([], "no examples"),
        ([{"text": "a"}], "no input_ids, but text"),
        ([{"input_ids": [1, 2], "labels": [1]}], "2 input_ids, but labels"),
        ([{"input_ids": [1, 2], "completion_mask": [1]}], "completion_mask"),
    ],
)
def test_bad_examples_are_refused(examples: list[dict[str, Any]], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        MaskedDiffusionCollator(VOCABULARY)(examples)


@pytest.mark.parametrize(
    "objective, reason",
    [
        (Objective(Uniform(Linear())), "Uniform puts other noise"),
        (
            Objective(Absorbing(Linear()), text=ModalityLoss(loss_normalization="sequence")),
            "text loss",
        ),
    ],
)
def test_losses_that_weights_cannot_say_are_refused(objective: Objective, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        MaskedDiffusionCollator(VOCABULARY, objective=objective)


# ---- tokenized examples --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(tiny_checkpoint: Path) -> PreTrainedTokenizerFast:
    found = PreTrainedTokenizerFast.from_pretrained(tiny_checkpoint)
    found.chat_template = PLAIN
    return found


def test_conversations_prompts_and_texts_are_tokenized(tokenizer: PreTrainedTokenizerFast) -> None:
    options = MaskedDiffusionConfig()
    talk = [{"role": "user", "content": "red"}, {"role": "assistant", "content": "heart"}]
    pair = tokenized({"prompt": talk[:1], "completion": talk[1:]}, tokenizer, options)
    said = [i for i, m in zip(pair["input_ids"], pair["completion_mask"], strict=True) if m]
    assert tokenizer.decode(said).strip() == "heart" + tokenizer.eos_token
    whole = tokenized({"messages": talk}, tokenizer, options)
    assert whole == {"input_ids": pair["input_ids"]}
    only = MaskedDiffusionConfig(assistant_only_loss=True)
    marked = tokenized({"messages": talk}, tokenizer, only)
    assert marked["completion_mask"] == pair["completion_mask"]
    text = tokenized({"text": "red heart"}, tokenizer, options)["input_ids"]
    assert tokenizer.decode(text).strip() == "red heart" + tokenizer.eos_token
    split = tokenized({"prompt": "red", "completion": " heart"}, tokenizer, options)
    assert sum(split["completion_mask"]) > 0
    all_of_it = MaskedDiffusionConfig(completion_only_loss=False)
    assert "completion_mask" not in tokenized(
        {"prompt": "a", "completion": "b"}, tokenizer, all_of_it
    )


@pytest.mark.parametrize(
    "example, reason",
    [
        ({"words": "a"}, "dataset_text_field"),
        ({"prompt": "a", "completion": []}, "two texts"),
    ],
)
def test_other_examples_are_refused(
    example: dict[str, Any], reason: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(ValueError, match=reason):
        tokenized(example, tokenizer, MaskedDiffusionConfig())


def test_messages_need_a_template(tiny_checkpoint: Path) -> None:
    bare = PreTrainedTokenizerFast.from_pretrained(tiny_checkpoint)
    with pytest.raises(ValueError, match="chat template"):
        tokenized({"messages": []}, bare, MaskedDiffusionConfig())


# ---- training ------------------------------------------------------------------------------------


def arguments(folder: Path, **options: Any) -> MaskedDiffusionConfig:
    return MaskedDiffusionConfig(
        str(folder),
        **{
            "max_steps": 3,
            "per_device_train_batch_size": 2,
            "learning_rate": 1e-2,
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
            "save_strategy": "no",
            **options,
        },
    )


@pytest.mark.slow
def test_a_folder_is_trained_and_answers(tiny_checkpoint: Path, tmp_path: Path) -> None:
    data = [{"text": "red heart"}, {"text": "woman dark skin tone"}] * 4
    trainer = MaskedDiffusionTrainer(
        str(tiny_checkpoint),
        arguments(tmp_path, max_steps=60, gradient_checkpointing=True),
        train_dataset=data,
        eval_dataset=data,
    )
    before = trainer.evaluate()["eval_loss"]
    assert trainer.evaluate()["eval_loss"] == before
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before - 1
    trainer.save_model(str(tmp_path / "model"))
    again = MmdlmForMaskedDiffusion.from_pretrained(tmp_path / "model")
    assert torch.equal(again.lm_head.weight, trainer.model.lm_head.weight)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path / "model")
    assert tokenizer.eos_token_id == again.vocabulary.eos_id


def all_masked(examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """A batch without chance: every target is masked, and counts once."""
    batch = MaskedDiffusionCollator(VOCABULARY, noise=False)(examples)
    target = batch["labels"] != IGNORED
    ids = batch["input_ids"].masked_fill(target, VOCABULARY.mask_id)
    return {**batch, "input_ids": ids, "loss_weight": target.float()}


@pytest.mark.slow
def test_accumulated_batches_count_each_target_once(tmp_path: Path) -> None:
    weights = []
    for size, steps in ((4, 1), (1, 4)):
        model = tiny_model()
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
        trainer = MaskedDiffusionTrainer(
            model,
            arguments(tmp_path, max_steps=1, optim="sgd", **options),
            train_dataset=[*EXAMPLES, EXAMPLES[1]],
            data_collator=all_masked,
        )
        trainer.train()
        weights.append(model.lm_head.weight.detach())
    torch.testing.assert_close(*weights, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(weights[0], tiny_model().lm_head.weight)


@pytest.mark.slow
def test_an_adapter_without_named_modules(tiny_checkpoint: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4)
    trainer = MaskedDiffusionTrainer(
        str(tiny_checkpoint),
        arguments(tmp_path, gradient_checkpointing=True),
        train_dataset=[{"text": "red heart"}] * 4,
        peft_config=config,
    )
    trained = [name for name, one in trainer.model.named_parameters() if one.requires_grad]
    assert len(trained) == 2 * 2 * 7
    assert all("lora" in name for name in trained)
    before = {name: one.clone() for name, one in trainer.model.named_parameters()}
    trainer.train()
    changed = {n for n, one in trainer.model.named_parameters() if not torch.equal(one, before[n])}
    assert changed == set(trained)
    prompt = torch.tensor([[5, 6, 7]])
    written = trainer.model.generate(input_ids=prompt, max_new_tokens=4)
    assert written.shape == (1, 7)
    trainer.save_model(str(tmp_path / "adapter"))
    model = mmdlm.load(tiny_checkpoint, adapter=tmp_path / "adapter")
    again = model.denoiser(prompt).logits
    trainer.model.eval()
    torch.testing.assert_close(again, trainer.model(prompt).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_transformers_own_trainer_and_collator(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Labels of any collator give the loss of masked diffusion: no class of ours is needed."""
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint)
    examples = [{"input_ids": [1, 2, 3, 4, 5], "labels": [1, 2, 3, 4, 5]}] * 8
    args = TrainingArguments(
        str(tmp_path),
        max_steps=40,
        learning_rate=1e-2,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        logging_steps=20,
        per_device_train_batch_size=8,
    )
    trainer = Trainer(model, args, train_dataset=examples)
    trainer.train()
    first, last = (one["loss"] for one in trainer.state.log_history[:2])
    assert last < first


def test_smoothed_labels_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="set it to 0"):
        MaskedDiffusionTrainer(tiny_model(), arguments(tmp_path, label_smoothing_factor=0.1))


def test_other_models_are_refused() -> None:
    with pytest.raises(ValueError, match="does not train a Linear"):
        MaskedDiffusionTrainer(torch.nn.Linear(1, 1))  # type: ignore[arg-type]
