"""Fine-tune a model on conversations, with images or without, so that it answers.

`python -m train.sft --config configs/sft/llada_s1k.yaml`, on several GPUs under
`accelerate launch -m`. Start it again after a kill and it continues.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from data_pipelines.jobs.sole_writer import sole_writer
from mmdlm.cli.recipe import run
from mmdlm.cli.settings import checked
from mmdlm.core.losses.objective import Objective
from mmdlm.models.auto import PretrainedDenoiser
from mmdlm.pipeline.loading import find_checkpoint, load_text_tokenizer
from mmdlm.templates.prompt_template import PromptTemplate
from mmdlm.vision.encoders.adapter import VisionConfig
from mmdlm.vision.tokenizers.auto import load_image_tokenizer
from train.checkpoints.carried import generation_of, with_chat_template
from train.loop import TrainingConfig, fit, launched
from train.quantized import FrozenBase, check_adapter_is_all, check_base
from train.saving import finish, setup_of
from train.stages.denoising import (
    Attention,
    Coefficients,
    Data,
    DenoisingStage,
    Dtype,
    Recompute,
    add_vision_adapter,
    image_tokenizer_of,
    learn_in_float32,
    load_batches,
    prompt_template_for_denoiser,
    read_sources,
    recompute_layers,
    start,
    words_for,
)
from train.stages.examples import show_examples
from train.stages.low_rank import LowRank
from train.stages.model_shape import USUAL_POSITIONS, Shape
from train.stages.param_groups import Parts
from train.trained_tasks import record_tasks


@sole_writer
def main(
    out: Path,
    data: Data,
    objective: Objective,
    *,
    start_from: str | None = None,
    model: Shape | None = None,
    text_tokenizer: Path | None = None,
    image_tokenizer: Path | None = None,
    prompt_template: PromptTemplate | None = None,
    vision: VisionConfig | None = None,
    tower_weights: Path | None = None,
    parts: Parts = Parts(),
    lora: LowRank | None = None,
    quantization: str | None = None,
    coefficients: Coefficients = Coefficients(),
    training: TrainingConfig = TrainingConfig(ema=0.0),
    examples: int = 2,
    generation_config: dict[str, Any] | None = None,
    attention: Attention = "sdpa",
    recompute: Recompute = False,
    dtype: Literal["float32", "bfloat16"] = "float32",
    save_dtype: Dtype = "float32",
    threads: int | None = None,
) -> None:
    """Train, and write the weights with all that they need to `out`/final.

    Args:
        out: Folder of checkpoints, log and examples; a run found there is continued.
        data: What to train on; `data_pipelines.sources.conversations.Conversation` reads
            conversations.
        objective: Forward process, losses and times.
        start_from: Model to start from: a folder, a bundled name, or OWNER/NAME of the Hugging Face
            Hub; ours or of a published family.
        model: Shape of a new Transformer, in place of `start_from`: a small task can be learnt from
            nothing. It needs `text_tokenizer`.
        text_tokenizer: Folder of the text tokenizer; by default the model's own.
        image_tokenizer: Folder of the tokenizer that made the codes of images, to be kept with
            the weights; by default the model's own.
        prompt_template: How conversations are laid out; by default as the model's family does,
            which is how
            the trained model will be asked.
        vision: Adapter through which the model sees, where it did not see yet.
        tower_weights: Folder of transformers' SigLIP or of an open_clip model, for the tower of
            `vision`; by default its weights are random.
        parts: Which parts of a model that sees stay frozen, and the learning rates of others.
        lora: Train matrices of low rank in place of the denoiser's weights; they are written alone
            to `out`/adapter, and added to the weights in `out`/final.
        quantization: Hold the weights beside `lora` in fewer bits while it learns: 4bit or 8bit by
            bitsandbytes, int8 or float8 by torchao. `out`/adapter is then all that is written.
        coefficients: Weight of each modality.
        training: Steps, optimizer, checkpoints.
        examples: Documents of each source that are shown before training starts, with what of them
            is learnt; also in `out`/examples.txt.
        generation_config: Steps, guidance, temperatures and order of each task that the final
            weights carry
            (generation_config.json); what is not given is as in the model started from, or, for a
            family
            of published models, as the family has it.
        attention: Kernel; flex_attention for packed rows on a GPU.
        recompute: Keep the input of each layer alone for the backward pass (gradient
            checkpointing): less memory, a third more time. "selective" keeps what matrix products
            and attention gave, too: less is saved, and hardly any time is lost.
        dtype: Of the weights that stay frozen; those that learn are float32.
        save_dtype: Of the final weights.
        threads: CPU threads; all by default.
    """
    told = checked(locals())
    if threads:
        torch.set_num_threads(threads)
    check_base(
        quantization,
        starts=start_from is not None,
        adapts=lora is not None,
        sees=vision is not None,
    )
    state = launched()
    if (start_from is None) == (model is None):
        raise ValueError("give start_from, a model to start from, or model, the shape of a new one")
    folder = None if start_from is None else find_checkpoint(start_from)
    words_of = text_tokenizer or folder
    if words_of is None:
        raise ValueError("a new model has no text_tokenizer of its own; name the folder of one")
    words = load_text_tokenizer(words_of)
    image_tokenizer = image_tokenizer_of(folder, image_tokenizer)
    images = load_image_tokenizer(image_tokenizer) if image_tokenizer else None
    denoiser: PretrainedDenoiser
    if model is not None:
        if model.max_position_embeddings is None:
            positions = max(USUAL_POSITIONS, data.length or 0)
            told["model"] = model = replace(model, max_position_embeddings=positions)
        denoiser = model.build(words, images, seed=training.seed, attention=attention)
    else:
        assert folder is not None  # one of the two was given
        denoiser = start(
            folder,
            words,
            images,
            attention=attention,
            dtype=getattr(torch, dtype),
            needs_images=False,
            base=None if lora is None else FrozenBase(quantization, state.device),
        )
    denoiser.config.full_vocabulary = objective.full_vocabulary
    if vision is not None:
        add_vision_adapter(denoiser, vision, tower_weights, seed=training.seed)
    elif tower_weights is not None:
        raise ValueError(f"tower_weights {tower_weights}: there is no `vision` that they are for")
    parts.freeze(denoiser)
    adapted = None
    if lora is not None:
        if start_from is None:
            raise ValueError("lora adds to weights that stay as they are; a new model has none yet")
        if "denoiser" in parts.frozen:
            raise ValueError("lora trains the denoiser, which parts.frozen names; leave one out")
        adapted = lora.onto(denoiser, seed=training.seed)
        check_adapter_is_all(adapted, denoiser)
    learn_in_float32(denoiser)
    recompute_layers(denoiser, recompute)

    prompt_template = prompt_template or prompt_template_for_denoiser(denoiser)
    generation = generation_of(prompt_template, folder, generation_config)
    if state.is_main_process:
        record_tasks(denoiser, prompt_template, words, data.sources, is_new=folder is None)
    words = with_chat_template(words, prompt_template, data.sources)
    known = words_for(denoiser, words, images)
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
    stage = DenoisingStage(denoiser, objective, coefficients, parts=parts)
    setup = setup_of(
        denoiser,
        words,
        image_tokenizer,
        generation=generation,
        adapted=adapted,
        base=None if folder is None else (str(start_from), folder),
    )
    trained = fit(stage, loader, settings=training, out=out, told=told, setup=setup)
    if not state.is_main_process:
        return
    finish(
        denoiser,
        trained,
        words,
        image_tokenizer,
        out,
        adapted=adapted,
        base=start_from or "",
        dtype=save_dtype,
        generation=generation,
    )


if __name__ == "__main__":
    run(main)
