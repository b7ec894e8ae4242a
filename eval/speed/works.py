"""The rows of the speed benchmark: the same work, done in several ways."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from eval.speed import reference_impl as plain
from eval.speed.inputs import close, conversations, corrupted, image_batch, our_loss, text_batch
from mmdlm.core.diffusion.schedule import Cosine
from mmdlm.core.kernels.linear import PackedLayers
from mmdlm.core.sampling.cache import Dual, Prefix, Stable
from mmdlm.core.sampling.guidance import ClassifierFreeGuidance
from mmdlm.core.sampling.sampler import Sampler
from mmdlm.core.sampling.unmasking import ScheduledTransfer
from mmdlm.core.sequence import Batch, Sequence, collate, pack
from mmdlm.core.vocabulary import Modality, Vocabulary
from mmdlm.models.configuration import MmdlmConfig
from mmdlm.models.costs import Costs, Pass
from mmdlm.models.modeling import MmdlmForMaskedDiffusion

Part = Literal["text", "large_vocabulary", "image", "training", "packing", "growth"]
PARTS: tuple[Part, ...] = ("text", "large_vocabulary", "image", "training", "packing", "growth")
SHAPES = {  # width, layers, inner width, heads
    "tiny": (64, 2, 128, 4),
    "S": (512, 12, 1536, 8),
    "M": (1024, 24, 2816, 16),
    "L": (2048, 16, 5632, 16),
    "XL": (4096, 32, 12288, 32),
}
SPECIAL = 4  # ids of a vocabulary beside text and codes
PLAIN = "plain"


@dataclass(frozen=True)
class Variant:
    """One way to do a piece of work.

    Attributes:
        run: Does it once; what it returns is compared with what `plain` returns.
        floor: Passes of which the machine says how long they take at least; None: not known.
        target: How many times as fast as plain it is to be: the aim; None: there is none.
        exact: Whether it must give what plain gives.
    """

    run: Callable[[], Any]
    floor: list[Pass] | None = None
    target: float | None = None
    exact: bool = False


@dataclass(frozen=True)
class Work:
    """One row of the table: the same work done in several ways, the plain one among them.

    Attributes:
        unit: What `amount` counts.
        amount: Done in one run, of all variants alike, or of each.
        same: Whether two results are the same.
        model: That is trained, whose gradients count to the memory of a run; None: none is.
    """

    name: str
    variants: dict[str, Variant]
    unit: str
    amount: float | Mapping[str, float]
    same: Callable[[Any, Any], bool] = field(default=torch.equal)
    model: MmdlmForMaskedDiffusion | None = None

    def amount_of(self, name: str) -> float:
        """Return the amount of work of a variant in one run."""
        return self.amount[name] if isinstance(self.amount, Mapping) else self.amount


@dataclass(frozen=True)
class Bench:
    """Models of one shape on one device, and how often each work is timed.

    Attributes:
        ids: Of the text of a small vocabulary.
        many_ids: Of the text of a large one, which has `codes` besides: MMaDA's sizes.
    """

    shape: str
    device: torch.device
    dtype: torch.dtype
    repeats: int
    ids: int = 24_576 - SPECIAL
    many_ids: int = 126_460
    codes: int = 8192

    def model(self, *, text: int, codes: int = 0) -> MmdlmForMaskedDiffusion:
        """With random weights, far enough from each other that no two logits tie."""
        width, layers, inner, heads = SHAPES[self.shape]
        vocabulary = Vocabulary.build(text_size=text, eos_id=0, image_codes=codes)
        config = MmdlmConfig(
            vocabulary=vocabulary.to_dict(),
            hidden_size=width,
            intermediate_size=inner,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            max_position_embeddings=4096,
            initializer_range=0.05,
        )
        with torch.random.fork_rng(), torch.device(self.device):
            torch.manual_seed(0)
            return MmdlmForMaskedDiffusion(config).to(self.dtype).eval()

    def works(self, part: Part, gsm8k: Path | None) -> Iterable[Work]:
        """Yield the rows of a part, one model at a time."""
        if part == "text":
            yield self.text(self.model(text=self.ids), (1.8, 3.0, 5.0))
        if part == "large_vocabulary":
            model = self.model(text=self.many_ids, codes=self.codes)
            yield self.text(model, (3.0, None, 8.0))
        if part == "image":
            yield self.image(self.model(text=self.many_ids, codes=self.codes))
        if part == "training":
            model = self.model(text=self.many_ids, codes=self.codes).train()
            yield self.training(model, drawing=True)
            yield self.training(model, drawing=False)
        if part == "packing" and gsm8k is not None:
            yield self.packing(self.model(text=self.ids).train(), gsm8k)

    def text(
        self,
        model: MmdlmForMaskedDiffusion,
        targets: tuple[float | None, float | None, float | None],
        *,
        prompt: int = 128,
        new: int = 128,
        block: int = 32,
        steps: int = 32,
        rows: int = 1,
    ) -> Work:
        """Greedy decoding in blocks: exact, with a prefix cache, with a dual cache."""
        batch = text_batch(model.vocabulary, prompt=prompt, new=new, rows=rows).to(self.device)
        costs = Costs(model.config, self.dtype.itemsize)
        start, stop = model.vocabulary.text
        length, blocks, each = prompt + new, new // block, steps // (new // block)
        open_ = [block - block * step // each for step in range(each)]

        def pass_(computed: int, read: int) -> Pass:
            return costs.forward(
                rows=rows, length=length, computed=computed, read=read, ids=stop - start
            )

        whole = [pass_(length, read) for read in open_]
        exact = blocks * whole
        dual = blocks * [whole[0], *(pass_(block, read) for read in open_[1:])]
        prefix = blocks * whole[:1] + [
            pass_(new - done * block, read) for done in range(blocks) for read in open_[1:]
        ]
        sampler = Sampler(steps=steps, block_length=block)
        run = partial(self.sample, model, batch, PackedLayers(model))
        theirs = plain.in_torchs_layers(model)
        return Work(
            name=f"text: {new} new tokens after {prompt}, {steps} steps, "
            f"V = {model.vocabulary.size:,}",
            variants={
                PLAIN: Variant(lambda: plain.text(theirs, batch, steps=steps, block_length=block)),
                "exact": Variant(partial(run, sampler), exact, targets[0], exact=True),
                "prefix cache": Variant(
                    partial(run, replace(sampler, cache=Prefix())), prefix, targets[1]
                ),
                "dual cache": Variant(
                    partial(run, replace(sampler, cache=Dual())), dual, targets[2]
                ),
            },
            unit="tokens",
            amount=rows * new,
        )

    def image(
        self,
        model: MmdlmForMaskedDiffusion,
        *,
        words: int = 64,
        codes: int = 256,
        steps: int = 16,
        scale: float = 4.5,
    ) -> Work:
        """Draw an image from words under guidance, greedily: exact, and with a feature cache."""
        batch = image_batch(model.vocabulary, words=words, codes=codes, rows=1).to(self.device)
        costs = Costs(model.config, self.dtype.itemsize)
        length, ids = batch.ids.shape[1], model.vocabulary.image_codes
        open_ = [math.floor(codes * math.cos(0.5 * math.pi * s / steps)) for s in range(steps)]

        def pass_(computed: int, read: int) -> Pass:
            return costs.forward(rows=2, length=length, computed=computed, read=read, ids=ids)

        cache = Stable()
        kept = []
        for step, read in enumerate(open_):
            refreshed = step < cache.warm_up * steps or step % (cache.refresh or steps) == 0
            fresh = open_[step - 1] - read if step else 0
            some = math.ceil(cache.share * read) + fresh
            kept.append(pass_(length if refreshed else some, read))
        sampler = Sampler(
            steps=steps,
            unmasking=ScheduledTransfer(Cosine(), least=1, strict=True),
            guidance=ClassifierFreeGuidance(scale),
        )
        run = partial(self.sample, model, batch, PackedLayers(model))
        theirs = plain.in_torchs_layers(model)
        return Work(
            name=f"text-to-image: {words} words, {codes} codes of {ids:,} in V = "
            f"{model.vocabulary.size:,}, {steps} steps, guidance",
            variants={
                PLAIN: Variant(
                    lambda: plain.image(theirs, batch, steps=steps, guidance_scale=scale)
                ),
                "exact": Variant(
                    partial(run, sampler), [pass_(length, read) for read in open_], 2.5, True
                ),
                "feature cache": Variant(partial(run, replace(sampler, cache=cache)), kept, 3.5),
            },
            unit="images",
            amount=1,
        )

    def training(self, model: MmdlmForMaskedDiffusion, *, drawing: bool) -> Work:
        """Forward and backward of 4 rows: images from words, or text of which 44 % is masked."""
        vocabulary = model.vocabulary
        modality = Modality.IMAGE if drawing else Modality.TEXT
        if drawing:
            batch = image_batch(vocabulary, words=64, codes=256, rows=4).to(self.device)
            share = 2 / math.pi  # what a cosine schedule masks
        else:
            batch = text_batch(vocabulary, prompt=0, new=512, rows=4).to(self.device)
            share = 0.44
        corruption = corrupted(batch, vocabulary, share=share)
        costs = Costs(model.config, self.dtype.itemsize)
        start, stop = vocabulary.range(modality)
        rows, length = batch.ids.shape
        head = int(corruption.is_noised.sum()) * (stop - start)
        flops = costs.training(tokens=rows * length, pairs=rows * length**2, head=head)
        what = "64 words + 256 codes, drawing" if drawing else "512 tokens, 44 % masked"
        theirs = plain.in_torchs_layers(model)
        all_logits = partial(plain.loss, theirs, batch, corruption, modality)
        return Work(
            name=f"train step: 4 x ({what}), V = {vocabulary.size:,}",
            variants={
                PLAIN: Variant(partial(self.step, model, all_logits)),
                "ours": Variant(
                    partial(self.step, model, partial(our_loss, model, batch, corruption)),
                    [(float(flops), 0)],
                    2.5 if drawing else 1.8,
                    exact=True,
                ),
            },
            unit="tokens",
            amount=rows * length,
            same=close,
            model=model,
        )

    def packing(self, model: MmdlmForMaskedDiffusion, gsm8k: Path) -> Work:
        """Questions and answers of real lengths: padded rows with all logits, and packed rows.

        Target tokens a second: the loss is about the answers.
        """
        vocabulary, length = model.vocabulary, 512
        documents = conversations(gsm8k, vocabulary, count=190)  # as many as a loader packs at once
        padded = collate(documents[:4], vocabulary, length=length).to(self.device)
        rows = pack(documents, vocabulary, length=length)
        self.check_packing(model, documents[:8], length=length)
        some = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:4]
        packed = rows.rows(some).to(self.device)
        fill = float((~rows.is_padding).float().mean())
        both = {
            PLAIN: (padded, corrupted(padded, vocabulary, share=0.5)),
            "ours": (packed, corrupted(packed, vocabulary, share=0.5)),
        }
        batch, corruption = both["ours"]
        place = batch.document + length * torch.arange(4, device=self.device)[:, None]
        lengths = torch.bincount(place[~batch.is_padding])
        flops = Costs(model.config, self.dtype.itemsize).training(
            tokens=int((~batch.is_padding).sum()),
            pairs=int(lengths.square().sum()),
            head=int(corruption.is_noised.sum()) * vocabulary.text[1],
        )
        theirs = plain.in_torchs_layers(model)
        return Work(
            name=f"SFT on GSM8K's lengths, rows of {length} ({fill:.1%} full when packed)",
            variants={
                PLAIN: Variant(
                    partial(
                        self.step,
                        model,
                        lambda: plain.loss(theirs, *both[PLAIN], Modality.TEXT),
                    )
                ),
                "ours": Variant(
                    partial(self.step, model, partial(our_loss, model, batch, corruption)),
                    [(float(flops), 0)],
                    2.5,
                ),
            },
            unit="target tokens",
            amount={name: float(one.target.sum()) for name, (one, _) in both.items()},
            model=model,
        )

    @torch.no_grad()
    def check_packing(
        self, model: MmdlmForMaskedDiffusion, documents: list[Sequence], *, length: int
    ) -> None:
        """Raise ValueError unless documents lose the same padded and packed, all of them masked."""
        vocabulary = model.vocabulary
        padded = collate(documents, vocabulary, length=length).to(self.device)
        packed = pack(documents, vocabulary, length=length).to(self.device)
        padded_noise, packed_noise = (
            corrupted(batch, vocabulary, share=1.0) for batch in (padded, packed)
        )
        if not close(
            our_loss(model, packed, packed_noise),
            plain.loss(model, padded, padded_noise, Modality.TEXT),
        ):
            raise ValueError(f"packed rows of {length} give another loss than padded ones")

    def sample(
        self,
        model: MmdlmForMaskedDiffusion,
        batch: Batch,
        packed: PackedLayers,
        sampler: Sampler,
    ) -> Any:
        """Return the ids that a sampler fills in; the layers were packed before, as on loading."""
        generator = torch.Generator(self.device).manual_seed(0)
        return sampler(model, batch, generator=generator, packed=packed).ids

    def step(self, model: MmdlmForMaskedDiffusion, loss: Callable[[], torch.Tensor]) -> Any:
        """Loss and gradients; returns the loss."""
        model.zero_grad(set_to_none=True)
        value = loss()
        value.backward()
        return value.detach()
