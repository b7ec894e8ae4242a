"""Learn from pairs of answers, one preferred to the other: VRPO, LLaDA 1.5's DPO on bounds.

`python -m train.preference --config configs/rl/vrpo.yaml`, on several GPUs under
`accelerate launch -m`. Start it again after a kill and it continues.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate.utils import gather_object
from einops import rearrange
from torch import Tensor

from data_pipelines.jobs.sole_writer import sole_writer
from data_pipelines.shards.workers import Loader
from data_pipelines.sources.preferences import Preference
from data_pipelines.sources.source import Source
from mmdlm.cli.recipe import run
from mmdlm.cli.settings import checked
from mmdlm.core.likelihood.base import LikelihoodEstimator
from mmdlm.core.likelihood.elbo import Elbo
from mmdlm.core.likelihood.noisy_view import NoisyView
from mmdlm.core.sequence import Batch
from mmdlm.models.auto import PretrainedDenoiser
from mmdlm.models.compilation import compile_layers
from mmdlm.rl.preference import Answers, PreferenceLoss, Vrpo
from mmdlm.rl.statistics import Statistics
from train.checkpoints.carried import generation_of, with_chat_template
from train.loop import fit, launched
from train.rollouts.reference import Reference
from train.saving import finish, setup_of
from train.stages.denoising import (
    Data,
    load_batches,
    load_of,
    prompt_template_for_denoiser,
    read_sources,
    words_for,
)
from train.stages.examples import show_examples
from train.stages.low_rank import LowRank
from train.stages.meter import Load
from train.stages.model_config import OF_NEW_PARTS, ModelConfig
from train.stages.stage import Stage
from train.stages.start import make_trainable, start_model
from train.trained_tasks import record_tasks
from train.training_config import TrainingConfig


class PreferenceStage(Stage):
    """Policy and reference score both answers of each pair, at the same noise.

    Documents of a row come in twos, the chosen answer first. Each document has times and masks of
    its own, which the policy and the reference share.
    """

    def __init__(
        self,
        denoiser: PretrainedDenoiser,
        reference: Reference,
        estimator: LikelihoodEstimator,
        loss: PreferenceLoss,
        loader: Loader,
    ) -> None:
        super().__init__()
        self.denoiser, self.reference = denoiser, reference
        self.estimator, self.loss, self.loader = estimator, loss, loader
        self.coefficients = loss.coefficients
        self.seen = Statistics()
        self._no_split_modules = denoiser._no_split_modules  # what accelerate shards apart

    def begin(self, step: int) -> None:
        """Statistics are of one step."""
        self.seen = Statistics()

    def draw(self, batch: Batch, *, generator: torch.Generator) -> tuple[NoisyView, ...]:
        """Draw the noisy views of a batch."""
        (views,) = self.estimator.draw(batch, self.denoiser.vocabulary, generator=generator)
        return views

    def counts(self, batch: Batch, noise: tuple[NoisyView, ...]) -> dict[str, Tensor]:
        """Pairs, for each term."""
        return dict.fromkeys(self.coefficients, ((batch.document.amax(1) + 1) // 2).sum())

    def forward(self, batch: Batch, noise: tuple[NoisyView, ...]) -> dict[str, Tensor]:
        """Return the sum of each term of the loss, over what `counts` counts."""
        batch = self.denoiser.see(batch)
        policy = self.estimator.log_prob(self.denoiser, batch, noise)
        with torch.no_grad(), self.reference.of(self.denoiser) as other:
            reference = self.estimator.log_prob(other, batch, noise)
        terms = self.loss(*answers(batch, policy, reference))
        parts = terms.statistics.parts
        self.seen += Statistics(*({name: v.cpu() for name, v in part.items()} for part in parts))
        return terms.sums

    def load(self, batch: Batch, noise: tuple[NoisyView, ...]) -> Load:
        """Of the policy's passes; the time is that of the reference's as well."""
        return load_of(self.denoiser, batch, torch.cat([view.covered for view in noise]))

    def statistics(self) -> dict[str, float]:
        """TRL's keys, over all processes, and the pairs that were skipped so far."""
        skipped = sum(source["broken"] for source in self.loader.stats())
        every = gather_object([(self.seen, skipped)])
        total = sum((seen for seen, _ in every), Statistics())
        return {**total.values(), "pairs/skipped": sum(skipped for _, skipped in every)}

    def compile_layers(self) -> None:
        """One compiled layer serves the whole depth."""
        compile_layers(self.denoiser)


def answers(batch: Batch, policy: Tensor, reference: Tensor) -> tuple[Answers, Answers]:
    """Log-probabilities [B, L] token by token -> those of the N chosen and N rejected answers."""
    document = batch.document.clamp_min(0)
    count = int(batch.document.max()) + 1
    assert count % 2 == 0, "documents of pairs come in twos"

    def summed(values: Tensor) -> Tensor:
        """Sum values over the pairs of each row: [B, L] -> [2, B, pairs of a row]."""
        of_documents = values.new_zeros(len(values), count).scatter_add(1, document, values)
        return rearrange(of_documents, "b (pair side) -> side b pair", side=2)

    tokens = summed(batch.target.long())
    there = tokens[0] > 0  # rows may have fewer pairs than the fullest
    of_policy, of_reference = summed(policy), summed(reference)
    chosen, rejected = (
        Answers(of_policy[side][there], of_reference[side][there], tokens[side][there])
        for side in (0, 1)
    )
    return chosen, rejected


@sole_writer
def main(
    out: Path,
    model: ModelConfig,
    data: Data,
    *,
    estimator: LikelihoodEstimator = Elbo(repeats=8, strata=1),
    loss: PreferenceLoss = Vrpo(),
    training: TrainingConfig = TrainingConfig(ema=0.0),
    examples: int = 2,
    threads: int | None = None,
) -> None:
    """Train, and write the weights with all that they need to `out`/final.

    Args:
        out: Folder of checkpoints, log and examples; a run found there is continued.
        model: What to start from, which is the reference as well, its tokenizers, and LoRA: the
            reference is then the model without the adapter, where otherwise a copy in float32 is
            kept.
        data: Pairs of answers, read by `data_pipelines.sources.preferences.Preference`. A row of
            `length`
            holds both answers of a pair, each with its prompt, or several pairs where it is packed.
        estimator: How likely a model holds an answer, and at which noise; by default eight times
            with a mask each.
        loss: Of the pairs.
        training: Steps, optimizer, checkpoints.
        examples: Pairs of each source that are shown before training starts, with what of them is
            learned; also in `out`/examples.txt.
        threads: CPU threads; all by default.
    """
    told = checked(locals())
    if threads:
        torch.set_num_threads(threads)
    model.check("train.preference", without=OF_NEW_PARTS)
    _check(data.sources, model.lora)
    state = launched()
    started = start_model(model, seed=training.seed, device=state.device)
    denoiser = started.denoiser
    # Policy and reference look at the same features.
    adapted = make_trainable(denoiser, model, seed=training.seed, train_vision=False)
    reference = Reference(denoiser, adapted=adapted is not None, needed=True)
    if reference.copy is not None:
        reference.copy.to(state.device)  # `fit` moves only the policy

    prompt_template = prompt_template_for_denoiser(denoiser)
    generation = generation_of(prompt_template, started.folder, None)
    if state.is_main_process:
        record_tasks(denoiser, prompt_template, started.text_tokenizer, data.sources, is_new=False)
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
    stage = PreferenceStage(denoiser, reference, estimator, loss, loader)
    base = None if started.folder is None else (str(model.start_from), started.folder)
    setup = setup_of(
        denoiser,
        text_tokenizer,
        started.image_tokenizer,
        generation=generation,
        adapted=adapted,
        base=base,
    )
    trained = fit(stage, loader, settings=training, out=out, told=told, setup=setup)
    if state.is_main_process:
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


def _check(sources: Sequence[Source], lora: LowRank | None) -> None:
    """Raise ValueError for sources without pairs, and for noise that is not shared."""
    for source in sources:
        if not isinstance(source.to_sequence, Preference):
            raise ValueError(
                f"{source.urls}: {type(source.to_sequence).__name__} makes no pairs of answers; "
                "take data_pipelines.sources.preferences.Preference"
            )
    if lora is not None and lora.dropout:
        raise ValueError(
            f"lora: dropout is {lora.dropout}; the policy would differ from its reference by "
            "noise, so set it to 0"
        )


if __name__ == "__main__":
    run(main)
