"""The one unmasking loop: which tokens first, how many at a time, and which to think over again.

A sampler is put together from an order (which positions are surest), a commit rule (how many of
them are committed in a step), a block length, a temperature, and at will guidance and re-masking.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from mmdlm.core.denoiser import Denoiser
from mmdlm.core.diffusion.noise import MaskNoise, Noise
from mmdlm.core.host_masks import HostMasks, numbers_of
from mmdlm.core.kernels.linear import PackedLayers
from mmdlm.core.sampling.cache import Cache, CacheState
from mmdlm.core.sampling.forward_passes import ForwardPasses
from mmdlm.core.sampling.generators import Generators, RowGenerators, Rows
from mmdlm.core.sampling.guidance import ClassifierFreeGuidance
from mmdlm.core.sampling.order import Candidates, Confidence, Entropy, Order, gumbel_like
from mmdlm.core.sampling.token_sampling import HostState, Positions, Range, SampledTokens, joined
from mmdlm.core.sampling.unmasking import (
    EntropyBound,
    Progress,
    Remasking,
    UniformTransfer,
    UnmaskingRule,
)
from mmdlm.core.sequence import Batch
from mmdlm.core.vocabulary import GENERATED, Modality, Vocabulary

_WORTH_PACKING = 4  # steps


@dataclass(frozen=True)
class SampleStep:
    """The state after one denoising step.

    ids        [B, L] committed and given tokens; noise where a target is still open
    committed  [B, L] bool, targets committed so far
    step       0, 1, ... ; at most `steps` of them, fewer where everything was committed before
    log_prob   [B, L] of each committed token when it was committed, 0 elsewhere: under the model's
               guided logits over the ids that can be drawn (`Sampler.undrawable`), at temperature 1
               and before top-k and top-p, whatever it was drawn by
    """

    ids: Tensor
    committed: Tensor
    step: int
    steps: int
    log_prob: Tensor


@dataclass(frozen=True)
class SampleOutput:
    """What became of a batch.

    ids       [B, L] the batch's ids with the targets filled
    steps     [B, L] the step at which each target was committed (for good), -1 elsewhere, and where
              the mask token was drawn for good or the row was stopped before
    log_prob  [B, L] of each of these tokens when it was committed, see `SampleStep`; 0 elsewhere
    """

    ids: Tensor
    steps: Tensor
    log_prob: Tensor


@dataclass(frozen=True)
class Sampler:
    """Fills the targets of a batch; whatever is not a target is context and stays as it is.

    steps           denoising steps for a row, spread evenly over its blocks, remainder first
    block_length    blocks are runs of this many targets of a row, in reading order, one finished
                    before the next begins; None: all of them at once
    order, unmasking   which of the open tokens are committed, and how many
    temperature     of the draw of tokens; 0 takes the most likely one. It never decays
    top_k, top_p    restrict the draw
    guidance_scale  see `ClassifierFreeGuidance`; 1 is off, several for several branches
    remask          lets committed tokens become noise again
    cache           what a step remembers of the steps before, at a price; None: nothing, exactly
    noise           what stands at open positions: the mask token, or for a model of another
                    process a token drawn anew each step; the model must have been trained with it
    suppress_tokens      ids that are never generated
    deprioritized_ids       ids that the order does not see, so that a position for which one is
                            drawn has
                    probability 0 and comes last (LLaDA's option for the end of a turn)
    stop_ids        ids that end a row's last text: once one is committed, with all targets before
                    it, the row is left as it is, noise behind the end included, and takes no more
                    part in forward passes. With `remask` rows run on: the end may be taken back
    min_new_tokens  `stop_ids` are not drawn at so many first targets of a row's text

    Logits are restricted to the id range of each position's modality, the mask token is never
    drawn, and the order looks at probabilities before temperature, top-k and top-p. These options
    are for results of systems that do otherwise:

    score_after_temperature  the order looks at the probabilities that tokens are drawn from (Dream)
    top_p_first              top-p is taken of all ids and top-k of what that leaves (Dream), where
                             top-k otherwise comes first, as in transformers
    full_vocabulary         a text position may become any id, image codes included (LLaDA, MMaDA)
    allow_mask_token               the mask token may be drawn: the position stays open, though a
                                   planned
                             count takes it for committed, and may be so in the end (LLaDA, Dream)

    The result is a function of the arguments and the generator alone. With a list of generators,
    one for each row, what a row becomes is a function of the row and its own: it is what becomes of
    it alone, whatever the batch around it.
    """

    steps: int
    block_length: int | None = None
    order: Order = Confidence()
    unmasking: UnmaskingRule = UniformTransfer()
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    guidance_scale: float | tuple[float, ...] = 1.0
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
        """Run `trajectory` to its end."""
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
        """One item for each denoising step; the weights must not change between two of them.

        generator      for all rows, or a list of one for each
        unconditional  the other branch of guidance, or several; default: the batch without its
                       context
        packed         the layers of the denoiser, with what is kept of them from run to run;
                       default: they are packed for this run, where it is worth it

        A step asks the device once, for all that the host has to know.

        Raises ValueError where the logits of an open position are not finite, and for generators
        that are none, or not as many as rows.
        """
        vocabulary, target = denoiser.vocabulary, batch.target
        if packed is None:
            packed = PackedLayers(denoiser if self.steps >= _WORTH_PACKING else None)
        else:
            packed.renew()
        passes = ForwardPasses.of(
            denoiser,
            batch,
            guidance=ClassifierFreeGuidance(self.guidance_scale),
            unconditional=unconditional,
            use_cache=self.cache is not None,
        )
        host_masks = passes.batch.host_masks
        _check_ranges(host_masks, vocabulary)
        block_of, blocks = self._blocks(target, host_masks)
        generators = RowGenerators.of(generator, passes.lengths)
        ranges = self._ranges(vocabulary, target.device)
        fill = partial(self._filled, batch=batch, vocabulary=vocabulary, generators=generators)

        all_noise = torch.ones(target.shape, device=target.device)
        x_t = fill(batch.ids, target, p_mask=all_noise)
        committed = just_committed = torch.zeros_like(target)
        confidence = torch.zeros_like(all_noise)  # probability of what was drawn last
        probability = torch.zeros_like(all_noise)  # of each committed token, when it was committed
        log_prob = torch.zeros_like(all_noise)
        is_text = batch.of(Modality.TEXT)
        no_words = torch.tensor(
            [vocabulary.eos_id, vocabulary.mask_id, *self.stop_ids], device=target.device
        )
        stops = no_words[2:]
        each, rest = self.steps // blocks.clamp_min(1), self.steps % blocks.clamp_min(1)
        block = torch.zeros_like(blocks)  # [B] the block each row is at
        taken = torch.zeros_like(blocks)  # [B] steps it has taken there
        void = torch.zeros_like(blocks)  # [B] planned tokens for which the mask token was drawn
        broken = torch.zeros_like(blocks, dtype=torch.bool)  # [B] a number was not finite

        for step in range(self.steps):
            in_block = target & (block_of == block[:, None])  # [B, L]
            begun = target & (block_of <= block[:, None]) & (block < blocks)[:, None]
            still_open = begun & ~committed  # of an earlier block only where the mask was drawn
            progress = Progress(
                size=in_block.sum(1),
                open=still_open.sum(1) - void,
                step=taken,
                steps=each + (block < rest),
            )
            query_mask = still_open
            if self.cache is not None:
                in_later_blocks = target & (block_of > block[:, None])
                query_mask = self.cache.compute_mask(
                    CacheState(
                        progress,
                        batch,
                        in_block | still_open,
                        in_later_blocks,
                        committed,
                        just_committed,
                        confidence,
                    )
                )
            host_state = HostState.of(block < blocks, broken, still_open, query_mask, progress)
            host_state.refuse_broken()
            if host_state.is_finished:
                return
            progress = replace(progress, on_host=host_state.progress)
            passes = passes.only(host_state.unfinished)
            with packed:
                forward = passes.first_hidden if step == 0 else passes.hidden
                hidden = forward(x_t, host_state.query_mask)
                drawn = self._draw(
                    passes, hidden, host_state.still_open, ranges, progress, generators
                )

            broken = broken | (still_open & drawn.log_prob.isnan()).any(1)
            remaining = self._remaining(progress, generators)  # [B]
            again = self._again(in_block & committed, probability, remaining, progress, generators)
            count = progress.open + again.sum(1) - remaining
            chosen = self.unmasking.choose(
                drawn.score,
                drawn.probability,
                words=torch.where(is_text & ~torch.isin(drawn.ids, no_words), drawn.ids, -1),
                among=still_open,
                count=count,
                progress=progress,
            )
            _check_shape(chosen, still_open, of=f"{type(self.unmasking).__name__}.choose")
            chosen = still_open & chosen.bool()
            masks = chosen & (drawn.ids == vocabulary.mask_id)
            void = void + masks.sum(1) * self.unmasking.planned
            chosen &= ~masks

            committed, just_committed = (committed & ~again) | chosen, chosen
            confidence = torch.where(still_open, drawn.probability, 0.0)
            probability = torch.where(chosen, drawn.probability, probability)
            log_prob = torch.where(chosen, drawn.log_prob, log_prob).masked_fill(~committed, 0.0)
            left = (begun & ~committed).sum(1) - void
            noisiness = torch.where(
                in_block, (left / progress.size.clamp_min(1))[:, None], all_noise
            )
            x_t = torch.where(still_open, drawn.ids, x_t)
            x_t = fill(x_t, target & ~committed, p_mask=noisiness)
            yield SampleStep(
                ids=x_t, committed=committed, step=step, steps=self.steps, log_prob=log_prob
            )

            finished = (left == 0) | progress.last
            if self.remask is not None:
                finished &= remaining == 0  # until then the plan leaves room for second thoughts
            stopped = self._stopped(x_t, committed, batch, stops)
            block = torch.where(stopped, blocks, block + finished)
            taken = torch.where(finished, 0, taken + 1)
        HostState.of(block < blocks, broken, still_open, query_mask, progress).refuse_broken()

    def undrawable(self, vocabulary: Vocabulary) -> tuple[int, ...]:
        """Return the ids that no target becomes: a policy's log-probabilities leave them out."""
        return (*self.suppress_tokens, *(() if self.allow_mask_token else (vocabulary.mask_id,)))

    def _filled(
        self,
        x: Tensor,
        where: Tensor,
        *,
        p_mask: Tensor,
        batch: Batch,
        vocabulary: Vocabulary,
        generators: RowGenerators,
    ) -> Tensor:
        """[B, L] ids with noise at the positions `where`."""

        def of(rows: Rows, generator: torch.Generator) -> Tensor:
            return self.noise.fill(
                x[rows],
                where[rows],
                p_mask=p_mask[rows],
                modality=batch.modality[rows],
                vocabulary=vocabulary,
                generator=generator,
            )

        return generators.for_tokens(x, of)

    def _stopped(self, x_t: Tensor, committed: Tensor, batch: Batch, stops: Tensor) -> Tensor:
        """[B] bool, whose last text has come to its end: to one of the ids `stops`."""
        if not self.stop_ids or self.remask is not None:
            return torch.zeros(len(x_t), dtype=torch.bool, device=x_t.device)
        stop = torch.isin(x_t, stops)
        none_before = (batch.target & ~committed).cumsum(1) == 0
        last = batch.segment.masked_fill(~batch.target, -1).amax(1, keepdim=True)
        ends = stop & committed & none_before & batch.of(Modality.TEXT) & (batch.segment == last)
        return ends.any(1)

    def _blocks(self, target: Tensor, host_masks: HostMasks) -> tuple[Tensor, Tensor]:
        """[B, L] number of the block of each target, [B] number of blocks of each row."""
        place = target.cumsum(1) - 1
        length = self.block_length or target.shape[1]
        blocks = (target.sum(1) + length - 1) // length
        most = (
            (int(host_masks.target.numpy().sum(1).max()) + length - 1) // length
            if len(blocks)
            else 0
        )
        if most > self.steps:
            raise ValueError(
                f"sampler: {self.steps} steps are too few for {most} blocks of {length} tokens; "
                "raise steps or block_length"
            )
        return place // length, blocks

    def _remaining(self, progress: Progress, generators: RowGenerators) -> Tensor:
        """[B] the commit rule's count; a planned step commits one at least, the last one all."""
        remaining = generators.for_rows(
            lambda rows, generator: self.unmasking.remaining(
                progress.rows(rows), generator=generator
            )
        )
        _check_shape(remaining, progress.open, of=f"{type(self.unmasking).__name__}.remaining")
        remaining = remaining.long().clamp_min(0)
        if self.remask is None and self.unmasking.planned:
            remaining = torch.minimum(remaining, (progress.open - 1).clamp_min(0))
        return remaining.masked_fill(progress.last, 0)

    def _again(
        self,
        committed: Tensor,
        probability: Tensor,
        remaining: Tensor,
        progress: Progress,
        generators: RowGenerators,
    ) -> Tensor:
        """[B, L] bool, the tokens that are masked again."""
        nothing, remask = torch.zeros_like(committed), self.remask
        if remask is None:
            return nothing

        def of(rows: Rows, generator: torch.Generator) -> Tensor:
            return remask.choose(
                committed[rows],
                probability[rows],
                remaining=remaining[rows[0]],
                progress=progress.rows(rows[0]),
                generator=generator,
            )

        return generators.for_tokens(nothing, of)

    def _ranges(self, vocabulary: Vocabulary, device: torch.device) -> dict[Modality, Range]:
        """The ids that a position of each modality may become."""
        ranges = {}
        for modality in GENERATED:
            start, stop = vocabulary.range(modality)
            if start == stop:
                continue
            if self.full_vocabulary and modality == Modality.TEXT:
                start, stop = 0, vocabulary.size
            ranges[modality] = Range.of(
                start,
                stop,
                suppress_tokens=self.suppress_tokens,
                masks=() if self.allow_mask_token else (vocabulary.mask_id,),
                deprioritized_ids=self.deprioritized_ids,
                ends=self.stop_ids if self.min_new_tokens and modality == Modality.TEXT else (),
                device=device,
            )
        return ranges

    def _draw(
        self,
        passes: ForwardPasses,
        hidden: Tensor,
        still_open: Tensor,
        ranges: dict[Modality, Range],
        progress: Progress,
        generators: RowGenerators,
    ) -> SampledTokens:
        """A token for each open position of the current blocks, its probability and its score.

        still_open  [B, L] bool on the host
        """
        rows, batch = len(still_open), passes.batch
        still_open, progress = still_open[list(passes.rows)], progress.rows(passes.live)
        flat, values = [], []
        for modality, ids in ranges.items():
            marked = batch.host_masks.of_modality(modality)
            in_block = Positions.of(still_open & marked, batch.ids.device)
            early = in_block.early(
                batch.host_masks.target & marked, self.min_new_tokens
            )  # [M] bool
            candidates, runs = (
                in_block.candidates(progress),
                generators.runs(in_block.of_row, passes.rows),
            )
            drawing = runs if self.temperature else generators.together(runs)
            parts = [
                self._read(
                    logits, ids, candidates.some(places), generator, early=numbers_of(early[places])
                )
                for logits, places, generator in in_block.logits(passes, hidden, ids, drawing)
            ]
            token, log_prob, own, read = map(joined, zip(*parts, strict=True))
            score = self._scores(read, replace(candidates, log_prob=log_prob), runs)
            flat.append(in_block.flat)
            values.append((token + ids.start, score, log_prob.exp(), own))
        token, score, probability, own = map(joined, zip(*values, strict=True))
        drawn = SampledTokens.at(
            joined(flat),
            still_open.shape,
            ids=token,
            score=score,
            probability=probability,
            log_prob=own,
        )
        return drawn.among(passes.live, rows)

    def _read(
        self,
        logits: Tensor,
        ids: Range,
        candidates: Candidates,
        generator: torch.Generator,
        *,
        early: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Logits [m, R] -> drawn token, its log probability for the order and its own [m].

        And what the order reads of these logits, [m, ...].

        early  [n] int64 on the host, which of them do not end a text
        """
        allowed = ids.allowed(logits.float(), early)
        drawable = ids.drawable(allowed)
        token = self._categorical(drawable, generator)  # [m]
        own = _log_prob(drawable, token)
        if self.score_after_temperature:
            logits = self._tempered(ids.preferred(drawable)).float()
        else:
            logits = ids.preferred(allowed)
        log_prob = own if logits is drawable else _log_prob(logits, token)
        candidates = replace(candidates, logits=logits, log_prob=log_prob)
        return token, log_prob, own, self.order.read(candidates)

    def _scores(
        self, read: Tensor, candidates: Candidates, runs: list[tuple[int, torch.Generator]]
    ) -> Tensor:
        """[M] float64, what the order gives in any dtype; each generator draws for its run."""
        scores, start = [], 0
        for count, generator in runs:
            run = slice(start, start + count)
            some = candidates.some(run)
            score = self.order.scores(read[run], some, generator=generator)
            _check_shape(score, some.column, of=f"{type(self.order).__name__}.score")
            scores.append(score.double())
            start += count
        return torch.cat(scores)

    def _categorical(self, logits: Tensor, generator: torch.Generator) -> Tensor:
        """[m, R] -> [m] by Gumbel-max in float64; float32 loses rare tokens (arXiv:2409.02908)."""
        if self.temperature == 0.0:
            return logits.argmax(-1)
        tempered = self._tempered(logits)
        return gumbel_like(tempered, generator).add_(tempered).argmax(-1)

    def _tempered(self, logits: Tensor) -> Tensor:
        """[M, R] logits under temperature, top-k and top-p, float64; at temperature 0 as at 1."""
        logits = logits.double() / (self.temperature or 1.0)
        restrictions = (self._in_top_k, self._in_top_p)
        for restricted in reversed(restrictions) if self.top_p_first else restrictions:
            logits = restricted(logits)
        return logits

    def _in_top_k(self, logits: Tensor) -> Tensor:
        if self.top_k is None or self.top_k >= logits.shape[-1]:
            return logits
        least = logits.topk(self.top_k, dim=-1).values[:, -1:]
        return logits.masked_fill(logits < least, -math.inf)

    def _in_top_p(self, logits: Tensor) -> Tensor:
        if self.top_p is None or self.top_p >= 1:
            return logits
        ordered, index = logits.sort(dim=-1, descending=True)
        probability = ordered.softmax(-1)
        dropped = probability.cumsum(-1) - probability >= self.top_p  # by the mass before each
        return logits.masked_fill(dropped.scatter(-1, index, dropped), -math.inf)


def _log_prob(logits: Tensor, token: Tensor) -> Tensor:
    """Logits [M, R] -> [M] log probability of the tokens [M]."""
    return logits.gather(-1, token[:, None]).squeeze(-1) - logits.logsumexp(-1)


def _check_shape(found: Tensor, wanted: Tensor, *, of: str) -> None:
    """Raise ValueError where a part of a user's own gives a tensor of another shape."""
    if found.shape != wanted.shape:
        raise ValueError(
            f"sampler: {of} gave a tensor of shape {tuple(found.shape)}, but {tuple(wanted.shape)} "
            "was asked for; mend it"
        )


def _check_ranges(host_masks: HostMasks, vocabulary: Vocabulary) -> None:
    for modality in GENERATED:
        start, stop = vocabulary.range(modality)
        if start == stop and (host_masks.target & host_masks.of_modality(modality)).numpy().any():
            raise ValueError(
                f"sampler: the batch asks for {modality.name} tokens, but the model's vocabulary "
                "has none; take a model that was trained with them"
            )
