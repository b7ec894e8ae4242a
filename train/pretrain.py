"""Pretrain one denoiser on text -> image, image -> text and text, mixed in every batch.

`python -m train.pretrain --config configs/pretrain/emoji.yaml`, on several GPUs under
`accelerate launch -m`. Start it again after a kill and it continues.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from data_pipelines.jobs.sole_writer import sole_writer
from mmdlm.cli.recipe import run
from mmdlm.cli.settings import checked
from mmdlm.core.losses.objective import Objective
from train.checkpoints.carried import defaults_of, generation_of, with_chat_template
from train.loop import fit, launched
from train.saving import finish, setup_of
from train.stages.annealing import AttentionAnnealing
from train.stages.denoising import (
    Coefficients,
    Data,
    DenoisingStage,
    load_batches,
    prompt_template_for_denoiser,
    read_sources,
    words_for,
)
from train.stages.model_config import ModelConfig
from train.stages.model_shape import Shape
from train.stages.row_lengths import settle
from train.stages.samples import OnSample, SampleSheet, first_captions
from train.stages.start import make_trainable, start_model
from train.trained_tasks import record_tasks
from train.training_config import TrainingConfig


@sole_writer
def main(
    out: Path,
    data: Data,
    objective: Objective,
    *,
    model: ModelConfig = ModelConfig(),
    coefficients: Coefficients = Coefficients(),
    annealing: AttentionAnnealing | None = None,
    training: TrainingConfig = TrainingConfig(),
    prompts: list[str] | None = None,
    captions: int = 8,
    on_sample: OnSample | None = None,
    generation_config: dict[str, Any] | None = None,
    threads: int | None = None,
) -> None:
    """Train, and write the averaged weights with all that they need to `out`/final.

    Args:
        out: Folder of checkpoints, log and samples; a run found there is continued.
        data: What to train on.
        objective: Forward process, losses and times.
        model: What to start from, or the shape of a new model (default: `Shape()`); its tokenizers
            and its vision adapter.
        coefficients: Weight of each modality.
        annealing: How attention turns from causal to bidirectional, for weights of an
            autoregressive model; by default it is bidirectional at once.
        training: Steps, optimizer, checkpoints.
        prompts: What to draw (and caption back) on every sample sheet.
        captions: Images of each source that a model which sees captions on every sample sheet.
        on_sample: Called with the step and the model every `sample_steps` steps, and with step 0
            before the first, in place of writing a sheet; a function by its import path.
        generation_config: Steps, guidance, temperatures and order of each task, used by sample
            sheets and stored with the final weights (generation_config.json). What is not given is
            as in the model to start from; texts are written from left to right.
        threads: CPU threads; all by default.
    """
    told = checked(locals())
    for name in ("prompts", "captions"):  # of sheets, which change nothing
        told.pop(name)
    if threads:
        torch.set_num_threads(threads)
    if model.start_from is None and model.shape is None:
        told["model"] = model = replace(model, shape=Shape())
    model.check("train.pretrain", without=("lora", "quantization"))
    state = launched()
    started = start_model(model, seed=training.seed, device=state.device, needs_images=True)
    denoiser, images = started.denoiser, started.images
    denoiser.config.full_vocabulary = objective.full_vocabulary
    make_trainable(denoiser, model, seed=training.seed)

    prompt_template = prompt_template_for_denoiser(denoiser)
    text_tokenizer = with_chat_template(started.text_tokenizer, prompt_template, data.sources)
    prompts = prompts if images is not None else None
    data, shape, said = settle(
        data,
        model.shape,
        denoiser,
        text_tokenizer,
        images,
        prompt_template,
        prompts=prompts or (),
    )
    told["data"], told["model"] = data, replace(model, shape=shape)
    if said and state.is_main_process:
        print(said)
    known = words_for(denoiser, text_tokenizer, images)
    generation = generation_of(prompt_template, started.folder, generation_config)
    sources = read_sources(data, denoiser, known, prompt_template)
    if state.is_main_process:
        record_tasks(
            denoiser,
            prompt_template,
            text_tokenizer,
            data.sources,
            is_new=started.folder is None,
        )
    loader = load_batches(data, sources, known, seed=training.seed, process=state)
    shown = first_captions(data.sources, captions if training.sample_steps else 0)
    sheet = None
    if prompts or shown or on_sample:
        sheet = SampleSheet(
            denoiser,
            text_tokenizer,
            images,
            out / "samples",
            prompt_template=prompt_template,
            defaults=defaults_of(prompt_template, generation),
            prompts=prompts or (),
            shown=shown,
            on_sample=on_sample,
        )
    stage = DenoisingStage(
        denoiser, objective, coefficients, annealing=annealing, parts=model.parts
    )
    setup = setup_of(
        denoiser,
        text_tokenizer,
        started.image_tokenizer,
        generation=generation,
        base=None if started.folder is None else (str(model.start_from), started.folder),
    )
    trained = fit(
        stage, loader, settings=training, out=out, told=told, on_sample=sheet, setup=setup
    )
    if state.is_main_process:
        finish(
            denoiser,
            trained,
            text_tokenizer,
            started.image_tokenizer,
            out,
            dtype=model.save_dtype,
            generation=generation,
        )


if __name__ == "__main__":
    run(main)
