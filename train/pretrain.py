"""Pretrain one denoiser on text -> image, image -> text and text, mixed in every batch.

`python -m train.pretrain --config configs/pretrain/emoji.yaml`, on several GPUs under
`accelerate launch -m`. Start it again after a kill and it continues.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast

from data_pipelines.command_line import run
from data_pipelines.sole_writer import sole_writer
from mmdlm.core.objective import Objective
from mmdlm.decoding import Defaults
from mmdlm.vision.adapter import VisionConfig
from mmdlm.vision.image_tokenizer import load_image_tokenizer
from train.annealing import AttentionAnnealing
from train.denoising import (
    Attention,
    Coefficients,
    Data,
    DenoisingStage,
    Dtype,
    Recompute,
    finish,
    layout_for,
    load_batches,
    open_eyes,
    read_sources,
    recompute_layers,
    start,
    words_for,
)
from train.loop import FitSettings, fit, launched
from train.parts import Parts
from train.samples import OnSample, SampleSheet
from train.settings import checked
from train.shape import Shape


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
    fit_settings: FitSettings = FitSettings(),
    prompts: list[str] | None = None,
    on_sample: OnSample | None = None,
    decoding: Defaults | None = None,
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
        start_from: Checkpoint to start from, in place of `model` and random weights; ours, of a
            published family, or what `mmdlm convert` made of an autoregressive model or an encoder.
        model: Shape of a new Transformer.
        vision: Adapter through which a new model sees, or one to start from that did not see yet.
        tower_weights: Folder of transformers' SigLIP or of an open_clip model, for the tower of
            `vision`; by default its weights are random.
        parts: Which parts of a model that sees stay frozen, and the learning rates of others.
        coefficients: Weight of each modality.
        annealing: How attention turns from causal to bidirectional, for weights of an
            autoregressive model; by default it is bidirectional at once.
        fit_settings: Steps, optimizer, checkpoints.
        prompts: What to draw (and caption back) on every sample sheet.
        on_sample: Called with the step and the model every `sample_every` steps, in place of
            writing a sheet; a function by its import path.
        decoding: Steps, guidance and temperatures that the final weights carry; by default they
            carry none, and the library's own are used.
        attention: Kernel; flex_attention for packed rows on a GPU.
        recompute: Keep the input of each layer alone for the backward pass (gradient
            checkpointing): less memory, a third more time. "selective" keeps what matrix products
            and attention gave, too: less is saved, and hardly any time is lost.
        save_dtype: Of the final weights.
        threads: CPU threads; all by default.
    """
    told = checked(locals())
    told.pop("prompts")  # of sheets, which change nothing
    if threads:
        torch.set_num_threads(threads)
    if decoding is not None:
        decoding.to_json()  # what the final weights cannot carry is refused before the training
    state = launched()
    if not (text_tokenizer / "tokenizer.json").is_file():
        raise ValueError(
            f"text_tokenizer {text_tokenizer}: no tokenizer.json there; correct the path, or train "
            "one with data_pipelines.text_tokenizer"
        )
    words = PreTrainedTokenizerFast.from_pretrained(text_tokenizer)
    pictures = load_image_tokenizer(image_tokenizer) if image_tokenizer else None
    if start_from is not None:
        denoiser = start(start_from, words, pictures, attention=attention)
    else:
        denoiser = model.build(words, pictures, seed=fit_settings.seed, attention=attention)
    denoiser.config.full_vocabulary = objective.full_vocabulary
    if vision is not None:
        open_eyes(denoiser, vision, tower_weights, seed=fit_settings.seed)
    elif tower_weights is not None:
        raise ValueError(f"tower_weights {tower_weights}: there is no `vision` that they are for")
    parts.freeze(denoiser)
    recompute_layers(denoiser, recompute)

    known = words_for(denoiser, words, pictures)
    sources = read_sources(data, denoiser, known, layout_for(denoiser))
    loader = load_batches(data, sources, known, seed=fit_settings.seed, process=state)
    sheet = None
    if pictures is not None and (prompts or on_sample):
        sheet = SampleSheet(
            denoiser,
            words,
            pictures,
            prompts or [],
            out / "samples",
            defaults=decoding or Defaults(),
            on_sample=on_sample,
        )
    stage = DenoisingStage(denoiser, objective, coefficients, annealing=annealing, parts=parts)
    trained = fit(stage, loader, settings=fit_settings, out=out, told=told, on_sample=sheet)
    if state.is_main_process:
        finish(
            denoiser,
            trained,
            words,
            image_tokenizer,
            out,
            dtype=save_dtype,
            decoding=decoding,
        )


if __name__ == "__main__":
    run(main)
