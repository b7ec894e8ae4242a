"""Fill the targets of a batch by unmasking: the one sampling loop of all tasks.

The loop is that of masked-diffusion papers, five named steps over the state of the rows:

    x_t = noise at all targets
    repeat `steps` times, until no target is open:
        plan     which targets may be committed now, and which positions are computed
        forward  hidden states of x_t
        draw     a token x_0 for each open target, and its score in the order
        choose   the targets of highest score to commit, and those to mask again
        commit   x_t = x_0 there, noise at the targets that stay open
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mmdlm.core.blocks import own_blocks
from mmdlm.core.denoiser import Denoiser
from mmdlm.core.diffusion.noise import MaskNoise, Noise
from mmdlm.core.kernels.linear import PackedLayers
from mmdlm.core.sampling.cache import Cache, CacheState
from mmdlm.core.sampling.denoising import Denoising, forward
from mmdlm.core.sampling.forward_passes import ForwardPasses
from mmdlm.core.sampling.generators import Generators, RowGenerators
from mmdlm.core.sampling.guidance import ClassifierFreeGuidance
from mmdlm.core.sampling.order import Confidence, Entropy, Order
from mmdlm.core.sampling.output import SampleOutput, SampleStep
from mmdlm.core.sampling.positions import check_ranges, ranges_of
from mmdlm.core.sampling.remasking import Remasking
from mmdlm.core.sampling.row_state import (
    Blocks,
    Choice,
    HostState,
    RowState,
    SamplingRun,
    StepPlan,
)
from mmdlm.core.sampling.token_sampling import SampledTokens, TokenSampler
from mmdlm.core.sampling.unmasking import (
    EntropyBound,
    Progress,
    UniformTransfer,
    UnmaskingRule,
    check_shape,
)
from mmdlm.core.sequence import Batch
from mmdlm.core.vocabulary import Modality, Vocabulary

_WORTH_PACKING = 4  # steps


@dataclass(frozen=True)
class Sampler:
    """Fill the targets of a batch; all other tokens are context and stay as they are.

    Logits are restricted to the id range of each position's modality, the mask token is never
    drawn, and the order looks at probabilities before temperature, top-k and top-p. The last four
    options are for results of systems that do otherwise.

    The result is a function of the arguments and the generator only. With a list of generators, one
    for each row, the result of a row is a function of the row and its own generator: the batch
    around it does not change it.

    Attributes:
        steps: Denoising steps of a row, spread evenly over its blocks, remainder first.
        block_length: Blocks are runs of this many targets of a row, in reading order; each is
            finished before the next begins. None: one block. A batch that is cut into blocks
            (`Batch.block`) keeps them, and `block_length` cuts each of them further.
        steps_per_block: `steps` are those of each block, however many a row has.
        first_alone: The first token of each block of a batch that is cut into blocks is a block by
            itself: where each state predicts the next token, all that bears on it is finished
            (Fast-dLLM v2).
        order: Which of the open targets are committed first.
        unmasking: How many of them are committed in a step.
        temperature: Of the draw of tokens; 0 takes the most likely one. It never decays.
        top_k: Draw from this many most likely ids only.
        top_p: Draw from the most likely ids that have this probability together only.
        guidance: Classifier-free guidance.
        remask: Lets committed tokens become noise again.
        cache: What a step keeps of the steps before, at a price; None: nothing, which is exact.
        noise: What stands at open positions: the mask token, or for a model of another process a
            token that is drawn again in each step; the model must have been trained with it.
        suppress_tokens: Ids that are never generated.
        deprioritized_ids: Ids that the order does not see, so that a position for which one is
            drawn has probability 0 and comes last (LLaDA's option for the end of a turn).
        stop_ids: Ids that end the last text of a row: once one is committed, with all targets
            before it, the row is left as it is, noise behind the end included, and takes no more
            part in forward passes. With `remask` rows run on: the end may be taken back.
        min_new_tokens: `stop_ids` are not drawn at so many first targets of a row's text.
        score_after_temperature: The order looks at the probabilities that tokens are drawn from
            (Dream).
        top_p_first: Top-p is taken of all ids and top-k of what is left (Dream); otherwise top-k
            comes first, as in transformers.
        full_vocabulary: A text position may become any id, image codes included (LLaDA, MMaDA).
        allow_mask_token: The mask token may be drawn: the position stays open, though a planned
            count takes it for committed, and may be open in the end (LLaDA, Dream).
    """

    steps: int
    block_length: int | None = None
    steps_per_block: bool = False
    first_alone: bool = False
    order: Order = Confidence()
    unmasking: UnmaskingRule = UniformTransfer()
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    guidance: ClassifierFreeGuidance = ClassifierFreeGuidance()
    remask: Remasking | None = None
    cache: Cache | None = None
    noise: Noise = MaskNoise()
    suppress_tokens: tuple[int, ...] = ()
    deprioritized_ids: tuple[int, ...] = ()
    stop_ids: tuple[int, ...] = ()
    min_new_tokens: int = 0
    score_after_temperature: bool = False
    top_p_first: bool = False
    full_vocabulary: bool = False
    allow_mask_token: bool = False

    def __post_init__(self) -> None:
        """Check the values."""
        if self.steps < 1:
            raise ValueError(f"sampler: steps must be at least 1, got {self.steps}")
        if self.block_length is not None and self.block_length < 1:
            raise ValueError(f"sampler: block_length must be at least 1, got {self.block_length}")
        if self.min_new_tokens < 0:
            raise ValueError(
                f"sampler: min_new_tokens must not be negative, got {self.min_new_tokens}"
            )
        if self.temperature < 0:
            raise ValueError(f"sampler: temperature must not be negative, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"sampler: top_k must be at least 1, got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"sampler: top_p must lie in (0, 1], got {self.top_p}")

        quiet = isinstance(self.order, Entropy) and self.order.temperature == 0
        if isinstance(self.unmasking, EntropyBound) and not quiet:
            raise ValueError(
                f"sampler: EntropyBound reads entropies off the order Entropy(), not {self.order}; "
                "set that, without noise"
            )

    def __call__(
        self,
        denoiser: Denoiser,
        batch: Batch,
        *,
        generator: Generators,
        unconditional: Batch | tuple[Batch, ...] | None = None,
        packed: PackedLayers | None = None,
    ) -> SampleOutput:
        """Run `trajectory` to its end; see there for the arguments."""
        ids, steps = batch.ids.clone(), torch.full_like(batch.ids, -1)
        committed = torch.zeros_like(batch.target)
        log_prob = torch.zeros(ids.shape, device=ids.device)
        for state in self.trajectory(
            denoiser, batch, generator=generator, unconditional=unconditional, packed=packed
        ):
            steps = steps.masked_fill(state.committed & ~committed, state.step)
            ids, committed, log_prob = state.ids, state.committed, state.log_prob
        return SampleOutput(ids=ids, steps=steps, log_prob=log_prob)

    @torch.no_grad()
    def trajectory(
        self,
        denoiser: Denoiser,
        batch: Batch,
        *,
        generator: Generators,
        unconditional: Batch | tuple[Batch, ...] | None = None,
        packed: PackedLayers | None = None,
    ) -> Iterator[SampleStep]:
        """Yield the state after each denoising step.

        A step asks the device once, for all that the host has to know. The weights must not change
        between two steps.

        Args:
            denoiser: Predicts the tokens.
            batch: [B, L] rows with targets to fill.
            generator: Random numbers of all rows, or a list of one generator for each.
            unconditional: The other branch of guidance, or several; default: the batch without its
                context.
            packed: The layers of the denoiser, with what is kept of them from run to run; default:
                they are packed for this run, if it is long enough.

        Raises:
            ValueError: If the logits of an open position are not finite, if there are fewer steps
                than blocks, if the cache does not fit the batch, or if `generator` is not one, or
                not as many as there are rows.
        """
        if packed is not None:
            packed.renew()
        rows = self.begin(
            denoiser, batch, generator=generator, unconditional=unconditional, packed=packed
        )
        while True:
            rows.plan.host.refuse_broken()
            if rows.plan.host.is_finished:
                return
            (hidden,) = forward([rows])
            rows = rows.after(hidden)
            yield rows.output()

    def begin(
        self,
        denoiser: Denoiser,
        batch: Batch,
        *,
        generator: Generators,
        unconditional: Batch | tuple[Batch, ...] | None = None,
        packed: PackedLayers | None = None,
    ) -> Denoising:
        """Return the rows before their first step, as pure noise.

        Args:
            denoiser: As in `trajectory`.
            batch: As in `trajectory`.
            generator: As in `trajectory`.
            unconditional: As in `trajectory`.
            packed: As in `trajectory`; if the weights may have changed, `renew` it before.

        Returns:
            The rows, for `mmdlm.core.sampling.denoising.forward`.

        Raises:
            ValueError: As `trajectory`.
        """
        vocabulary, target = denoiser.vocabulary, batch.target
        batch = own_blocks(denoiser, batch)
        if isinstance(unconditional, Batch):
            unconditional = (unconditional,)
        if unconditional is not None:
            unconditional = tuple(own_blocks(denoiser, one) for one in unconditional)
        if packed is None:
            packed = PackedLayers(denoiser if self.steps >= _WORTH_PACKING else None)
        passes = ForwardPasses.of(
            denoiser,
            batch,
            guidance=self.guidance,
            unconditional=unconditional,
            use_cache=self.cache is not None,
        )
        check_ranges(passes.batch.host_masks, vocabulary)
        blocks = Blocks.split(
            passes.batch,
            block_length=self.block_length,
            steps=self.steps,
            per_block=self.steps_per_block,
            first_alone=self.first_alone,
        )
        if self.cache is not None:
            self.cache.check(batch)
        no_words = torch.tensor(
            [vocabulary.eos_id, vocabulary.mask_id, *self.stop_ids], device=target.device
        )
        run = SamplingRun(
            batch=passes.batch,
            vocabulary=vocabulary,
            blocks=blocks,
            generators=RowGenerators.of(generator, passes.lengths),
            ranges=ranges_of(
                vocabulary,
                suppress_tokens=self.suppress_tokens,
                deprioritized_ids=self.deprioritized_ids,
                stop_ids=self.stop_ids if self.min_new_tokens else (),
                full_vocabulary=self.full_vocabulary,
                allow_mask_token=self.allow_mask_token,
                device=target.device,
            ),
            packed=packed,
            is_text=batch.of(Modality.TEXT),
            no_words=no_words,
            stops=no_words[2:],
        )
        all_noise = torch.ones(target.shape, device=target.device)
        x_t = self._with_noise(run, batch.ids, target, p_mask=all_noise)
        return Denoising.of(self, run, RowState.first(passes, x_t, torch.zeros_like(blocks.count)))

    # --- the five steps ---

    def plan(self, run: SamplingRun, state: RowState) -> StepPlan:
        """Find the targets that may be committed, and the positions that have to be computed."""
        target, block, blocks = run.batch.target, state.block[:, None], run.blocks
        running = state.block < blocks.count  # [B]
        in_block = target & (blocks.of == block)  # [B, L]
        begun = target & (blocks.of <= block) & running[:, None]
        still_open = begun & ~state.committed  # of an earlier block only where the mask was drawn
        progress = Progress(
            size=in_block.sum(1),
            open=still_open.sum(1) - state.void,
            step=state.taken,
            steps=blocks.steps_of(state.block),
        )
        query_mask = still_open
        if self.cache is not None:
            query_mask = self.cache.compute_mask(
                CacheState(
                    progress,
                    run.batch,
                    in_block=in_block | still_open,
                    in_later_blocks=target & (blocks.of > block),
                    committed=state.committed,
                    just_committed=state.just_committed,
                    confidence=state.confidence,
                )
            )
        host = HostState.of(running, state.broken, still_open, query_mask, progress)
        progress = replace(progress, on_host=host.progress)
        return StepPlan(in_block, begun, still_open, progress, host)

    def draw(
        self, run: SamplingRun, passes: ForwardPasses, hidden: Tensor, plan: StepPlan
    ) -> SampledTokens:
        """Draw a token for each open target, and score the targets by the order."""
        draw = TokenSampler(
            order=self.order,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_new_tokens=self.min_new_tokens,
            score_after_temperature=self.score_after_temperature,
            top_p_first=self.top_p_first,
        )
        return draw(
            passes,
            hidden,
            plan.host.still_open,
            ranges=run.ranges,
            progress=plan.progress,
            generators=run.generators,
        )

    def choose(
        self, run: SamplingRun, state: RowState, plan: StepPlan, drawn: SampledTokens
    ) -> Choice:
        """Choose which drawn tokens are committed, and which committed ones are masked again."""
        remaining = self._remaining(plan.progress, run.generators)  # [B]
        again = torch.zeros_like(state.committed)
        if self.remask is not None:
            again = self.remask.choose_in_rows(
                plan.in_block & state.committed,
                state.probability,
                remaining=remaining,
                progress=plan.progress,
                generators=run.generators,
            )
        words = run.is_text & ~torch.isin(drawn.ids, run.no_words)
        chosen = self.unmasking.choose(
            drawn.score,
            drawn.probability,
            words=torch.where(words, drawn.ids, -1),
            among=plan.still_open,
            count=plan.progress.open + again.sum(1) - remaining,
            progress=plan.progress,
        )
        check_shape(chosen, plan.still_open, of=f"{type(self.unmasking).__name__}.choose")
        chosen = plan.still_open & chosen.bool()
        masks = chosen & (drawn.ids == run.vocabulary.mask_id)
        void = masks.sum(1) * self.unmasking.planned
        return Choice(chosen & ~masks, again, remaining, void)

    def commit(
        self,
        run: SamplingRun,
        state: RowState,
        plan: StepPlan,
        drawn: SampledTokens,
        choice: Choice,
    ) -> RowState:
        """Write the chosen tokens, put noise at the targets that stay open, and move on."""
        target, chosen = run.batch.target, choice.chosen
        committed = (state.committed & ~choice.again) | chosen
        void = state.void + choice.void
        left = (plan.begun & ~committed).sum(1) - void
        share = (left / plan.progress.size.clamp_min(1))[:, None]
        p_mask = torch.where(plan.in_block, share, torch.ones_like(state.confidence))
        x_t = torch.where(plan.still_open, drawn.ids, state.x_t)
        x_t = self._with_noise(run, x_t, target & ~committed, p_mask=p_mask)

        finished = (left == 0) | plan.progress.last
        if self.remask is not None:
            finished &= choice.remaining == 0  # until then the plan leaves room for re-masking
        block = state.block + finished
        if self.stop_ids and self.remask is None:
            block = torch.where(run.stopped(x_t, committed), run.blocks.count, block)
        log_prob = torch.where(chosen, drawn.log_prob, state.log_prob)
        not_finite = (plan.still_open & drawn.log_prob.isnan()).any(1)
        return replace(
            state,
            x_t=x_t,
            committed=committed,
            just_committed=chosen,
            confidence=torch.where(plan.still_open, drawn.probability, 0.0),
            probability=torch.where(chosen, drawn.probability, state.probability),
            log_prob=log_prob.masked_fill(~committed, 0.0),
            block=block,
            taken=torch.where(finished, 0, state.taken + 1),
            void=void,
            broken=state.broken | not_finite,
        )

    # --- what the steps are made of ---

    def undrawable(self, vocabulary: Vocabulary) -> tuple[int, ...]:
        """Return the ids that no target becomes: a policy's log-probabilities leave them out."""
        return (*self.suppress_tokens, *(() if self.allow_mask_token else (vocabulary.mask_id,)))

    def _with_noise(self, run: SamplingRun, x: Tensor, where: Tensor, *, p_mask: Tensor) -> Tensor:
        """Return the ids [B, L] with noise at the positions `where`."""
        filled = x.clone()
        for rows, generator in run.generators.spans():
            filled[rows] = self.noise.fill(
                x[rows],
                where[rows],
                p_mask=p_mask[rows],
                modality=run.batch.modality[rows],
                vocabulary=run.vocabulary,
                generator=generator,
            )
        return filled

    def _remaining(self, progress: Progress, generators: RowGenerators) -> Tensor:
        """Ask the unmasking rule for its count [B]; a planned step commits at least one token."""
        parts = [
            self.unmasking.remaining(progress.rows(rows), generator=generator)
            for (rows, _), generator in generators.spans()
        ]
        remaining = parts[0] if len(parts) == 1 else torch.cat(parts)
        check_shape(remaining, progress.open, of=f"{type(self.unmasking).__name__}.remaining")
        remaining = remaining.long().clamp_min(0)
        if self.remask is None and self.unmasking.planned:
            remaining = torch.minimum(remaining, (progress.open - 1).clamp_min(0))
        return remaining.masked_fill(progress.last, 0)
