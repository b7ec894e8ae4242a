"""The vocabulary of a converted checkpoint: a mask token, image codes, and rows for them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from mmdlm.core.vocabulary import Vocabulary

MASK_TOKEN = "<|mask|>"
SPREAD = 0.1  # noise of new rows, as a share of the rows' own standard deviation
ROWS_AT_ONCE = 8192


def load_source_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Load the tokenizer of a foreign folder, with the special tokens of its own class.

    The file tokenizer.json says how text is cut; what only the class knows (BERT's [MASK]) is taken
    from there.
    """
    names = ("tokenizer.json", "vocab.json", "vocab.txt", "tokenizer.model", "spiece.model")
    if not any((folder / name).is_file() for name in names):
        raise ValueError(
            f"{folder} has no text tokenizer (none of {', '.join(names)}); copy or download it"
        )
    try:
        own = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        if not (folder / "tokenizer.json").is_file():
            return own
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    except Exception as error:  # tokenizers raises bare Exception
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{folder}: its tokenizer cannot be read ({reason})") from error
    for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"):
        attribute = f"{name}_token"
        if getattr(tokenizer, attribute) is None and getattr(own, attribute, None) is not None:
            setattr(tokenizer, attribute, getattr(own, attribute))
    return tokenizer


def give_mask(
    tokenizer: PreTrainedTokenizerFast, rows: int, *, mask_token: str, image_codes: int
) -> Vocabulary:
    """Return the denoiser's vocabulary; adds a missing mask or end token to the tokenizer.

    Args:
        tokenizer: Of the text; it is changed.
        rows: Of the embedding.
        mask_token: What the tokenizer gets as its mask, unless it has one.
        image_codes: Ids of an image tokenizer, behind the text.

    Returns:
        Ranges of ids of text, images and specials.
    """
    if tokenizer.eos_token is None:
        if tokenizer.sep_token is None:
            raise ValueError("the tokenizer has no end of text; set its eos_token")
        tokenizer.eos_token = tokenizer.sep_token  # an encoder's texts end there
    known = max(tokenizer.get_vocab().values()) + 1
    if known > rows:
        raise ValueError(
            f"the tokenizer has ids up to {known - 1}, but the embedding {rows} rows; give the "
            "tokenizer that the model was trained with"
        )
    if tokenizer.mask_token is None:
        tokenizer.add_special_tokens({"mask_token": mask_token})
    mask_id, eos_id = int(tokenizer.mask_token_id), int(tokenizer.eos_token_id)
    pad_id = tokenizer.pad_token_id
    size = max(rows, mask_id + 1)
    begin, end = (size, size + 1) if image_codes else (None, None)
    first_code = size + 2 if image_codes else size
    return Vocabulary(
        size=first_code + image_codes,
        text=(0, max(known, mask_id + 1)),
        image=(first_code, first_code + image_codes),
        mask_id=mask_id,
        pad_id=eos_id if pad_id is None else int(pad_id),
        eos_id=eos_id,
        begin_image_id=begin,
        end_image_id=end,
    )


@dataclass(frozen=True)
class Growth:
    """New rows of tensors that have one for each id.

    Attributes:
        mean_rows: Rows up to here are the mean of the old ones, later ones have noise.
        generator: Of the noise.
    """

    mean_rows: int
    generator: torch.Generator

    def __call__(self, tensor: Tensor, rows: int) -> Tensor:
        """[R, ...] -> [rows, ...]; the old rows stay as they are."""
        missing = rows - len(tensor)
        if missing == 0:
            return tensor
        mean, spread = _moments(tensor)
        new = mean.expand(missing, *tensor.shape[1:]).clone()
        noisy = min(missing, rows - max(self.mean_rows, len(tensor)))
        if noisy > 0:
            noise = torch.randn(noisy, *tensor.shape[1:], generator=self.generator)
            new[missing - noisy :] += SPREAD * spread * noise
        return torch.cat((tensor, new.to(tensor.dtype)))


def _moments(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the rows, float32, without a float32 copy of them all."""
    total = torch.zeros(tensor.shape[1:], dtype=torch.float64)
    squares = torch.zeros_like(total)
    for rows in tensor.split(ROWS_AT_ONCE):
        total += rows.double().sum(0)
        squares += rows.double().square().sum(0)
    mean = total / len(tensor)
    variance = (squares / len(tensor) - mean.square()).clamp_min(0)
    return mean.float(), variance.sqrt().float()
