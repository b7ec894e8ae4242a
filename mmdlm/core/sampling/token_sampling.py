"""Draw a token at each open position, with its probability and its score in the order."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from mmdlm.core.host_masks import numbers_of
from mmdlm.core.sampling.forward_passes import ForwardPasses
from mmdlm.core.sampling.generators import RowGenerators, Run
from mmdlm.core.sampling.order import Candidates, Order, gumbel_like
from mmdlm.core.sampling.positions import IdRange, Positions
from mmdlm.core.sampling.unmasking import Progress, check_shape
from mmdlm.core.vocabulary import Modality


@dataclass(frozen=True)
class SampledTokens:
    """What was drawn, all [B, L]; meaningful only at open positions of the current block.

    Attributes:
        ids: Drawn ids, int64.
        score: Score of each position in the order, float64.
        probability: Probability of the drawn token, as the order sees it.
        log_prob: See `mmdlm.core.sampling.sampler.SampleStep`.
    """

    ids: Tensor
    score: Tensor
    probability: Tensor
    log_prob: Tensor

    @classmethod
    def at(cls, flat: Tensor, shape: torch.Size, **values: Tensor) -> SampledTokens:
        """Put values [M] at positions [M], row * L + column; zeros elsewhere."""
        return cls(
            **{
                name: value.new_zeros(shape.numel()).index_copy(0, flat, value).view(shape)
                for name, value in values.items()
            }
        )

    def among(self, live: Tensor, rows: int, length: int) -> SampledTokens:
        """Put what was drawn for the rows `live` among all `rows` rows of `length` tokens."""
        values: dict[str, Tensor] = {f.name: getattr(self, f.name) for f in fields(self)}
        missing = length - self.ids.shape[1]
        if missing:
            values = {name: F.pad(value, (0, missing)) for name, value in values.items()}
        if len(live) == rows:
            return SampledTokens(**values) if missing else self
        return SampledTokens(
            **{
                name: value.new_zeros(rows, *value.shape[1:]).index_copy(0, live, value)
                for name, value in values.items()
            }
        )


@dataclass(frozen=True)
class TokenSampler:
    """Draw tokens from logits; the fields are those of `mmdlm.core.sampling.sampler.Sampler`."""

    order: Order
    temperature: float
    top_k: int | None
    top_p: float | None
    min_new_tokens: int
    score_after_temperature: bool
    top_p_first: bool

    def __call__(
        self,
        passes: ForwardPasses,
        hidden: Tensor,
        still_open: Tensor,
        *,
        ranges: dict[Modality, IdRange],
        progress: Progress,
        generators: RowGenerators,
    ) -> SampledTokens:
        """Draw a token for each open position of the current blocks.

        Args:
            passes: Forward passes of the R rows that are not finished.
            hidden: [R, L, D] their hidden states.
            still_open: [B, L] bool on the host, the open positions of all rows.
            ranges: Ids that a target of each modality may become.
            progress: Of all rows.
            generators: Of all rows.

        Returns:
            Tokens and their scores, [B, L]; meaningful only at open positions.
        """
        (rows, length), batch = still_open.shape, passes.batch
        still_open = still_open[list(passes.rows), : batch.ids.shape[1]]
        progress = progress.rows(passes.live)
        flat, values = [], []
        for modality, ids in ranges.items():
            marked = batch.host_masks.of_modality(modality)
            positions = Positions.of(still_open & marked, batch.ids.device)
            early = positions.early(batch.host_masks.target & marked, self.min_new_tokens)  # [M]
            candidates = positions.candidates(progress)
            runs = generators.runs(positions.of_row, passes.rows)
            drawing = runs if self.temperature else generators.together(runs)
            parts = [
                self._read(
                    logits, ids, candidates.some(part), generator, early=numbers_of(early[part])
                )
                for logits, part, generator in positions.logits(passes, hidden, ids, drawing)
            ]
            token, log_prob, own, read = map(_joined, zip(*parts, strict=True))
            score = self._scores(read, replace(candidates, log_prob=log_prob), runs)
            flat.append(positions.flat)
            values.append((token + ids.start, score, log_prob.exp(), own))
        token, score, probability, own = map(_joined, zip(*values, strict=True))
        drawn = SampledTokens.at(
            _joined(flat),
            still_open.shape,
            ids=token,
            score=score,
            probability=probability,
            log_prob=own,
        )
        return drawn.among(passes.live, rows, length)

    def _read(
        self,
        logits: Tensor,
        ids: IdRange,
        candidates: Candidates,
        generator: torch.Generator,
        *,
        early: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Draw from the logits [m, R] of some candidates.

        Args:
            logits: [m, R].
            ids: What the columns stand for.
            candidates: The m candidates.
            generator: Draws the tokens.
            early: [n] int64 on the host, which of them must not end a text.

        Returns:
            Drawn tokens [m] as columns; their log-probabilities [m] for the order; their own
            log-probabilities [m]; what the order reads of the logits, [m, ...].
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

    def _scores(self, read: Tensor, candidates: Candidates, runs: list[Run]) -> Tensor:
        """Return the scores of the order, [M] float64; each generator draws for its run."""
        scores, start = [], 0
        for count, generator in runs:
            run = slice(start, start + count)
            some = candidates.some(run)
            score = self.order.scores(read[run], some, generator=generator)
            check_shape(score, some.column, of=f"{type(self.order).__name__}.score")
            scores.append(score.double())
            start += count
        return torch.cat(scores)

    def _categorical(self, logits: Tensor, generator: torch.Generator) -> Tensor:
        """Draw [m] from [m, R] by Gumbel-max in float64; float32 loses rare tokens.

        Source: arXiv:2409.02908.
        """
        if self.temperature == 0.0:
            return logits.argmax(-1)
        tempered = self._tempered(logits)
        return gumbel_like(tempered, generator).add_(tempered).argmax(-1)

    def _tempered(self, logits: Tensor) -> Tensor:
        """Apply temperature, top-k and top-p to [M, R]: float64; temperature 0 counts as 1."""
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


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Concatenate tensors, without a copy of a single one."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _log_prob(logits: Tensor, token: Tensor) -> Tensor:
    """Return the log-probability [M] of the tokens [M] under the logits [M, R]."""
    return logits.gather(-1, token[:, None]).squeeze(-1) - logits.logsumexp(-1)
