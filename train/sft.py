"""Fine-tune a model on conversations, with images or without, so that it answers.

`python -m train.sft --config configs/sft/llada_s1k.yaml`, on several GPUs under
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
from mmdlm.templates.prompt_template import PromptTemplate
from train.checkpoints.carried import generation_of, with_chat_template
from train.loop import fit, launched
from train.saving import finish, setup_of
from train.stages.denoising import (
    Coefficients,
    Data,
    DenoisingStage,
    load_batches,
    prompt_template_for_denoiser,
    read_sources,
    words_for,
)
from train.stages.examples import show_examples
from train.stages.model_config import ModelConfig
from train.stages.model_shape import USUAL_POSITIONS
from train.stages.start import make_trainable, start_model
from train.trained_tasks import record_tasks
from train.training_config import TrainingConfig


@sole_writer
def main(
    out: Path,
    data: Data,
    objective: Objective,
    model: ModelConfig,
    *,
    prompt_template: PromptTemplate | None = None,
    coefficients: Coefficients = Coefficients(),
    training: TrainingConfig = TrainingConfig(ema=0.0),
    examples: int = 2,
    generation_config: dict[str, Any] | None = None,
    threads: int | None = None,
) -> None:
    """Train, and write the weights with all that they need to `out`/final.

    Args:
        out: Folder of checkpoints, log and examples; a run found there is continued.
        data: What to train on; `data_pipelines.sources.conversations.Conversation` reads
            conversations.
        objective: Forward process, losses and times.
        model: What to start from, or the shape of a new model (a small task can be learned from
            nothing); its tokenizers, its vision adapter, and LoRA.
        prompt_template: How conversations become tokens; default: the template of the model's
            family, which is how the trained model will be asked.
        coefficients: Weight of each modality.
        training: Steps, optimizer, checkpoints.
        examples: Documents of each source that are shown before training starts, with what of them
            is learned; also in `out`/examples.txt.
        generation_config: Steps, guidance, temperatures and order of each task, stored with the
            final weights (generation_config.json). What is not given is as in the model to start
            from, or as a published family has it.
        threads: CPU threads; all by default.
    """
    told = checked(locals())
    if threads:
        torch.set_num_threads(threads)
    model.check("train.sft")
    if model.shape is not None and model.shape.max_position_embeddings is None:
        positions = max(USUAL_POSITIONS, data.length or 0)
        shape = replace(model.shape, max_position_embeddings=positions)
        told["model"] = model = replace(model, shape=shape)
    state = launched()
    started = start_model(model, seed=training.seed, device=state.device)
    denoiser = started.denoiser
    denoiser.config.full_vocabulary = objective.full_vocabulary
    adapted = make_trainable(denoiser, model, seed=training.seed)

    prompt_template = prompt_template or prompt_template_for_denoiser(denoiser)
    generation = generation_of(prompt_template, started.folder, generation_config)
    if state.is_main_process:
        record_tasks(
            denoiser,
            prompt_template,
            started.text_tokenizer,
            data.sources,
            is_new=started.folder is None,
        )
    text_tokenizer = with_chat_template(started.text_tokenizer, prompt_template, data.sources)
    known = words_for(denoiser, text_tokenizer, started.images)
    sources = read_sources(data, denoiser, known, prompt_template)
    loader = load_batches(data, sources, known, seed=training.seed, process=state)
    if state.is_main_process and examples:
        show_examples(
            sources,
            known,
            length=data.row_length,
            count=examples,
            max_broken=data.max_broken,
            folder=out,
        )
    stage = DenoisingStage(denoiser, objective, coefficients, parts=model.parts)
    setup = setup_of(
        denoiser,
        text_tokenizer,
        started.image_tokenizer,
        generation=generation,
        adapted=adapted,
        base=None if started.folder is None else (str(model.start_from), started.folder),
    )
    trained = fit(stage, loader, settings=training, out=out, told=told, setup=setup)
    if not state.is_main_process:
        return
    finish(
        denoiser,
        trained,
        text_tokenizer,
        started.image_tokenizer,
        out,
        adapted=adapted,
        base=model.start_from or "",
        dtype=model.save_dtype,
        generation=generation,
    )


if __name__ == "__main__":
    run(main)
