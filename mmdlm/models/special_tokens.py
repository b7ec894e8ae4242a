"""Mask and padding by name in the text tokenizers that are written, for other libraries."""

from __future__ import annotations

import copy
import json

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from mmdlm.core.vocabulary import Vocabulary

# Of ids behind the text, which a tokenizer trained here does not know.
MASK, PAD = "[MASK]", "[PAD]"


def with_special_tokens(
    tokenizer: PreTrainedTokenizerFast, vocabulary: Vocabulary
) -> PreTrainedTokenizerFast:
    """Return a copy of a tokenizer whose mask and padding have the ids of the vocabulary.

    An id that the tokenizer knows keeps its name. Ids right behind its own get the names `MASK`
    and `PAD`; an id further behind gets none.

    Args:
        tokenizer: Of the text.
        vocabulary: Of the model.

    Returns:
        The copy.
    """
    found = copy.deepcopy(tokenizer)
    wanted = {"mask_token": (vocabulary.mask_id, MASK), "pad_token": (vocabulary.pad_id, PAD)}
    for role, (id, name) in wanted.items():
        if getattr(found, f"{role}_id") == id:
            continue
        known = found.backend_tokenizer.id_to_token(id)
        if known is None and id == len(found) and name not in found.get_vocab():
            known = name
        if known is not None:
            found.add_special_tokens({role: known})
    return found


def of_text_only(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Return a tokenizer without the names that were added behind its text, in place.

    So the ids of our own code are those of the text: a word that is added becomes the next of them.
    """
    size, known = len(tokenizer), tokenizer.get_vocab()
    behind = {name for name, id in ((MASK, size - 2), (PAD, size - 1)) if known.get(name) == id}
    if len(behind) < 2:
        return tokenizer
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    content["added_tokens"] = [
        one for one in content["added_tokens"] if one["content"] not in behind
    ]
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.mask_token = tokenizer.pad_token = None
    return tokenizer
