"""Train our models by `transformers.Trainer`, with the names that TRL's SFTTrainer has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from transformers import (
    AutoModelForMaskedLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
)

import mmdlm.integrations  # noqa: F401  (registers our classes)
from mmdlm.core.losses.objective import Objective
from mmdlm.integrations.collator import OBJECTIVE, MaskedDiffusionCollator

_PREPARED = ("input_ids", "labels", "completion_mask", "pixel_values", "image_sizes")
_KEPT = (*_PREPARED, "assistant_masks", "mm_token_type_ids")


@dataclass
class MaskedDiffusionConfig(TrainingArguments):
    """`TrainingArguments`, and what examples become; names and defaults are those of SFTConfig.

    Args:
        dataset_text_field: Column of texts, for a data set of plain texts.
        dataset_num_proc: Processes that tokenize; None: this one.
        max_length: Examples are cut to so many tokens; None: they are not.
        completion_only_loss: Whether prompts are context; None: where examples have a prompt and a
            completion, they are.
        assistant_only_loss: Whether of a conversation only what the assistant says is learned, for
            which the chat template marks it (`{% generation %}`).
        pad_to_multiple_of: Rows are padded to a multiple of so many tokens.
        fill_with_eos: See `MaskedDiffusionCollator`.
    """

    dataset_text_field: str = field(default="text")
    dataset_num_proc: int | None = field(default=None)
    max_length: int | None = field(default=1024)
    completion_only_loss: bool | None = field(default=None)
    assistant_only_loss: bool = field(default=False)
    pad_to_multiple_of: int | None = field(default=None)
    fill_with_eos: bool = field(default=False)


class MaskedDiffusionTrainer(Trainer):
    """`transformers.Trainer` over the objective of masked diffusion.

    A data set has columns `messages` (a conversation), `prompt` and `completion` (texts or
    messages), a text, or `input_ids` that are tokenized already; see `tokenized`.

    Evaluation masks an example in the same way each time, so that its losses can be compared.

    Args:
        model: Of our classes, or a folder or repository of one.
        args: `MaskedDiffusionConfig`, or plain `TrainingArguments`.
        data_collator: In place of `MaskedDiffusionCollator`.
        train_dataset: Examples.
        eval_dataset: Examples, or several data sets by name.
        processing_class: The text tokenizer; None: that of the model's folder.
        objective: Of training; None: that of the collator.
        peft_config: A config of PEFT: only its adapter is trained.
        **kwargs: Of `Trainer`.

    Raises:
        ValueError: For a model that is none of ours, and data that cannot be tokenized.
    """

    data_collator: Any

    def __init__(
        self,
        model: PreTrainedModel | str,
        args: TrainingArguments | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        *,
        objective: Objective | None = None,
        peft_config: Any = None,
        **kwargs: Any,
    ) -> None:
        if args is None:
            args = MaskedDiffusionConfig("trainer_output")
        if isinstance(model, str):
            name, model = model, AutoModelForMaskedLM.from_pretrained(model)
            if processing_class is None:
                processing_class = AutoTokenizer.from_pretrained(name)
        bare = model.get_base_model() if hasattr(model, "get_base_model") else model
        if not hasattr(bare, "vocabulary"):
            raise ValueError(
                f"MaskedDiffusionTrainer does not train a {type(bare).__name__}; make a "
                "masked-diffusion model of an autoregressive model by: mmdlm convert --from"
            )
        if args.label_smoothing_factor:
            raise ValueError(
                f"label_smoothing_factor {args.label_smoothing_factor}: Trainer would smooth "
                "without the weights of masked diffusion; set it to 0"
            )
        if peft_config is not None:
            from peft import get_peft_model

            model = get_peft_model(model, peft_config)
        options = args if isinstance(args, MaskedDiffusionConfig) else MaskedDiffusionConfig()
        if data_collator is None:
            data_collator = MaskedDiffusionCollator(
                bare.vocabulary,
                max_length=options.max_length,
                pad_to_multiple_of=options.pad_to_multiple_of,
                fill_with_eos=options.fill_with_eos,
                rank=args.process_index,
                objective=OBJECTIVE if objective is None else objective,
            )
        elif objective is not None:
            raise ValueError("objective is the collator's; give it to your data_collator")
        if train_dataset is not None:
            train_dataset = _prepared(train_dataset, processing_class, options)
        if isinstance(eval_dataset, dict):
            eval_dataset = {
                name: _prepared(one, processing_class, options)
                for name, one in eval_dataset.items()
            }
        elif eval_dataset is not None:
            eval_dataset = _prepared(eval_dataset, processing_class, options)
        if kwargs.get("compute_metrics") is None:
            args.prediction_loss_only = True
        args.remove_unused_columns = False  # the collator takes what it knows
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **kwargs,
        )

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Compute the loss; logits only where somebody asks for them."""
        if self.args.prediction_loss_only or model.training:
            inputs = {**inputs, "skip_logits": True}
        return super().compute_loss(model, inputs, *args, **kwargs)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Return batches whose targets the model masks in the same way each time."""
        collator = self.data_collator
        if not isinstance(collator, MaskedDiffusionCollator):
            return super().get_eval_dataloader(eval_dataset)
        self.data_collator = replace(collator, noise=False)
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = collator


def tokenized(
    example: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, options: MaskedDiffusionConfig
) -> dict[str, list[int]]:
    """Tokenize an example.

    Args:
        example: With `messages`; with `prompt` and `completion`, both texts or both messages; or
            with a text.
        tokenizer: Has a chat template, for messages.
        options: Which part is learned.

    Returns:
        `input_ids`, and `completion_mask` where not all of them are learned.

    Raises:
        ValueError: For an example that has none of these.
    """
    if "messages" in example:
        return _conversation(example["messages"], tokenizer, options)
    if "prompt" in example and "completion" in example:
        return _completion(example["prompt"], example["completion"], tokenizer, options)
    text = example.get(options.dataset_text_field)
    if not isinstance(text, str):
        raise ValueError(
            f"an example has {', '.join(example) or 'nothing'}, but neither messages, nor prompt "
            f"and completion, nor a text in {options.dataset_text_field!r}; name the column of "
            "texts by dataset_text_field"
        )
    return {"input_ids": [*_ids(text, tokenizer), tokenizer.eos_token_id]}


def _conversation(
    messages: list[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    options: MaskedDiffusionConfig,
) -> dict[str, list[int]]:
    """Tokenize a conversation; what the assistant says is learned, or all of it."""
    _need_template(tokenizer)
    if not options.assistant_only_loss:
        return {"input_ids": _of_messages(messages, tokenizer)}
    found = tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    if not any(found["assistant_masks"]):
        raise ValueError(
            "assistant_only_loss: the chat template does not mark what the assistant says; write "
            "{% generation %} and {% endgeneration %} around it, or give prompt and completion"
        )
    return {"input_ids": found["input_ids"], "completion_mask": found["assistant_masks"]}


def _completion(
    prompt: Any, completion: Any, tokenizer: PreTrainedTokenizerBase, options: MaskedDiffusionConfig
) -> dict[str, list[int]]:
    """Tokenize a prompt and a completion, both texts or both messages."""
    if isinstance(prompt, str) and isinstance(completion, str):
        before = _ids(prompt, tokenizer)
        ids = [*before, *_ids(completion, tokenizer), tokenizer.eos_token_id]
    elif isinstance(prompt, list) and isinstance(completion, list):
        _need_template(tokenizer)
        before = _of_messages(prompt, tokenizer, asks=True)
        ids = _of_messages([*prompt, *completion], tokenizer)
        if ids[: len(before)] != before:
            raise ValueError(
                "the chat template lays out a prompt in another way once its answer is given; give "
                "prompt and completion as texts, or mend the template"
            )
    else:
        raise ValueError(
            f"prompt is a {type(prompt).__name__} and completion a {type(completion).__name__}; "
            "give two texts, or two lists of messages"
        )
    if options.completion_only_loss is False:
        return {"input_ids": ids}
    return {"input_ids": ids, "completion_mask": [0] * len(before) + [1] * (len(ids) - len(before))}


def _ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokenize what somebody wrote; names of special tokens in it are letters."""
    return list(tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True))


def _of_messages(
    messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, *, asks: bool = False
) -> list[int]:
    found = tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=True, add_generation_prompt=asks
    )
    return list(found["input_ids"])


def _need_template(tokenizer: PreTrainedTokenizerBase) -> None:
    if tokenizer.chat_template is None:
        raise ValueError(
            "messages need a chat template, which the text tokenizer has not; set "
            "tokenizer.chat_template, or give prompt and completion as texts"
        )


def _prepared(
    data: Any, tokenizer: PreTrainedTokenizerBase | None, options: MaskedDiffusionConfig
) -> Any:
    """Tokenize a data set of `datasets`; anything else has to be tokenized already."""
    columns = getattr(data, "column_names", None)
    if not isinstance(columns, list):
        first = data[0] if hasattr(data, "__getitem__") and len(data) else {}
        if isinstance(first, Mapping) and first and "input_ids" not in first:
            return [tokenized(one, _need_tokenizer(tokenizer), options) for one in data]
        return data
    if "input_ids" in columns:
        return data
    known = _need_tokenizer(tokenizer)
    more: dict[str, Any] = {}
    if not hasattr(data, "n_shards") or hasattr(data, "num_rows"):
        more = {"num_proc": options.dataset_num_proc, "desc": "Tokenize"}
    return data.map(
        tokenized,
        fn_kwargs={"tokenizer": known, "options": options},
        remove_columns=columns,
        **more,
    )


def _need_tokenizer(tokenizer: PreTrainedTokenizerBase | None) -> PreTrainedTokenizerBase:
    if tokenizer is None:
        raise ValueError("the data set is not tokenized; give a tokenizer: processing_class=")
    return tokenizer
