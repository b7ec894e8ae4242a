"""Score given texts: how likely a model holds a continuation to be."""

from __future__ import annotations

from collections import abc
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from mmdlm.core.likelihood.base import LikelihoodEstimator
from mmdlm.core.likelihood.distinct_rows import DistinctRows
from mmdlm.core.likelihood.elbo import Elbo
from mmdlm.core.likelihood.enumeration import EnumeratedElbo
from mmdlm.core.likelihood.greedy import is_greedy
from mmdlm.core.likelihood.noisy_view import NoisyView
from mmdlm.core.sampling.generators import Generators, check_generators
from mmdlm.core.sequence import Sequence, collate
from mmdlm.pipeline.checks import check_whole_number
from mmdlm.pipeline.engine import SEED, Engine
from mmdlm.templates.conversation import ASSISTANT, Message, turns_of
from mmdlm.templates.infill import shortened
from mmdlm.templates.segments import continued
from mmdlm.templates.task_prompt import TaskPrompt

DRAWS = 8  # independent ones, from whose spread the standard error comes
Context = str | abc.Sequence[Message]


class LogLikelihood(NamedTuple):
    """How likely a model holds a continuation to be.

    Attributes:
        value: Estimate of log p(continuation given context), in nats.
        standard_error: Of the estimate; 0 where nothing was drawn.
        tokens: Of the continuation.
        is_greedy: Whether the model writes the continuation if each step commits the most likely
            token of the place where it is surest.
    """

    value: float
    standard_error: float
    tokens: int
    is_greedy: bool


@dataclass(frozen=True)
class _Copies:
    """The noisy copies of one document by which it is scored, each once.

    Attributes:
        document: The document.
        x_t: [U, L] int64.
        covered: [U, L] bool.
        weight: [R, V, L] of V views in each of R draws.
        copy_of: [R, V] int64, the number of the copy that is the view.
    """

    document: Sequence
    x_t: Tensor
    covered: Tensor
    weight: Tensor
    copy_of: Tensor

    @classmethod
    def of(cls, document: Sequence, draws: list[tuple[NoisyView, ...]]) -> _Copies:
        """Find the copies that differ among all views."""
        x_t, covered, weight = (
            torch.cat([getattr(view, name) for views in draws for view in views])
            for name in ("x_t", "covered", "weight")
        )
        both, copy_of = torch.cat([x_t, covered.long()], 1).unique(dim=0, return_inverse=True)
        x_t, covered = both.chunk(2, 1)
        shape = (len(draws), -1)
        return cls(document, x_t, covered.bool(), weight.unflatten(0, shape), copy_of.view(shape))

    def keys(self) -> list[bytes]:
        """Return what tells each copy from others, of other documents too."""
        return [row.tobytes() for row in self.x_t.numpy()]

    def estimate(self, log_prob: Tensor) -> tuple[float, float]:
        """Return the mean over the draws and its standard error, by log p [U, L] of the copies."""
        totals = (self.weight.double() * log_prob.double()[self.copy_of]).sum((1, 2))  # [R]
        error = totals.std() / len(totals) ** 0.5 if len(totals) > 1 else torch.zeros(())
        return float(totals.mean()), float(error)


_Row = tuple[bytes, _Copies, int]  # what tells a copy from others, whose it is, and its number


@dataclass(frozen=True, eq=False)
class Scoring(Engine):
    """The tasks of a model that score given texts."""

    @torch.no_grad()
    def loglikelihood(
        self,
        pairs: abc.Sequence[tuple[Context, str]],
        *,
        estimator: LikelihoodEstimator | None = None,
        samples: int = 128,
        batch_size: int = 16,
        generator: Generators | None = None,
    ) -> list[LogLikelihood]:
        """Estimate how likely each continuation is, given its context.

        A document ends with its continuation: it is laid out as `complete` and `chat` lay out a
        text with room for so many new tokens. Each pair is scored as in a call of its own, whatever
        stands beside it and whatever `batch_size` is, up to the rounding of floats.

        Args:
            pairs: (context, continuation). A context is a text, as in `complete`; "" is none; or
                messages, as in `chat`; a last one of the assistant is the beginning of the turn
                that the continuation goes on with. Blanks at the end of a text go to the
                continuation.
            estimator: An estimator of `mmdlm.core.likelihood`; None: the evidence lower bound, by
                `EnumeratedElbo` where that needs no more than `samples` copies (continuations of up
                to 7 tokens), else by `Elbo`.
            samples: Noisy copies of each pair, but at least two draws of the estimator. Equal
                copies are computed once: those of other pairs too, such as the answers of a
                question that have as many tokens, if they stand near each other.
            batch_size: Rows of a forward pass, equal ones not counted.
            generator: Random numbers, or a list of one generator for each pair; None: a fresh one
                of seed 0 for each.

        Returns:
            One record for each pair: value, standard error, tokens, whether it is greedy.

        Raises:
            ValueError: For an empty continuation, a text that is too long, or a number below 1.

        Source: arXiv:2502.09992, appendix B.5.
        """
        check_whole_number("samples", samples, least=2)
        check_whole_number("batch_size", batch_size, least=1)
        documents = [self._scored_document(*_pair(pair)) for pair in pairs]
        seeds = _seeds(generator, len(documents))
        found: dict[int, LogLikelihood] = {}
        self.placed(self.denoiser)
        assert self.packed is not None
        self.packed.renew()
        with self.packed:
            # long ones first: rows of a pass are of nearly one length, and memory runs out at once
            longest_first = sorted(range(len(documents)), key=lambda n: (-len(documents[n]), n))
            chunk: list[int] = []
            copies: list[_Copies] = []
            distinct: set[bytes] = set()
            for place, number in enumerate(longest_first, 1):
                chunk.append(number)
                copies.append(self._copies(documents[number], estimator, samples, seeds[number]))
                distinct.update(copies[-1].keys())
                if place == len(documents) or len(distinct) >= batch_size:
                    scores = self._scores(estimator or Elbo(), copies, batch_size)
                    greedy = self._greedy([documents[one] for one in chunk], batch_size)
                    for one, some, score, sure in zip(chunk, copies, scores, greedy, strict=True):
                        tokens = int(some.covered.any(0).sum())
                        found[one] = LogLikelihood(*some.estimate(score), tokens, sure)
                    chunk, copies, distinct = [], [], set()
        return [found[number] for number in range(len(documents))]

    def _scored_document(self, context: Context, continuation: str) -> Sequence:
        """Lay out a context and its continuation, which is the target."""
        codec, template = self.codec, self.prompt_template
        if isinstance(context, str):
            template.require("complete", self.text_tokenizer)
            context, ids = _split(codec.encode, codec.follows, context, continuation)
            self._check_continuation(ids, continuation)
            prompt = template.completion_prompt(codec, context, length=len(ids))
        else:
            template.require("chat", self.text_tokenizer)
            *before, last = context or [{}]
            begun = last.get("content", "") if last.get("role") == ASSISTANT else ""
            ids = codec.encode(continuation)
            self._check_continuation(ids, continuation)
            turns = turns_of(before if begun else context, [])
            prompt = template.chat_prompt(codec, turns, length=len(ids))
            if begun:
                prompt = continued(prompt, codec.encode(begun))
        return _with_target(self.fitting(prompt, len(ids)), ids)

    def _check_continuation(self, ids: list[int], continuation: str) -> None:
        if not ids:
            raise ValueError(f"continuation {continuation!r} has no tokens; give it at least one")
        self.check_new_tokens(len(ids))

    def _copies(
        self,
        document: Sequence,
        estimator: LikelihoodEstimator | None,
        samples: int,
        generator: torch.Generator,
    ) -> _Copies:
        """Draw the noisy copies of a document on the CPU, the same for every device."""
        vocabulary = self.denoiser.vocabulary
        batch = collate([document], vocabulary)
        least = 2
        if estimator is None:
            if EnumeratedElbo.count(int(batch.target.sum())) <= samples:
                estimator, least = EnumeratedElbo(), 1
            else:
                estimator = Elbo(repeats=1, strata=max(1, samples // DRAWS))
        draws = list(estimator.draw(batch, vocabulary, generator=generator))
        more = max(least, samples // len(draws[0])) - 1
        if more and least > 1:
            draws += estimator.draw(batch, vocabulary, generator=generator, iterations=more)
        return _Copies.of(document, draws)

    def _scores(
        self, estimator: LikelihoodEstimator, copies: list[_Copies], batch_size: int
    ) -> list[Tensor]:
        """Return log p [U, L] on the CPU of the covered tokens of each document's U copies."""
        vocabulary = self.denoiser.vocabulary
        rows = [(key, some, number) for some in copies for number, key in enumerate(some.keys())]
        scores: list[Tensor] = []
        for here in _passes(rows, batch_size):
            batch = collate([some.document for _, some, _ in here], vocabulary)
            x_t, covered = batch.ids.clone(), torch.zeros_like(batch.target)
            for row, (_, some, number) in enumerate(here):
                x_t[row, : some.x_t.shape[1]] = some.x_t[number]
                covered[row, : some.x_t.shape[1]] = some.covered[number]
            view = NoisyView(*(one.to(self.device) for one in (x_t, covered, covered.float())))
            (log_prob,) = estimator.scores(
                DistinctRows(self.denoiser), batch.to(self.device), [view]
            ).log_prob.cpu()
            scores += [
                row[: some.x_t.shape[1]] for row, (_, some, _) in zip(log_prob, here, strict=True)
            ]
        each = iter(scores)
        return [torch.stack([next(each) for _ in some.x_t]) for some in copies]

    def _greedy(self, documents: list[Sequence], batch_size: int) -> Iterator[bool]:
        for start in range(0, len(documents), batch_size):
            batch = collate(documents[start : start + batch_size], self.denoiser.vocabulary)
            denoiser = DistinctRows(self.denoiser)
            yield from is_greedy(denoiser, batch.to(self.device)).tolist()


def _passes(rows: list[_Row], batch_size: int) -> Iterator[list[_Row]]:
    """Cut rows into passes of `batch_size` that differ, and all that are equal to one of them."""
    some: list[_Row] = []
    distinct: set[bytes] = set()
    for row in rows:
        if row[0] not in distinct and len(distinct) == batch_size:
            yield some
            some, distinct = [], set()
        some.append(row)
        distinct.add(row[0])
    if some:
        yield some


def _pair(pair: object) -> tuple[Context, str]:
    """Return the two parts of a pair; ValueError for anything else."""
    if not isinstance(pair, tuple | list) or len(pair) != 2 or not isinstance(pair[1], str):
        raise ValueError(f"{shortened(repr(pair))} is no pair; give (context, continuation)")
    context, continuation = pair
    return context, continuation


def _seeds(given: Generators | None, count: int) -> list[torch.Generator]:
    """Return a generator of its own on the CPU for each pair."""
    if given is None:
        return [torch.Generator().manual_seed(SEED) for _ in range(count)]
    check_generators(given, count)
    each = [given] * count if isinstance(given, torch.Generator) else list(given)
    return [
        torch.Generator().manual_seed(
            int(torch.randint(2**63 - 1, (), generator=one, device=one.device))
        )
        for one in each
    ]


def _split(
    encode: abc.Callable[[str], list[int]],
    follows: abc.Callable[[str, list[int]], list[int]],
    context: str,
    continuation: str,
) -> tuple[str, list[int]]:
    """Return the context without blanks at its end, and the ids of the continuation behind it.

    They are those of the whole text, as harnesses have it, unless a token crosses the border.
    """
    kept = context.rstrip()
    continuation = context[len(kept) :] + continuation
    before, whole = encode(kept), encode(kept + continuation)
    if whole[: len(before)] == before:
        return kept, whole[len(before) :]
    return kept, follows(continuation, before)


def _with_target(prompt: TaskPrompt, ids: list[int]) -> Sequence:
    """Put the continuation in the place of what the prompt asks for."""
    (place,) = prompt.output_segments
    segments = list(prompt.sequence.segments)
    if len(segments[place].ids) != len(ids):
        raise ValueError(
            f"the continuation has {len(ids)} tokens, but behind its context there is room for "
            f"{len(segments[place].ids)}; shorten one of them"
        )
    segments[place] = replace(segments[place], ids=torch.tensor(ids))
    return Sequence(tuple(segments))
