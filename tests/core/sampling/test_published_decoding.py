"""The loops of published systems, written out plainly, against the one sampler, token for token.

Each takes the most likely token, since only the random streams differ otherwise. They look for
masks by comparing ids, as the originals do: a mask token that was drawn is a mask again.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from mmdlm.core.diffusion.schedule import Cosine, Linear, Shifted
from mmdlm.core.sampling.guidance import ClassifierFreeGuidance
from mmdlm.core.sampling.order import (
    Confidence,
    Entropy,
    LeftToRight,
    Margin,
    Order,
    Probability,
    Random,
)
from mmdlm.core.sampling.sampler import Sampler
from mmdlm.core.sampling.unmasking import (
    Ancestral,
    CatchUpTransfer,
    PlannedTransfer,
    Progress,
    ScheduledTransfer,
    Threshold,
)
from mmdlm.core.sequence import Batch, Sequence, collate, text_segment
from mmdlm.pipeline.generation_config import GenerationConfig
from mmdlm.templates.dream import DECODING as DREAM
from tests.core.fakes import (
    TEXT,
    VOCABULARY,
    Factorized,
    TinyDenoiser,
    copies,
    document,
    rng,
)

MASK = VOCABULARY.mask_id
Logits = Callable[[Tensor], Tensor]


def texts(length: int, *, seed: int, rows: int = 2) -> Batch:
    """Rows of a prompt of 4 and `length` tokens to fill."""
    prompts = torch.randint(TEXT, (rows, 4), generator=rng(seed))
    return collate(
        [
            Sequence((text_segment(prompt), text_segment([0] * length, target=True)))
            for prompt in prompts
        ],
        VOCABULARY,
    )


class HalfDenoiser(TinyDenoiser):
    """Its logits are rounded to bfloat16, so that many of them are equal."""

    def logits_at(
        self, hidden: Tensor, positions: Tensor, *, ids: tuple[int, int] | None = None
    ) -> Tensor:
        return super().logits_at(hidden, positions, ids=ids).bfloat16()


def model(
    batch: Batch, *, seed: int, scale: float = 2.0, kind: type[TinyDenoiser] = TinyDenoiser
) -> tuple[TinyDenoiser, Logits]:
    """A denoiser, and the same as a function: ids [B, L] -> logits [B, L, V]."""
    denoiser = kind(seed=seed, scale=scale)
    everywhere = torch.ones_like(batch.target)

    @torch.no_grad()
    def logits(x: Tensor) -> Tensor:
        return denoiser.logits_at(denoiser.hidden(x, batch), everywhere).unflatten(0, x.shape)

    return denoiser, logits


def masked(batch: Batch) -> Tensor:
    return batch.ids.masked_fill(batch.target, MASK)


# ---- LLaDA, and the understanding of MMaDA, Lumina-DiMOO and LLaDA-V -----------------------------


def llada(
    logits: Logits,
    x: Tensor,
    *,
    prompt: int,
    steps: int,
    block_length: int,
    cfg: float = 0.0,
    last_ids: tuple[int, ...] = (),
) -> Tensor:
    """The counts of a block are fixed when it begins; a mask drawn may be drawn over later."""
    given = x != MASK
    blocks = (x.shape[1] - prompt) // block_length
    per_block = steps // blocks
    for block in range(blocks):
        end = prompt + (block + 1) * block_length
        for step in range(per_block):
            scores = logits(x)
            if cfg:
                bare = logits(x.masked_fill(given, MASK))
                scores = bare + (cfg + 1) * (scores - bare)
            best = scores.argmax(-1)
            for token in last_ids:
                scores[..., token] = -math.inf
            confidence = scores.double().softmax(-1).gather(-1, best[..., None])[..., 0]
            count = block_length // per_block + (step < block_length % per_block)
            for row in range(len(x)):
                open_ = [i for i in range(end) if x[row, i] == MASK]
                for i in sorted(open_, key=lambda i: -float(confidence[row, i]))[:count]:
                    x[row, i] = best[row, i]
    return x


SETTINGS = [(12, 12), (4, 12), (5, 12), (12, 4), (6, 4), (9, 4), (6, 2), (3, 4)]


@pytest.mark.parametrize("kind", [TinyDenoiser, HalfDenoiser])
@pytest.mark.parametrize("steps, block_length", SETTINGS)
def test_llada(steps: int, block_length: int, kind: type[TinyDenoiser]) -> None:
    left_masked = 0
    for seed in range(30):
        batch = texts(12, seed=seed)
        denoiser, logits = model(batch, seed=seed, kind=kind)
        expected = llada(logits, masked(batch), prompt=4, steps=steps, block_length=block_length)
        sampler = Sampler(
            steps=steps, block_length=block_length, full_vocabulary=True, allow_mask_token=True
        )
        out = sampler(denoiser, batch, generator=rng())
        assert torch.equal(out.ids, expected)
        assert torch.equal(out.steps < 0, ~batch.target | (expected == MASK))
        left_masked += int((expected == MASK).sum())
    assert left_masked > 0  # else the comparison says nothing of masks that are drawn


def test_llada_with_guidance() -> None:
    for seed in range(20):
        batch = texts(12, seed=seed)
        denoiser, logits = model(batch, seed=seed)
        expected = llada(logits, masked(batch), prompt=4, steps=6, block_length=6, cfg=1.5)
        sampler = Sampler(
            steps=6,
            block_length=6,
            guidance=ClassifierFreeGuidance(2.5),
            full_vocabulary=True,
            allow_mask_token=True,
        )
        assert torch.equal(sampler(denoiser, batch, generator=rng()).ids, expected)


@pytest.mark.slow
def test_llada_with_postponed_ids() -> None:
    changed = 0
    for seed in range(20):
        batch = texts(12, seed=seed)
        denoiser, logits = model(batch, seed=seed, scale=1.0)
        sampler = Sampler(steps=12, full_vocabulary=True, allow_mask_token=True)
        free = sampler(denoiser, batch, generator=rng())
        late = tuple(free.ids[free.steps == 0].unique().tolist())
        expected = llada(logits, masked(batch), prompt=4, steps=12, block_length=12, last_ids=late)
        out = replace(sampler, deprioritized_ids=late)(denoiser, batch, generator=rng())
        if not bool((expected == MASK).any()):  # among positions of no confidence ties are ours
            assert torch.equal(out.ids, expected)
            changed += not torch.equal(free.ids, out.ids)
    assert changed > 0


def test_postponed_ids_come_last_but_may_come() -> None:
    logits = torch.zeros(4, VOCABULARY.size)
    logits[:, 3] = torch.tensor([9.0, 0.0, 9.0, 0.0])
    logits[:, 5] = torch.tensor([0.0, 2.0, 0.0, 4.0])
    batch = collate([Sequence((text_segment([0] * 4, target=True),))], VOCABULARY)
    for order in (Confidence(), Probability()):
        sampler = Sampler(steps=4, order=order, deprioritized_ids=(3,))
        out = sampler(Factorized(logits), batch, generator=rng())
        assert out.ids.tolist() == [[3, 5, 3, 5]]
        assert out.steps.tolist() == [[2, 1, 3, 0]]
    sure = Sampler(steps=4, unmasking=Threshold(0.5), deprioritized_ids=(3,))
    assert sure(Factorized(logits), batch, generator=rng()).steps.tolist()[0][0] > 0


# ---- Dream ---------------------------------------------------------------------------------------


def dream(
    logits: Logits,
    x: Tensor,
    *,
    steps: int,
    alg: str,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int | None = None,
    eps: float = 1e-3,
) -> Tensor:
    """`temperature` divides the logits; the draw is the most likely token all the same."""
    times = torch.linspace(1, eps, steps + 1)
    for step in range(steps):
        probability = (logits(x) / temperature).softmax(-1)
        ordered, index = probability.sort(-1, descending=True)
        dropped = (ordered.cumsum(-1) - ordered) > top_p
        probability = probability.masked_fill(dropped.gather(-1, index.argsort(-1)), 0.0)
        if top_k is not None:
            least = probability.topk(top_k, dim=-1).values[..., -1:]
            probability = probability.masked_fill(probability < least, 0.0)
        probability = probability / probability.sum(-1, keepdim=True)
        best = probability.topk(2, dim=-1).values
        confidence = {
            "maskgit_plus": best[..., 0],
            "topk_margin": best[..., 0] - best[..., 1],
            "entropy": (probability * (probability + 1e-10).log()).sum(-1),
        }[alg]
        open_ = x == MASK
        share = 1 - times[step + 1] / times[step]
        for row in range(len(x)):
            n = open_[row].sum()
            count = int(n * share) if step < steps - 1 else int(n)
            surest = confidence[row].masked_fill(~open_[row], -math.inf).topk(count).indices
            x[row, surest] = probability[row, surest].argmax(-1)
    return x


ORDERS = {"maskgit_plus": Confidence(), "topk_margin": Margin(), "entropy": Entropy()}


@pytest.mark.slow
@pytest.mark.parametrize("alg", ORDERS)
@pytest.mark.parametrize("steps", [1, 3, 8, 16, 40])
def test_dream(alg: str, steps: int) -> None:
    drawn, whole = 0, {"full_vocabulary": True, "allow_mask_token": True}
    for seed in range(15):
        batch = texts(16, seed=seed, rows=1)
        denoiser, logits = model(batch, seed=seed, scale=1.0)
        expected = dream(logits, masked(batch), steps=steps, alg=alg)
        sampler = Sampler(steps=steps, order=ORDERS[alg], unmasking=Ancestral(), **whole)
        assert torch.equal(sampler(denoiser, batch, generator=rng()).ids, expected)
        drawn += int((expected == MASK).sum())
    assert drawn or steps > 3


@pytest.mark.parametrize("alg", ORDERS)
@pytest.mark.parametrize("top_p", [0.4, 0.9])
def test_dream_looks_at_the_restricted_probabilities(alg: str, top_p: float) -> None:
    changed = 0
    for seed in range(20):
        batch = texts(16, seed=seed, rows=1)
        denoiser, logits = model(batch, seed=seed, scale=0.3)
        expected = dream(logits, masked(batch), steps=8, alg=alg, top_p=top_p)
        sampler = Sampler(
            steps=8,
            order=ORDERS[alg],
            unmasking=Ancestral(),
            top_p=top_p,
            score_after_temperature=True,
            full_vocabulary=True,
            allow_mask_token=True,
        )
        if alg == "topk_margin" and top_p == 0.4:
            continue  # where one token is left of two positions their order is anybody's
        out = sampler(denoiser, batch, generator=rng())
        assert torch.equal(out.ids, expected)
        free = replace(sampler, score_after_temperature=False)
        changed += not torch.equal(free(denoiser, batch, generator=rng()).steps, out.steps)
    assert changed or alg == "topk_margin"


@pytest.mark.parametrize(("top_k", "top_p"), [(3, 0.5), (4, 0.4)])
def test_dream_takes_top_p_before_top_k(top_k: int, top_p: float) -> None:
    changed = 0
    for seed in range(20):
        batch = texts(16, seed=seed, rows=1)
        denoiser, logits = model(batch, seed=seed, scale=0.3)
        expected = dream(logits, masked(batch), steps=8, alg="entropy", top_p=top_p, top_k=top_k)
        generation_config = GenerationConfig(
            8, **{**DREAM, "temperature": 0.0, "top_p": top_p, "top_k": top_k}
        )
        sampler = replace(generation_config.sampler(), full_vocabulary=True, allow_mask_token=True)
        out = sampler(denoiser, batch, generator=rng())
        assert torch.equal(out.ids, expected)
        other = replace(sampler, top_p_first=False)(denoiser, batch, generator=rng())
        changed += not torch.equal(other.steps, out.steps)
    assert changed


def test_order_after_temperature_sees_what_is_drawn_from() -> None:
    """At temperature 3 the sure position is no longer the one with the likeliest token."""
    logits = torch.full((2, VOCABULARY.size), -50.0)
    logits[0, :2] = torch.tensor([0.0, -2.0])
    logits[1, :9] = torch.tensor([0.0] + [-5.0] * 8)
    batch = collate([Sequence((text_segment([0, 0], target=True),))], VOCABULARY)
    sampler = Sampler(steps=2, order=Entropy(), temperature=3.0)
    before, after = (
        replace(sampler, score_after_temperature=flag)(
            Factorized(logits), batch, generator=rng()
        ).steps.tolist()
        for flag in (False, True)
    )
    assert (before, after) == ([[1, 0]], [[0, 1]])


@pytest.mark.parametrize("steps", [1, 2, 7, 12, 64])
def test_counts_of_dream(steps: int) -> None:
    times = torch.linspace(1, 1e-3, steps + 1)
    size = torch.arange(1, 600)
    expected, open_ = size.clone(), size.clone()
    for step in range(steps):
        expected = expected - (expected * (1 - times[step + 1] / times[step])).long()
        progress = Progress(size, open_, torch.full_like(size, step), torch.full_like(size, steps))
        open_ = Ancestral().remaining(progress, generator=rng())
        assert torch.equal(open_, expected)


def test_a_step_of_dream_may_commit_nothing() -> None:
    batch = texts(3, seed=0, rows=1)
    out = Sampler(steps=9, unmasking=Ancestral())(TinyDenoiser(), batch, generator=rng())
    assert out.steps.max() == 8
    assert len(out.steps[batch.target].unique()) < 9


def test_ancestral_steps_reveal_each_token_on_its_own() -> None:
    n, size, steps = 2000, 10, 4
    batch = copies(Sequence((text_segment([0] * size, target=True),)), n)
    sampler = Sampler(steps=steps, order=Random(), unmasking=Ancestral(Linear(), drawn=True))
    out = sampler(Factorized(torch.zeros(size, VOCABULARY.size)), batch, generator=rng())
    when = torch.nn.functional.one_hot(out.steps, steps).double()  # [n, size, steps]
    torch.testing.assert_close(
        when.mean((0, 1)), torch.full((steps,), 0.25).double(), atol=0.02, rtol=0
    )
    counts = when[..., 0].sum(1)  # binomial, not fixed
    assert float(counts.var()) == pytest.approx(size * 0.25 * 0.75, rel=0.1)
    together = (when[:, 0, 0] * when[:, 1, 0]).mean()
    assert float(together) == pytest.approx(1 / 16, abs=0.02)


def test_constant_noise_draws_positions_from_a_softmax() -> None:
    """Dream's alg_temp: the first position comes from softmax(confidence / alg_temp)."""
    best = torch.tensor([0.9, 0.5, 0.2])
    logits = torch.full((3, VOCABULARY.size), -math.inf)
    rest = ((1 - best) / (TEXT - 1)).log()
    logits[:, :TEXT] = rest[:, None]
    logits[:, 0] = best.log()
    batch = copies(Sequence((text_segment([0] * 3, target=True),)), 6000)
    order: Order = Probability(0.4, "none")
    out = Sampler(steps=3, order=order)(Factorized(logits), batch, generator=rng())
    first = (out.steps == 0).double().mean(0)
    torch.testing.assert_close(first, (best / 0.4).softmax(-1).double(), atol=0.02, rtol=0)


# ---- MMaDA's and Lumina-DiMOO's text-to-image ----------------------------------------------------


def open_of_maskgit(n: int, steps: int) -> list[int]:
    """How many stay open: single precision, one at least, one fewer than before at least."""
    left = [n]
    for step in range(steps):
        ratio = torch.cos(torch.tensor((step + 1) / steps) * math.pi * 0.5)
        left.append(max(1, min(left[-1] - 1, int((n * ratio).floor()))))
    return [*left[:-1], 0]  # the draw of the last step is kept whole


@pytest.mark.slow
def test_counts_of_maskgit() -> None:
    rule = ScheduledTransfer(Cosine(), least=1, strict=True)
    for n in (16, 48, 64, 256, 576, 1024, 4096):
        for steps in range(1, 65):
            plan, open_ = open_of_maskgit(n, steps), n
            for step in range(steps - 1):
                progress = Progress(*(torch.tensor([i]) for i in (n, open_, step, steps)))
                planned = int(rule.remaining(progress, generator=rng()))
                open_ = min(planned, max(open_ - 1, 0))
                # of one token left over the originals redraw until the last step, to no effect
                assert open_ == plan[step + 1] or (open_, plan[step + 1]) == (0, 1)


@pytest.mark.parametrize("steps", [1, 2, 6, 15, 18, 60])
@pytest.mark.parametrize("cfg", [0.0, 3.5])
def test_mmada_images(steps: int, cfg: float) -> None:
    first, stop = VOCABULARY.image
    for seed in range(5):
        batch = collate([document(0, 48, seed=seed, prompt=5)], VOCABULARY)
        denoiser, logits = model(batch, seed=seed)
        x = masked(batch)
        bare = batch.without_context(VOCABULARY)
        for open_ in open_of_maskgit(48, steps)[1:]:
            scores = logits(x)
            if cfg:
                other = logits(torch.where(batch.target, x, bare.ids))
                scores = (1 + cfg) * scores - cfg * other
            probability = scores[0, :, first:stop].softmax(-1)
            places = (x[0] == MASK).nonzero()[:, 0].tolist()
            surest = sorted(places, key=lambda i: -float(probability[i].max()))
            for i in surest[: len(places) - open_]:
                x[0, i] = first + int(probability[i].argmax())
        sampler = Sampler(
            steps=steps,
            unmasking=ScheduledTransfer(Cosine(), least=1, strict=True),
            guidance=ClassifierFreeGuidance(cfg + 1),
        )
        assert torch.equal(sampler(denoiser, batch, generator=rng()).ids, x)


@torch.no_grad()
def test_lumina_edits_with_two_unconditional_branches() -> None:
    """One lacks the text, one the image; their contexts are of other lengths."""
    denoiser = TinyDenoiser()

    def row(text: int, image: int) -> Sequence:
        context = (text_segment(range(text)), *document(0, image).segments[1:4])
        hole = document(0, 6, seed=3).segments[1:4]
        return Sequence((*(replace(s, target=torch.zeros_like(s.target)) for s in context), *hole))

    full, no_text, no_image = row(5, 4), row(1, 4), row(5, 1)
    length = max(len(s) for s in (full, no_text, no_image))
    batch, *others = (collate([s], VOCABULARY, length=length) for s in (full, no_text, no_image))

    def alone(b: Batch) -> Tensor:
        x = b.ids.masked_fill(b.target, MASK)
        return denoiser.logits_at(denoiser.hidden(x, b), b.target, ids=VOCABULARY.image)

    cond, without_text, without_image = (alone(b) for b in (batch, *others))
    expected = cond + 2.5 * (cond - without_text) + 4.0 * (cond - without_image)
    guided = ClassifierFreeGuidance((3.5, 5.0))(denoiser, batch, unconditional=tuple(others))
    denoiser.calls = 0
    hidden = guided.hidden(masked(batch), batch)
    found = guided.logits_at(hidden, batch.target, ids=VOCABULARY.image)
    torch.testing.assert_close(found, expected)
    assert denoiser.calls == 1

    sampler = Sampler(
        steps=4,
        order=Confidence(1.0, "none"),
        unmasking=ScheduledTransfer(Cosine(), least=1, strict=True),
        temperature=1.0,
        guidance=ClassifierFreeGuidance((3.5, 5.0)),
    )
    out = sampler(denoiser, batch, generator=rng(), unconditional=tuple(others))
    assert torch.equal(out.ids[~batch.target], batch.ids[~batch.target])


# ---- LaViDa --------------------------------------------------------------------------------------


def counts_of_lavida(size: int, steps: int, shift: float) -> list[int]:
    steps = min(steps, size)
    t = torch.linspace(0, 1, steps + 1)
    at = [int(i) for i in size * (shift * t / (1 + (shift - 1) * t))]
    at[-1] = size
    counts = [max(1, b - a) for a, b in pairwise(at)]
    i = 0
    while sum(counts) > size:
        if counts[i % steps] > 1:
            counts[i % steps] -= 1
        i += 1
    return counts[::-1]


@pytest.mark.parametrize(
    "shift, expected",
    [(1 / 3, [6, 4, 4, 2, 3, 2, 2] + [1] * 9), (3.0, [1] * 8 + [2, 2, 2, 2, 3, 4, 4, 5])],
)
def test_counts_of_lavida_as_published(shift: float, expected: list[int]) -> None:
    batch = texts(32, seed=0, rows=1)
    sampler = Sampler(steps=16, unmasking=PlannedTransfer(Shifted(shift)))
    out = sampler(TinyDenoiser(), batch, generator=rng())
    assert torch.bincount(out.steps[batch.target]).tolist() == expected


@pytest.mark.parametrize("shift", [1 / 3, 0.7, 1.0, 3.0, 8.0])
def test_counts_of_lavida(shift: float) -> None:
    rule = PlannedTransfer(Shifted(shift))
    for size in (1, 2, 5, 31, 64, 100):
        for steps in (1, 2, 3, 7, 16, 64, 90):
            size_, steps_ = torch.tensor([size]), torch.tensor([steps])
            left = [size] + [
                int(
                    rule.remaining(
                        Progress(size_, size_, torch.tensor([step]), steps_), generator=rng()
                    )
                )
                for step in range(steps)
            ]
            counts = [a - b for a, b in pairwise(left) if a]
            assert counts == counts_of_lavida(size, steps, shift)


# ---- Dimple --------------------------------------------------------------------------------------


def dimple(logits: Logits, x: Tensor, *, steps: int, threshold: float) -> tuple[Tensor, int]:
    """Confident decoding of one row, the surest first in steps that nothing is sure of."""
    times = torch.linspace(1, 1e-3, steps + 1).tolist()
    total = int((x == MASK).sum())
    for step in range(steps):
        best = logits(x)[0].softmax(-1).max(-1)
        places = (x[0] == MASK).nonzero()[:, 0].tolist()
        chosen = [i for i in places if float(best.values[i]) > threshold]
        if step == steps - 1:
            chosen = places
        elif not chosen:
            n = len(places)
            for j in range(step + 1, steps + 1):
                count = n if j == steps else int(n * (1 - times[j] / (n / total)))
                if count >= 1:
                    break
            chosen = sorted(places, key=lambda i: -float(best.values[i]))[:count]
        for i in chosen:
            x[0, i] = best.indices[i]
        if not bool((x == MASK).any()):
            return x, step + 1
    return x, steps


@pytest.mark.parametrize("steps", [1, 4, 9, 24, 40])
@pytest.mark.parametrize("threshold", [0.6, 0.95])
def test_dimple(steps: int, threshold: float) -> None:
    for seed in range(15):
        batch = texts(24, seed=seed, rows=1)
        denoiser, logits = model(batch, seed=seed, scale=1.5)
        expected, taken = dimple(logits, masked(batch), steps=steps, threshold=threshold)
        sampler = Sampler(
            steps=steps,
            unmasking=Threshold(threshold, fallback=CatchUpTransfer(), exclusive=True),
            full_vocabulary=True,
            allow_mask_token=True,
        )
        denoiser.calls = 0
        out = sampler(denoiser, batch, generator=rng())
        assert torch.equal(out.ids, expected)
        assert denoiser.calls == taken


def test_catching_up_ends_with_the_schedule() -> None:
    """Ahead of its schedule a row goes on to the next count below."""
    rule = CatchUpTransfer(Linear())
    progress = Progress(*(torch.tensor([n]) for n in (12, 5, 0, 6)))
    assert int(rule.remaining(progress, generator=rng())) == 4  # 10, 8, 6, 4
    out = Sampler(steps=6, order=LeftToRight(), unmasking=rule)(
        TinyDenoiser(), texts(12, seed=0, rows=1), generator=rng()
    )
    assert torch.bincount(out.steps[out.steps >= 0]).tolist() == [2] * 6
