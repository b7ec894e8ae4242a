"""Pretrain one denoiser on text -> image, image -> text and text, mixed in every batch.

`python -m train.pretrain --config configs/pretrain/emoji.yaml`, on several GPUs under
`accelerate launch -m`. Start it again after a kill and it continues.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from data_pipelines.jobs.sole_writer import sole_writer
from mmdlm.cli.recipe import run
from mmdlm.cli.settings import checked
from mmdlm.core.losses.objective import Objective
from mmdlm.models.checkpoints.run_steps import find_in_run
from mmdlm.vision.encoders.adapter import VisionConfig
from mmdlm.vision.tokenizers.auto import load_image_tokenizer
from train.checkpoints.carried import defaults_of, generation_of
from train.loop import TrainingConfig, fit, launched
from train.saving import finish, setup_of
from train.stages.annealing import AttentionAnnealing
from train.stages.denoising import (
    Attention,
    Coefficients,
    Data,
    DenoisingStage,
    Dtype,
    Recompute,
    add_vision_adapter,
    load_batches,
    prompt_template_for_denoiser,
    read_sources,
    recompute_layers,
    start,
    words_for,
)
from train.stages.model_shape import Shape
from train.stages.param_groups import Parts
from train.stages.row_lengths import settle
from train.stages.samples import OnSample, SampleSheet, first_captions
from train.trained_tasks import record_tasks


@sole_writer
def main(
    out: Path,
    data: Data,
    text_tokenizer: Path,
    objective: Objective,
    *,
    image_tokenizer: Path | None = None,
    start_from: Path | None = None,
    model: Shape = Shape(),
    vision: VisionConfig | None = None,
    tower_weights: Path | None = None,
    parts: Parts = Parts(),
    coefficients: Coefficients = Coefficients(),
    annealing: AttentionAnnealing | None = None,
    training: TrainingConfig = TrainingConfig(),
    prompts: list[str] | None = None,
    captions: int = 8,
    on_sample: OnSample | None = None,
    generation_config: dict[str, Any] | None = None,
    attention: Attention = "sdpa",
    recompute: Recompute = False,
    save_dtype: Dtype = "float32",
    threads: int | None = None,
) -> None:
    """Train, and write the averaged weights with all that they need to `out`/final.

    Args:
        out: Folder of checkpoints, log and samples; a run found there is continued.
        data: What to train on.
        text_tokenizer: Folder of a transformers tokenizer with an end-of-text token.
        objective: Forward process, losses and times.
        image_tokenizer: Folder of the tokenizer that made the codes; none for text alone.
        start_from: Checkpoint to start from, in place of `model` and random weights; ours, a run or
            a step of one, of a published family, or what `mmdlm convert` made of an autoregressive
            model or an encoder.
        model: Shape of a new Transformer.
        vision: Adapter through which a new model sees, or one to start from that did not see yet.
        tower_weights: Folder of transformers' SigLIP or of an open_clip model, for the tower of
            `vision`; by default its weights are random.
        parts: Which parts of a model that sees stay frozen, and the learning rates of others.
        coefficients: Weight of each modality.
        annealing: How attention turns from causal to bidirectional, for weights of an
            autoregressive model; by default it is bidirectional at once.
        training: Steps, optimizer, checkpoints.
        prompts: What to draw (and caption back) on every sample sheet.
        captions: Images of each source that a model which sees captions on every sample sheet.
        on_sample: Called with the step and the model every `sample_steps` steps, and with step 0
            before the first, in place of writing a sheet; a function by its import path.
        generation_config: Steps, guidance, temperatures and order of each task that sample sheets
            use and
            the final weights carry (generation_config.json); what is not given is as in the model
            started
            from, and texts are written from left to right.
        attention: Kernel; flex_attention for packed rows on a GPU.
        recompute: Keep the input of each layer alone for the backward pass (gradient
            checkpointing): less memory, a third more time. "selective" keeps what matrix products
            and attention gave, too: less is saved, and hardly any time is lost.
        save_dtype: Of the final weights.
        threads: CPU threads; all by default.
    """
    told = checked(locals())
    for name in ("prompts", "captions"):  # of sheets, which change nothing
        told.pop(name)
    if threads:
        torch.set_num_threads(threads)
    state = launched()
    if not (text_tokenizer / "tokenizer.json").is_file():
        raise ValueError(
            f"text_tokenizer {text_tokenizer}: no tokenizer.json there; correct the path, or train "
            "one with data_pipelines.text_tokenizer"
        )
    words = PreTrainedTokenizerFast.from_pretrained(text_tokenizer)
    images = load_image_tokenizer(image_tokenizer) if image_tokenizer else None
    if start_from is not None:
        start_from = find_in_run(start_from) or start_from
        denoiser = start(start_from, words, images, attention=attention)
    else:
        denoiser = model.build(words, images, seed=training.seed, attention=attention)
    denoiser.config.full_vocabulary = objective.full_vocabulary
    if vision is not None:
        add_vision_adapter(denoiser, vision, tower_weights, seed=training.seed)
    elif tower_weights is not None:
        raise ValueError(f"tower_weights {tower_weights}: there is no `vision` that they are for")
    parts.freeze(denoiser)
    recompute_layers(denoiser, recompute)

    prompt_template = prompt_template_for_denoiser(denoiser)
    prompts = prompts if images is not None else None
    shape = model if start_from is None else None
    data, shape, said = settle(
        data, shape, denoiser, words, images, prompt_template, prompts=prompts or ()
    )
    told["data"] = data
    if shape is None:
        told.pop("model")  # it has no part in the run
    else:
        told["model"] = shape
    if said and state.is_main_process:
        print(said)
    known = words_for(denoiser, words, images)
    generation = generation_of(prompt_template, start_from, generation_config)
    sources = read_sources(data, denoiser, known, prompt_template)
    if state.is_main_process:
        record_tasks(denoiser, prompt_template, words, data.sources, is_new=start_from is None)
    loader = load_batches(data, sources, known, seed=training.seed, process=state)
    shown = first_captions(data.sources, captions if training.sample_steps else 0)
    sheet = None
    if prompts or shown or on_sample:
        sheet = SampleSheet(
            denoiser,
            words,
            images,
            out / "samples",
            prompt_template=prompt_template,
            defaults=defaults_of(prompt_template, generation),
            prompts=prompts or (),
            shown=shown,
            on_sample=on_sample,
        )
    stage = DenoisingStage(denoiser, objective, coefficients, annealing=annealing, parts=parts)
    base = None if start_from is None else (str(start_from), start_from)
    setup = setup_of(denoiser, words, image_tokenizer, generation=generation, base=base)
    trained = fit(
        stage, loader, settings=training, out=out, told=told, on_sample=sheet, setup=setup
    )
    if state.is_main_process:
        finish(
            denoiser,
            trained,
            words,
            image_tokenizer,
            out,
            dtype=save_dtype,
            generation=generation,
        )


if __name__ == "__main__":
    run(main)
