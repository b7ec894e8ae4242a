"""How fast sampling and training are, beside plain code and beside what the machine allows.

python -m eval.speed --config configs/eval/speed.yaml
"""

from __future__ import annotations

import gc
import json
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from statistics import median
from textwrap import wrap
from typing import Any, Literal

import torch
from tokenizers import ByteLevelBPETokenizer
from tqdm import tqdm

from data_pipelines.shards.shards import write_file
from data_pipelines.sources.word_problems import read_gsm8k
from eval.loading import memory
from eval.provenance import describe_hardware
from eval.speed import reference_impl as plain
from mmdlm.cli import recipe as command_line
from mmdlm.core.diffusion.forward import Absorbing, Corruption
from mmdlm.core.diffusion.schedule import Cosine, Linear
from mmdlm.core.kernels.linear import PackedLayers
from mmdlm.core.losses.objective import Objective
from mmdlm.core.sampling.cache import Dual, Prefix, Stable
from mmdlm.core.sampling.guidance import ClassifierFreeGuidance
from mmdlm.core.sampling.sampler import Sampler
from mmdlm.core.sampling.unmasking import ScheduledTransfer
from mmdlm.core.sequence import Batch, Sequence, collate, image_segments, pack, text_segment
from mmdlm.core.vocabulary import Modality, Vocabulary
from mmdlm.models.configuration import MmdlmConfig
from mmdlm.models.costs import Costs, Machine, Pass, synchronize
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

    run     does it once; what it returns is compared with what `plain` returns
    floor   passes of which the machine says how long they take at least; None: not known
    target  how many times as fast as plain it is to be: the aim; None: there is none
    exact   whether it must give what plain gives
    """

    run: Callable[[], Any]
    floor: list[Pass] | None = None
    target: float | None = None
    exact: bool = False


@dataclass(frozen=True)
class Work:
    """One row of the table: the same work done in several ways, the plain one among them.

    unit    what `amount` counts
    amount  done in one run, of all variants alike, or of each
    same    whether two results are the same
    model   that is trained, whose gradients count to the memory of a run; None: none is
    """

    name: str
    variants: dict[str, Variant]
    unit: str
    amount: float | Mapping[str, float]
    same: Callable[[Any, Any], bool] = field(default=torch.equal)
    model: MmdlmForMaskedDiffusion | None = None

    def amount_of(self, name: str) -> float:
        """What a variant does in one run."""
        return self.amount[name] if isinstance(self.amount, Mapping) else self.amount


@dataclass(frozen=True)
class Result:
    """What was measured of a variant; seconds of each run, and bytes beyond what was there."""

    work: str
    variant: str
    seconds: list[float]
    per_second: float
    unit: str
    times_plain: float
    spread: tuple[float, float]
    target: float | None
    share_of_floor: float | None
    same_as_plain: bool | None
    peak_bytes: int | None


def main(
    *,
    out: Path = Path("runs/eval/speed.json"),
    parts: list[Part] | None = None,
    shape: str = "S",
    repeats: int = 5,
    threads: int | None = None,
    gsm8k: Path | None = None,
    device: str = "cpu",
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> None:
    """Time exact and cached sampling and the training step beside plain code of published systems.

    Weights are random: what is measured does not depend on them. Runs of the variants of a row take
    turns; a row shows medians, and the least and the largest ratio of runs that stood side by side.
    So does what the machine reaches, of which follows what a row takes at least.

    Args:
        out: JSON file for the result; a bar chart goes beside it, with .png.
        parts: Rows to measure; default: all, `packing` where --gsm8k is given.
        shape: tiny, S, M, L or XL: width, layers and inner width of the Transformer.
        repeats: Runs of each variant, after one that does not count.
        threads: Of torch, fixed for all; default: as torch has it.
        gsm8k: JSON lines with `question` and `answer`, whose lengths the part `packing` takes.
        device: "cpu" or "cuda".
        dtype: Of the weights.
    """
    if shape not in SHAPES:
        raise ValueError(f"--shape {shape!r} is not one of {', '.join(SHAPES)}")
    if repeats < 1:
        raise ValueError(f"--repeats {repeats} is too few; give 1 or more")
    if parts is None:
        parts = [part for part in PARTS if part != "packing" or gsm8k is not None]
    if "packing" in parts and gsm8k is None:
        raise ValueError("--parts packing needs --gsm8k FILE; give it, or leave the part out")
    if gsm8k is not None:
        read_gsm8k(gsm8k)  # a file that cannot be read is found before an hour is spent
    if threads is not None:
        torch.set_num_threads(threads)
    bench = Bench(shape, torch.device(device), getattr(torch, dtype), repeats)
    results: list[Result] = []
    machines: dict[str, Machine] = {}
    for part in parts:
        for work in bench.works(part, gsm8k):
            found, machine = bench.measure(work)
            results += found
            machines[work.name] = machine
            print(table(found, title=work.name))
            print(
                f"  {machine.flops / 1e9:,.0f} GFLOP/s in matrix products "
                f"({machine.fastest_flops / 1e9:,.0f} by the fastest kernel), "
                f"{machine.bandwidth / 1e9:.1f} GB/s in copies, {torch.get_num_threads()} threads",
                flush=True,
            )
        growth = bench.growth() if part == "growth" else []
        for one in growth:
            print(one.line(), flush=True)
        report = {
            "results": [asdict(one) for one in results],
            "growth": [{**asdict(one), "exponent": one.exponent} for one in growth],
            "machine": {name: asdict(measured) for name, measured in machines.items()},
            "shape": {"name": shape, "dtype": dtype, "repeats": repeats},
            "hardware": describe_hardware(bench.device),
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        write(report, out)  # after each part: nothing is lost
        if results:
            chart(results, out.with_suffix(".png"))
    print(out, *([out.with_suffix(".png")] if results else []), sep="\n")


def write(report: dict[str, Any], path: Path) -> None:
    """As JSON, whole or not at all."""
    content = (json.dumps(report, indent=2) + "\n").encode()
    write_file(path, lambda file: file.write(content))


# ---- the works -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bench:
    """Models of one shape on one device, and how often each work is timed.

    ids       of the text of a small vocabulary
    many_ids  of the text of a large one, which has `codes` besides: MMaDA's sizes
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
        """The rows of a part, one model at a time."""
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
        """An image from words under guidance, drawn greedily: exact, and with a feature cache."""
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
        """The ids that a sampler fills in, from layers packed before as a loaded model has them."""
        generator = torch.Generator(self.device).manual_seed(0)
        return sampler(model, batch, generator=generator, packed=packed).ids

    def step(self, model: MmdlmForMaskedDiffusion, loss: Callable[[], torch.Tensor]) -> Any:
        """Loss and gradients; returns the loss."""
        model.zero_grad(set_to_none=True)
        value = loss()
        value.backward()
        return value.detach()

    # ---- measuring -------------------------------------------------------------------------------

    def measure(self, work: Work) -> tuple[list[Result], Machine]:
        """Run each variant in turn, again and again, and measure the machine beside them."""
        names = list(work.variants)
        outputs = {name: work.variants[name].run() for name in names}  # not counted
        same = {
            name: work.same(outputs[name], outputs[PLAIN])
            for name, variant in work.variants.items()
            if variant.exact
        }
        for name, equal in same.items():
            if not equal:
                raise ValueError(f"{work.name}: {name} gives another result than {PLAIN}")
        seconds: dict[str, list[float]] = {name: [] for name in names}
        peaks = dict.fromkeys(names, 0)
        machines = []
        for _ in tqdm(range(self.repeats), desc=work.name, unit="round", leave=False):
            machines.append(Machine.measure(self.device, self.dtype))
            for name in names:
                gc.collect()
                if work.model is not None:
                    work.model.zero_grad(set_to_none=True)
                before = reset_peak(self.device)
                began = time.perf_counter()
                work.variants[name].run()
                synchronize(self.device)
                seconds[name].append(time.perf_counter() - began)
                peaks[name] = max(peaks[name], peak(self.device) - before)
        first = work.amount_of(PLAIN)
        found = []
        for name, variant in work.variants.items():
            amount = work.amount_of(name)
            ratios = [
                (a / first) / (b / amount)
                for a, b in zip(seconds[PLAIN], seconds[name], strict=True)
            ]
            middle, floor = median(seconds[name]), variant.floor
            found.append(
                Result(
                    work=work.name,
                    variant=name,
                    seconds=[round(one, 5) for one in seconds[name]],
                    per_second=amount / middle,
                    unit=work.unit,
                    times_plain=median(ratios),
                    spread=(min(ratios), max(ratios)),
                    target=variant.target,
                    share_of_floor=None
                    if floor is None
                    else median(
                        machine.seconds(floor) / one
                        for machine, one in zip(machines, seconds[name], strict=True)
                    ),
                    same_as_plain=same.get(name),
                    peak_bytes=peaks[name] if work.model is not None else None,
                )
            )
        return found, Machine.medians(machines)

    def growth(self) -> list[Growth]:
        """Seconds of an answer over length, rows, steps and vocabulary, one varied at a time."""
        found = []
        usual = {"prompt": 128, "rows": 1, "steps": 16, "vocabulary": self.ids + SPECIAL}
        for name, values in (
            ("prompt", (128, 256, 512, 1024)),
            ("rows", (1, 2, 4, 8)),
            ("steps", (8, 16, 32, 64)),
            ("vocabulary", (8192, 24_576, 65_536, 134_656)),
        ):
            seconds: dict[str, list[float]] = {}
            for value in tqdm(values, desc=f"growth with {name}", leave=False):
                given = {**usual, name: value}
                work = self.text(
                    self.model(text=given["vocabulary"] - SPECIAL),
                    (None, None, None),
                    prompt=given["prompt"],
                    steps=given["steps"],
                    rows=given["rows"],
                )
                work.variants["exact"].run()  # not counted: layers are packed
                for variant in (PLAIN, "exact", "dual cache"):
                    began = time.perf_counter()
                    work.variants[variant].run()
                    synchronize(self.device)
                    seconds.setdefault(variant, []).append(time.perf_counter() - began)
            for variant, measured in seconds.items():
                found.append(Growth(name, variant, list(values), measured))
        return found


@dataclass(frozen=True)
class Growth:
    """How the seconds of a variant grow with one quantity; one run of each."""

    quantity: str
    variant: str
    values: list[int]
    seconds: list[float]

    @property
    def exponent(self) -> float:
        """Slope of log seconds over log quantity, by least squares."""
        x = [math.log(one) for one in self.values]
        y = [math.log(one) for one in self.seconds]
        mx, my = sum(x) / len(x), sum(y) / len(y)
        return sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True)) / sum(
            (a - mx) ** 2 for a in x
        )

    def line(self) -> str:
        """For the terminal."""
        pairs = ", ".join(
            f"{value:,}: {seconds:.2f} s"
            for value, seconds in zip(self.values, self.seconds, strict=True)
        )
        return f"{self.variant} over {self.quantity}: {pairs} (exponent {self.exponent:.2f})"


# ---- data ----------------------------------------------------------------------------------------


def text_batch(vocabulary: Vocabulary, *, prompt: int, new: int, rows: int) -> Batch:
    """Random prompts before targets."""
    generator = torch.Generator().manual_seed(1)
    documents = []
    for _ in range(rows):
        ids = torch.randint(*vocabulary.text, (prompt + new,), generator=generator)
        target = torch.arange(prompt + new) >= prompt
        documents.append(Sequence((text_segment(ids, target=target),)))
    return collate(documents, vocabulary)


def image_batch(vocabulary: Vocabulary, *, words: int, codes: int, rows: int) -> Batch:
    """Random words before the codes of an image, which are targets."""
    generator = torch.Generator().manual_seed(1)
    documents = []
    for _ in range(rows):
        ids = torch.randint(*vocabulary.text, (words,), generator=generator)
        drawn = torch.randint(vocabulary.image_codes, (codes,), generator=generator)
        segments = image_segments(drawn, vocabulary, target=True)
        documents.append(Sequence((text_segment(ids), *segments)))
    return collate(documents, vocabulary)


def conversations(path: Path, vocabulary: Vocabulary, *, count: int) -> list[Sequence]:
    """Questions and answers as targets, in the tokens of a byte-level BPE of the file itself."""
    problems = read_gsm8k(path)
    pairs = [(str(one["question"]) + "\n", str(one["answer"])) for one in problems]
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(
        (text for pair in pairs for text in pair),
        vocab_size=min(8192, vocabulary.text[1]),
        show_progress=False,
    )
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(1))
    documents = []
    for n in order[:count].tolist():
        question, answer = (tokenizer.encode(text).ids for text in pairs[n])
        target = text_segment([*answer, vocabulary.eos_id], target=True)
        documents.append(Sequence((text_segment(question), target)))
    return documents


def corrupted(batch: Batch, vocabulary: Vocabulary, *, share: float) -> Corruption:
    """A share of the targets masked, each weighted by one over it."""
    generator = torch.Generator().manual_seed(2)
    draw = torch.rand(batch.ids.shape, generator=generator).to(batch.ids.device)
    masked = batch.target & (draw < share)
    t = torch.full(batch.ids.shape, share, device=batch.ids.device)
    x_t = batch.ids.masked_fill(masked, vocabulary.mask_id)
    return Corruption(
        x_t=x_t,
        is_noised=masked,
        loss_mask=masked,
        t=t,
        p_mask=t,
        slope=torch.ones_like(t),
        weight=1 / t,
    )


def our_loss(model: MmdlmForMaskedDiffusion, batch: Batch, corruption: Corruption) -> torch.Tensor:
    """The sum over both modalities, of which the batch has one."""
    terms = Objective(Absorbing(Linear())).terms(model, batch, corruption)
    return sum(terms.sums.values(), torch.zeros((), device=batch.ids.device))


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Losses that are equal to 1e-5, relatively."""
    return bool((a - b).abs() <= 1e-5 * b.abs())


# ---- memory --------------------------------------------------------------------------------------


def reset_peak(device: torch.device) -> int:
    """Begin to watch for the highest memory -> bytes in use now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the high-water mark is what is in use
    return memory()["VmRSS"]


def peak(device: torch.device) -> int:
    """Highest memory in bytes since `reset_peak`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return memory()["VmHWM"]


# ---- what is shown -------------------------------------------------------------------------------


def table(results: list[Result], *, title: str) -> str:
    """One work: each variant beside the plain one and beside the floor."""
    lines = [f"\n{title}"]
    for one in results:
        low, high = one.spread
        parts = [
            f"  {one.variant:14}{median(one.seconds):9.3f} s{one.per_second:11,.1f} {one.unit}/s"
        ]
        if one.variant != PLAIN:
            parts.append(f"{one.times_plain:6.2f} x plain ({low:.2f} to {high:.2f})")
        if one.target is not None:
            missed = "" if one.times_plain >= one.target else ", missed"
            parts.append(f"aim {one.target} x{missed}")
        if one.share_of_floor is not None:
            parts.append(f"{one.share_of_floor:.0%} of the floor's speed")
        if one.same_as_plain:
            parts.append("the same result")
        if one.peak_bytes is not None:
            parts.append(f"{one.peak_bytes / 1e9:.2f} GB above the weights")
        lines.append(", ".join(parts))
    return "\n".join(lines)


def chart(results: list[Result], path: Path) -> None:
    """Bars of how many times as fast as plain each variant is, with the spread and the aim."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    shown = [one for one in results if one.variant != PLAIN]
    figure, axes = plt.subplots(figsize=(9, 1 + 0.62 * len(shown)), layout="constrained")
    places = range(len(shown), 0, -1)
    values = [one.times_plain for one in shown]
    error = [
        [one.times_plain - one.spread[0] for one in shown],
        [one.spread[1] - one.times_plain for one in shown],
    ]
    axes.barh(places, values, xerr=error, height=0.6, color="#4878a8", ecolor="#22211f", capsize=2)
    for place, one in zip(places, shown, strict=True):
        if one.target is not None:
            axes.plot([one.target] * 2, [place - 0.4, place + 0.4], color="#b3402e", linewidth=2)
        axes.annotate(f" {one.times_plain:.1f} x", (one.spread[1], place), va="center", fontsize=8)
    axes.axvline(1, color="#8d8a84", linewidth=1)
    labels = ["\n".join([one.variant, *wrap(one.work, 48)]) for one in shown]
    axes.set_yticks(list(places), labels)
    axes.tick_params(axis="y", labelsize=6)
    widest = max(one.spread[1] for one in shown)
    axes.set(xlabel="times as fast as plain code; red: the aim", xlim=(0, 1.1 * widest))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    command_line.run(main)
