"""Reinforcement learning of texts and images: sample, reward, learn.

`python -m train.rl --config configs/rl/smoke.yaml`, on several GPUs under `accelerate launch -m`.
Start it again after a kill and it continues, rollouts in flight included.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object, parse_flag_from_env
from torch import Tensor

from data_pipelines.jobs.sole_writer import sole_writer
from data_pipelines.room import check_batch
from mmdlm.cli.recipe import run
from mmdlm.cli.settings import checked
from mmdlm.core.likelihood.base import LikelihoodEstimator
from mmdlm.models.auto import PretrainedDenoiser
from mmdlm.models.checkpoints.run_steps import parts_of
from mmdlm.models.compilation import compile_layers
from mmdlm.models.costs import Costs
from mmdlm.models.modeling import MmdlmForMaskedDiffusion
from mmdlm.pipeline.model import Model
from mmdlm.pipeline.task_defaults import GENERATION, Defaults
from mmdlm.rl.policy_loss import PolicyLoss
from mmdlm.rl.statistics import Statistics
from train.loop import fit, launched
from train.rollouts.answering import Answering
from train.rollouts.completions import CompletionsTable
from train.rollouts.gallery import Shown
from train.rollouts.loader import Rollouts
from train.rollouts.prompts import Prompts
from train.rollouts.reference import Reference
from train.rollouts.rollout_batch import RolloutBatch
from train.rollouts.settings import Budget, Plan, RewardConfig
from train.rollouts.statistics import logged
from train.saving import finish, setup_of
from train.stages.denoising import (
    dropout,
    dropout_seed,
    load_of,
    prompt_template_for_denoiser,
)
from train.stages.meter import Load
from train.stages.model_config import OF_NEW_PARTS, ModelConfig
from train.stages.stage import Stage
from train.stages.start import StartedModel, make_trainable, start_model
from train.training_config import TrainingConfig, precision


class PolicyStage(Stage):
    """The policy's scores of what it did, under a policy loss."""

    def __init__(
        self,
        denoiser: PretrainedDenoiser,
        estimator: LikelihoodEstimator,
        loss: PolicyLoss,
        rollouts: Rollouts,
        *,
        log_entropy: bool = True,
    ) -> None:
        super().__init__()
        self.denoiser, self.estimator, self.loss = denoiser, estimator, loss
        self.rollouts, self.log_entropy = rollouts, log_entropy
        self.coefficients = loss.coefficients
        self.seen = Statistics()

    def begin(self, step: int) -> None:
        """Statistics are of one step."""
        self.seen = Statistics()

    def draw(self, batch: RolloutBatch, *, generator: torch.Generator) -> int | None:
        """Draw the seed of dropout; the noisy views came with the rollouts."""
        self.seen = self.seen + batch.statistics
        return dropout_seed(self.denoiser, generator=generator)

    def counts(self, batch: RolloutBatch, noise: int | None) -> dict[str, Tensor]:
        """As the loss's normalization says."""
        return self.loss.counts(batch.scored_views.views)

    def forward(self, batch: RolloutBatch, noise: int | None) -> dict[str, Tensor]:
        """Return the sum of each term of the loss, over what `counts` counts.

        Rollouts and the scores of others know no dropout: where there is some, its noise is part of
        the ratio to the old policy, as it is in d1.
        """
        scored_views = batch.scored_views
        with dropout(noise, batch.batch.ids.device):
            scores = self.estimator.scores(
                self.denoiser,
                batch.batch,
                scored_views.views,
                entropy=self.log_entropy,
                undrawable=batch.undrawable,
            )
        terms = self.loss(
            scores, batch.advantage, old=scored_views.old, reference=scored_views.reference
        )
        parts = terms.statistics.parts
        statistics = Statistics(*({name: v.cpu() for name, v in part.items()} for part in parts))
        self.seen = self.seen + statistics
        return terms.sums

    def load(self, batch: RolloutBatch, noise: int | None) -> Load:
        """Of the policy's passes over what it did; the time is that of rollouts as well."""
        read = torch.cat([view.covered for view in batch.scored_views.views])
        return load_of(self.denoiser, batch.batch, read)

    def statistics(self) -> dict[str, float]:
        """TRL's keys, over all processes, and the shares of the time that rollouts took."""
        rollouts = self.rollouts
        tokens = (rollouts.read, rollouts.tokens)
        every = gather_object([(self.seen, tokens, set(rollouts.unfit), rollouts.shares())])
        seen, tokens_of, unfit, shares = zip(*every, strict=True)
        rolling, scoring = (sum(each) / len(every) for each in zip(*shares, strict=True))
        read, written = (sum(each) for each in zip(*tokens_of, strict=True))
        return {
            **logged(sum(seen, Statistics())),
            "num_tokens": read + written,
            "completions/num_tokens": written,
            "prompts/skipped": len(set().union(*unfit)),
            "rollout_share": round(rolling, 4),
            "scoring_share": round(scoring, 4),
        }

    @property
    def is_spent(self) -> bool:
        """The budget is used up."""
        return self.rollouts.spent

    def compile_layers(self) -> None:
        """One compiled layer serves the whole depth, in rollouts as well."""
        compile_layers(self.denoiser)


@sole_writer
def main(
    out: Path,
    model: ModelConfig,
    prompts: Prompts,
    answering: Answering,
    reward_config: RewardConfig,
    estimator: LikelihoodEstimator,
    loss: PolicyLoss,
    *,
    prompts_per_batch: int = 1,
    num_generations: int = 8,
    num_iterations: int = 1,
    budget: Budget = Budget(),
    max_broken: float = 0.1,
    gallery: Shown | None = None,
    training: TrainingConfig = TrainingConfig(ema=0.0),
    log_completions_every: int = 10,
    log_entropy: bool = True,
    threads: int | None = None,
) -> None:
    """Train, and write the weights with all that they need to `out`/final.

    Args:
        out: Folder of checkpoints, log and completions; a run found there is continued.
        model: What to start from, its tokenizers, and LoRA: the reference is then the model without
            the adapter.
        prompts: What the model is asked, with the columns that the rewards take.
        answering: `train.rollouts.answering.Write` or `Draw`: the task, how long an answer may be,
            and how
            it is sampled.
        reward_config: Rewards, advantage, and which groups are learned from.
        estimator: How likely the policy holds what it did, and at which noise.
        loss: Of the policy.
        prompts_per_batch: Prompts of a micro-batch; of those there are
            `training.gradient_accumulation_steps`
            a step and process.
        num_generations: Completions of each prompt.
        num_iterations: Steps of training on each set of rollouts; `training.max_steps` counts all.
        budget: Generated tokens and seconds that the run may cost.
        max_broken: Share of prompts that may be skipped since the model cannot be asked them; more
            stop the run, with the list.
        gallery: Images that rewards look for the nearest in.
        training: Steps, optimizer, checkpoints.
        log_completions_every: Sets of rollouts between tables of completions (`out`/completions); 0
            for none.
        log_entropy: Log the entropy of the policy, which costs a softmax more.
        threads: CPU threads; all by default.
    """
    told = checked(locals())
    if threads:
        torch.set_num_threads(threads)
    model.check("train.rl", without=OF_NEW_PARTS)
    if training.sample_steps:
        raise ValueError(
            "sample_steps draws sheets for pretraining; set it to 0: log_completions_every shows "
            "what a policy does"
        )
    if parse_flag_from_env("ACCELERATE_USE_FSDP"):
        raise ValueError("a policy samples with whole weights: launch without FSDP, with lora")
    state = launched()
    problems = prompts.problems()  # a file that cannot be read is found before a model is loaded
    started = start_model(model, seed=training.seed, device=state.device)
    denoiser = started.denoiser.to(state.device)
    policy = _policy(started, state)
    _check_room(policy, answering, rows=prompts_per_batch * num_generations)
    # Images are looked at once, before the rollouts.
    adapted = make_trainable(denoiser, model, seed=training.seed, train_vision=False)

    table = None
    if log_completions_every and state.is_main_process:
        table = CompletionsTable(
            out / "completions", every=log_completions_every, num_iterations=num_iterations
        )
    rollouts = Rollouts(
        policy,
        problems,
        answering,
        reward_config,
        estimator,
        loss,
        Plan(
            prompts=prompts_per_batch,
            num_generations=num_generations,
            gradient_accumulation_steps=training.gradient_accumulation_steps,
            num_iterations=num_iterations,
            process=state.process_index,
            of=state.num_processes,
        ),
        reference=Reference(denoiser, adapted=adapted is not None, needed=loss.needs_reference),
        seed=training.seed,
        context=_context(policy, gallery),
        table=table,
        budget=budget,
        max_broken=max_broken,
        precision=torch.autocast(
            state.device.type,
            dtype=torch.bfloat16,
            enabled=precision(training.mixed_precision) == "bf16",
        ),
    )
    stage = PolicyStage(denoiser, estimator, loss, rollouts, log_entropy=log_entropy)
    base = None if started.folder is None else (str(model.start_from), started.folder)
    setup = setup_of(
        denoiser,
        policy.text_tokenizer,
        started.image_tokenizer,
        generation=asdict(policy.defaults),
        adapted=adapted,
        base=base,
    )
    trained = fit(stage, rollouts, settings=training, out=out, told=told, setup=setup)
    if not state.is_main_process:
        return
    finish(
        denoiser,
        trained,
        policy.text_tokenizer,
        started.image_tokenizer,
        out,
        adapted=adapted,
        base=model.start_from or "",
        dtype=model.save_dtype,
        generation=asdict(policy.defaults),
    )


def _check_room(model: Model, answering: Answering, *, rows: int) -> None:
    """Raise ValueError for answers that the model, or rows that no memory has room for."""
    length = getattr(answering, "max_new_tokens", 1)
    model.check_new_tokens(length)
    states = 0
    if isinstance(model.denoiser, MmdlmForMaskedDiffusion):
        states = Costs(model.denoiser.config).states(rows * length) * 2
    check_batch(rows, length, states=states, device=model.device)


def _policy(started: StartedModel, state: PartialState) -> Model:
    """Return the policy as users would call it, on the device of this process."""
    assert started.folder is not None, "a policy is started from somewhere"
    denoiser, images = started.denoiser, started.images
    prompt_template = prompt_template_for_denoiser(denoiser, asked=True)
    return Model(
        denoiser,
        started.text_tokenizer,
        None if images is None else images.to(state.device),
        text_slots=getattr(denoiser.config, "text_slots", None),
        max_length=denoiser.config.max_position_embeddings,
        defaults=Defaults.from_json(
            parts_of(started.folder) / GENERATION, generation=prompt_template.generation
        ),
        device=state.device,
        prompt_template=prompt_template,
    )


def _context(model: Model, gallery: Shown | None) -> Mapping[str, Any]:
    """Return what rewards take beside columns: `gallery`, and `describe`, the policy's captions."""
    context: dict[str, Any] = {} if gallery is None else {"gallery": gallery.read()}
    if "caption" in model.prompt_template.tasks_with(model.text_tokenizer) and (
        model.image_tokenizer is not None or model.prompt_template.sees == "features"
    ):
        context["describe"] = lambda images: model.caption(list(images))
    return context


if __name__ == "__main__":
    run(main)
