"""The loader of reinforcement learning: its batches are what the policy itself did, and its worth.

A round is one set of rollouts, looked at in `num_iterations` steps of training. All that a round
draws follows from the seed, its number and the number of the micro-batch: a run that is killed in
the middle of a rollout makes the same one again, and one that is killed between two inner
iterations finds its rollouts in the checkpoint, as the policy that made them is gone.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from data_pipelines.shards.sample_stats import BrokenSample, SampleStats
from data_pipelines.shards.stream import permutation
from data_pipelines.sources.problems import Problem, columns_of
from mmdlm.core.likelihood.base import LikelihoodEstimator
from mmdlm.core.sampling.order import Order
from mmdlm.core.vocabulary import Modality
from mmdlm.pipeline.generation_run import GenerationRun
from mmdlm.pipeline.model import Model
from mmdlm.rl.policy_loss import PolicyLoss
from mmdlm.rl.reward import Breakdown
from mmdlm.rl.rollout import Rollout
from mmdlm.templates.task_prompt import TaskPrompt
from train.optimizer_step import step_generator
from train.rollouts.answering import Answering
from train.rollouts.completions import CompletionsTable
from train.rollouts.reference import Reference
from train.rollouts.rollout_batch import MicroBatch, RolloutBatch, ScoredViews
from train.rollouts.settings import Budget, Plan, RewardConfig
from train.rollouts.statistics import statistics_of

BARREN = 10  # rollouts on end without any reward, after which a run stops


class Rollouts:
    """Endless batches of `RolloutBatch`, which the newest weights of the policy have made."""

    def __init__(
        self,
        model: Model,
        problems: Sequence[Problem],
        answering: Answering,
        reward_config: RewardConfig,
        estimator: LikelihoodEstimator,
        loss: PolicyLoss,
        plan: Plan,
        *,
        reference: Reference,
        seed: int,
        context: Mapping[str, Any],
        table: CompletionsTable | None = None,
        budget: Budget = Budget(),
        max_broken: float = 0.1,
        precision: AbstractContextManager[Any] | None = None,
    ) -> None:
        self.model, self.problems, self.answering = model, problems, answering
        self.reward_config, self.estimator, self.loss, self.plan = (
            reward_config,
            estimator,
            loss,
            plan,
        )
        self.reference, self.seed, self.context = reference, seed, context
        self.table, self.budget, self.precision = table, budget, precision
        self.given = 0  # batches
        self.micro_batches: list[MicroBatch] = []
        self.tokens, self.seconds = 0, 0.0
        self.read = 0  # tokens of prompts
        # Seconds of rollouts, and of their scores, since `shares` was asked.
        self.rolling = self.scoring = 0.0
        self.asked = self.since = time.perf_counter()
        self.order: tuple[int, list[int]] = (-1, [])  # of an epoch
        self.unfit: dict[int, str] = {}  # problems that cannot be asked, and why
        self.stats = SampleStats(max_broken)  # of all that were to be asked
        self.barren = 0  # rounds on end of which no completion got a reward
        self.warned: set[str] = set()
        self._check()

    # ---- the loader -----------------------------------------------------------------------------

    def __iter__(self) -> Iterator[RolloutBatch]:
        each = self.plan.gradient_accumulation_steps * self.plan.num_iterations
        while True:
            number, rest = divmod(self.given, each)
            iteration, index = divmod(rest, self.plan.gradient_accumulation_steps)
            if iteration == 0:
                if index == 0:
                    self.micro_batches = []
                began, scoring = time.perf_counter(), self.scoring
                with self._sampling():
                    self.micro_batches.append(self._micro_batch(number, index))
                self.rolling += time.perf_counter() - began - (self.scoring - scoring)
            self.given += 1
            yield self.micro_batches[index].at(iteration)

    def state_dict(self) -> dict[str, Any]:
        """Where the run is, what it has cost, and the rollouts that are not used up."""
        self._count_time()
        in_flight = (
            self.given % (self.plan.gradient_accumulation_steps * self.plan.num_iterations) != 0
        )
        return {
            "given": self.given,
            "plan": [
                self.plan.prompts,
                self.plan.num_generations,
                self.plan.gradient_accumulation_steps,
                self.plan.num_iterations,
            ],
            "tokens": self.tokens,
            "read": self.read,
            "seconds": self.seconds,
            "unfit": self.unfit,
            "stats": self.stats.state_dict(),
            "barren": self.barren,
            "micro_batches": [one.state_dict() for one in self.micro_batches] if in_flight else [],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """ValueError for a run of other numbers, whose rollouts could not be told apart."""
        plan = [
            self.plan.prompts,
            self.plan.num_generations,
            self.plan.gradient_accumulation_steps,
            self.plan.num_iterations,
        ]
        if state["plan"] != plan:
            raise ValueError(
                "the run was begun with (prompts, num_generations, gradient_accumulation_steps, "
                f"num_iterations) {tuple(state['plan'])} and cannot go on with {tuple(plan)}; set "
                "them back, or train into another folder"
            )
        self.given, self.tokens, self.seconds = state["given"], state["tokens"], state["seconds"]
        self.read, self.unfit, self.barren = state["read"], state["unfit"], state["barren"]
        self.stats.load_state_dict(state["stats"])
        self.micro_batches = [MicroBatch.from_state(one) for one in state["micro_batches"]]
        self.since = time.perf_counter()

    @property
    def spent(self) -> bool:
        """The budget is used up."""
        self._count_time()
        tokens, seconds = self.budget.tokens, self.budget.seconds
        return (tokens is not None and self.tokens * self.plan.of >= tokens) or (
            seconds is not None and self.seconds >= seconds
        )

    def shares(self) -> tuple[float, float]:
        """Of the time since they were asked last, what went into rollouts, and into their scores.

        Rollouts are sampling and rewards; scores are those of the old policy and the reference.
        """
        now = time.perf_counter()
        passed = max(now - self.asked, 1e-9)
        shares = min(1.0, self.rolling / passed), min(1.0, self.scoring / passed)
        self.rolling, self.scoring, self.asked = 0.0, 0.0, now
        return shares

    def _count_time(self) -> None:
        now = time.perf_counter()
        self.seconds, self.since = self.seconds + now - self.since, now

    @contextmanager
    def _sampling(self) -> Iterator[None]:
        """No gradient, no dropout, and the precision that training has."""
        module = self.model.denoiser
        assert isinstance(module, nn.Module)
        training = module.training
        module.eval()
        try:
            with torch.no_grad():
                if self.precision is None:
                    yield
                else:
                    with self.precision:
                        yield
        finally:
            module.train(training)

    # ---- rollouts -------------------------------------------------------------------------------

    def _micro_batch(self, number: int, index: int) -> MicroBatch:
        """Return the rollouts of one micro-batch of a round."""
        plan = self.plan
        # among all of the run
        place = (number * plan.gradient_accumulation_steps + index) * plan.of + plan.process
        sampling, looking = (
            step_generator(self.model.device, self.seed, place, which) for which in range(2)
        )
        chosen = [self._asked(place * plan.prompts + i) for i in range(plan.prompts)]
        problems = [one for one, _ in chosen for _ in range(plan.num_generations)]
        generation_run = self._filling(chosen, generator=sampling)
        rollout = Rollout.sample(
            generation_run.sampler,
            generation_run.denoiser,
            generation_run.batch,
            generator=sampling,
            ends=self.model.prompt_template.stop_ids(self.model.codec),
            unconditional=generation_run.unconditional or None,
        )
        completions = self.answering.completions(self.model, problems, generation_run, rollout)
        rollout = replace(
            rollout, scored=self.answering.scored(self.model, problems, generation_run, rollout)
        )
        ids = [
            row[where].tolist()
            for row, where in zip(rollout.batch.ids, rollout.scored, strict=True)
        ]
        rewards = self._judged(problems, completions, ids, step=number * plan.num_iterations)
        group = torch.arange(plan.prompts).repeat_interleave(plan.num_generations)
        learned = self.reward_config.learned(rewards, group=group)
        advantage = self.reward_config.advantage(rewards.total, group=group)
        self.tokens += int(rollout.lengths.sum())
        self.read += int((~rollout.batch.is_padding & ~rollout.batch.target).sum())
        if self.table is not None and index == 0:
            texts = [one.prompt.text for one in problems]
            self.table.write(number, texts, completions, rewards, advantage)
        advantage = self.loss.prepare(advantage, group=group, known=rewards.scored).float()
        statistics = statistics_of(rollout, rewards, learned, group=group)
        # What takes no part is not looked at; one row stays, so that all processes keep step.
        rows = learned.nonzero().flatten() if bool(learned.any()) else torch.zeros(1).long()
        rollout = rollout.rows(rows.to(rollout.scored.device))
        scored = rollout.scored & learned[rows].to(rollout.scored.device)[:, None]
        began = time.perf_counter()
        undrawable = generation_run.sampler.undrawable(generation_run.denoiser.vocabulary)
        scored_views = self._scored_views(rollout, scored, undrawable=undrawable, generator=looking)
        self.scoring += time.perf_counter() - began
        return MicroBatch(
            batch=rollout.batch,
            advantage=advantage[rows],
            scored_views=scored_views,
            statistics=statistics,
            undrawable=undrawable,
        )

    def _judged(
        self, problems: list[Problem], completions: list[Any], ids: list[list[int]], *, step: int
    ) -> Breakdown:
        """Return the rewards of completions; answers to messages are messages, as in TRL.

        Raises ValueError where no reward has said anything for long.
        """
        said = [
            [{"role": "assistant", "content": text}]
            if one.prompt.chat and isinstance(text, str)
            else text
            for one, text in zip(problems, completions, strict=True)
        ]
        prompts = [one.prompt.messages if one.prompt.chat else one.prompt.text for one in problems]
        # At the precision of evaluation, whatever the policy samples at.
        with torch.autocast(self.model.device.type, enabled=False):
            rewards = self.reward_config.rubric(
                prompts,
                said,
                columns=columns_of(problems),
                context=self.context,
                completion_ids=ids,
                trainer_state=SimpleNamespace(global_step=step),
            )
        for name, skipped in rewards.skipped.items():
            self._say(name, f"{skipped.count} completions are skipped: {skipped.reason}")
        self.barren = 0 if bool(rewards.scored.any()) else self.barren + 1
        if self.barren >= BARREN:
            reasons = "; ".join(one.reason for one in rewards.skipped.values())
            raise ValueError(
                f"no completion of the last {self.barren} rollouts got a reward, so that nothing "
                f"is learned: {reasons or 'all rewards were None'}"
            )
        return rewards

    def _filling(
        self, chosen: list[tuple[Problem, TaskPrompt]], *, generator: torch.Generator
    ) -> GenerationRun:
        """One row a completion; a prompt's images are looked at once."""
        generation_run = self.answering.generation_run(
            self.model,
            [problem for problem, _ in chosen],
            [task_prompt for _, task_prompt in chosen],
            generator=generator,
        )
        index = torch.arange(len(chosen)).repeat_interleave(self.plan.num_generations)
        rows = index.to(generation_run.batch.ids.device)
        return replace(
            generation_run,
            batch=generation_run.batch.rows(rows),
            unconditional=tuple(branch.rows(rows) for branch in generation_run.unconditional),
            output_segments=tuple(generation_run.output_segments[int(i)] for i in index),
            lengths=tuple(generation_run.lengths[int(i)] for i in index),
        )

    def _scored_views(
        self,
        rollout: Rollout,
        scored: Tensor,
        *,
        undrawable: tuple[int, ...],
        generator: torch.Generator,
    ) -> tuple[ScoredViews, ...]:
        """Return views for all inner iterations; policy, old policy and reference share them."""
        batch, denoiser = rollout.batch, self.model.denoiser
        known: dict[int, ScoredViews] = {}  # of views that several iterations share
        rounds = self.estimator.draw(
            batch,
            denoiser.vocabulary,
            generator=generator,
            iterations=self.plan.num_iterations,
            scored=scored,
            steps=rollout.steps,
        )
        scored_views = []
        for iteration, views in enumerate(rounds):
            before = known.get(id(views), ScoredViews(views))
            old, reference = before.old, before.reference
            if self.loss.needs_old and iteration and old is None:  # at first it is the policy
                old = self.estimator.scores(denoiser, batch, views, undrawable=undrawable)
            if self.loss.needs_reference and reference is None:
                assert isinstance(denoiser, nn.Module)
                with self.reference.of(denoiser) as other:
                    reference = self.estimator.scores(other, batch, views, undrawable=undrawable)
            known[id(views)] = ScoredViews(views, old, reference)
            scored_views.append(known[id(views)])
        return tuple(scored_views)

    # ---- prompts --------------------------------------------------------------------------------

    def _check(self) -> None:
        """Raise ValueError for what would be found out after the first rollouts."""
        if not self.problems:
            raise ValueError("there are no prompts to learn from")
        first = self.problems[0]
        self.reward_config.rubric.check_columns({*first.columns, *self.context})
        self.reward_config.rubric.prepare()
        _, task_prompt = self._asked(0)
        generation_config = self.answering.generation_config(self.model, first)
        written = any(
            one.modality == Modality.TEXT and bool(one.target.any())
            for one in task_prompt.sequence.segments
        )
        sampler = generation_config.sampler()
        whole = sampler.full_vocabulary and written
        if whole and not self.estimator.full_vocabulary:
            raise ValueError(
                "the sampler draws from the whole vocabulary; set full_vocabulary of the estimator"
            )
        if self.estimator.full_vocabulary and not whole:
            raise ValueError(
                "full_vocabulary of the estimator counts ids that the sampler does not draw; set "
                "it to false, or for texts reproduce=llada and published_defects of the sampler"
            )
        self.estimator.check(sampler)
        noise = generation_config.temperature or generation_config.order_temperature
        own = isinstance(generation_config.order, Order)  # may be random
        if not (
            noise
            or own
            or generation_config.order == "random"
            or generation_config.schedule == "ancestral"
        ):
            raise ValueError(
                "temperature is 0, so that all completions of a prompt would be alike and none "
                "better than another; set it to 1, for example"
            )

    def _asked(self, position: int) -> tuple[Problem, TaskPrompt]:
        """Return the problem at a position of the endless shuffled list, or the next usable one.

        Raises ValueError where no problem can be.
        """
        count = len(self.problems)
        epoch, place = divmod(position, count)
        if self.order[0] != epoch:
            self.order = epoch, permutation(count, self.seed, "prompts", epoch)
        for further in range(count):
            index = self.order[1][(place + further) % count]
            if index in self.unfit:
                continue
            problem = self.problems[index]
            try:
                asked = self.answering.task_prompt(self.model, problem)
            except ValueError as error:
                self.unfit[index] = str(error)
                self.stats.add_broken(BrokenSample("prompts", problem.name, str(error)))
                continue
            self.stats.good += 1
            return problem, asked
        raise ValueError(
            f"none of {count} prompts can be asked; the first: {next(iter(self.unfit.values()))}"
        )

    def _say(self, about: str, what: str) -> None:
        """Once for each kind and process; the log counts the rest."""
        if about not in self.warned:
            self.warned.add(about)
            print(f"warning: {what}", file=sys.stderr)
