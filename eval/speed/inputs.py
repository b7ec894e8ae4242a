"""Batches that the speed benchmark works on, and their loss."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer

from data_pipelines.sources.word_problems import read_gsm8k
from mmdlm.core.diffusion.forward import Absorbing, Corruption
from mmdlm.core.diffusion.schedule import Linear
from mmdlm.core.losses.objective import Objective
from mmdlm.core.sequence import Batch, Sequence, collate, image_segments, text_segment
from mmdlm.core.vocabulary import Vocabulary
from mmdlm.models.modeling import MmdlmForMaskedDiffusion


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
    """Mask a share of the targets, each weighted by one over it."""
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
    """Sum the loss over both modalities, of which the batch has one."""
    terms = Objective(Absorbing(Linear())).terms(model, batch, corruption)
    return sum(terms.sums.values(), torch.zeros((), device=batch.ids.device))


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Losses that are equal to 1e-5, relatively."""
    return bool((a - b).abs() <= 1e-5 * b.abs())
