"""The bodies of answers, as OpenAI's API has them."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from mmdlm.serving.service import Work
from mmdlm.serving.tasks import TextCall, encoded


@dataclass(frozen=True)
class WrittenText:
    """A text and what is known of how it was written.

    Attributes:
        text: What was written.
        tokens: Ids that were committed, up to the end of the text.
        log_probs: Of each of them when it was committed.
        prompt_tokens: Tokens of the prompt.
        is_whole: Whether it ended by itself; False: there was no more room.
    """

    text: str
    tokens: list[int]
    log_probs: list[float]
    prompt_tokens: int
    is_whole: bool

    @property
    def finish_reason(self) -> str:
        """OpenAI's word for why it ends."""
        return "stop" if self.is_whole else "length"


def written_texts(call: TextCall, texts: Sequence[str], work: Work) -> list[WrittenText]:
    """Put together what a call returned and what its run came to."""
    run, state = work.watch.ends[-1]
    ids, committed, log_prob = (
        run.results(one) for one in (state.ids, state.committed, state.log_prob)
    )
    ends = torch.tensor(run.sampler.stop_ids, dtype=torch.int64)
    target = run.batch.target
    asked = ((run.batch.document >= 0) & ~target).sum(1).tolist()
    found = []
    for number, text in enumerate(texts):
        mine, probability = _until_end(
            ids[number].cpu(), committed[number].cpu(), log_prob[number].cpu(), ends
        )
        is_whole = call.task == "infill" or len(mine) < int(target[number].sum())
        if not is_whole and call.options.get("stop"):
            is_whole = len(work.model.text_tokenizer(text).input_ids) < len(mine)
        found.append(WrittenText(text, mine, probability, asked[number], is_whole))
    return found


def _until_end(
    ids: Tensor, committed: Tensor, log_prob: Tensor, ends: Tensor
) -> tuple[list[int], list[float]]:
    """Return the committed ids before the first end, and their log-probabilities."""
    end = (torch.isin(ids, ends) & committed).nonzero()
    stop = int(end[0]) if len(end) else len(ids)
    kept = committed[:stop]
    return ids[:stop][kept].tolist(), log_prob[:stop][kept].tolist()


def usage_of(texts: Sequence[WrittenText]) -> dict[str, int]:
    """Return OpenAI's counts of tokens; the prompt counts once."""
    asked, written = texts[0].prompt_tokens, sum(len(one.tokens) for one in texts)
    return {
        "prompt_tokens": asked,
        "completion_tokens": written,
        "total_tokens": asked + written,
    }


def envelope(kind: str, model: str) -> dict[str, Any]:
    """Return the fields that all answers of a kind begin with."""
    prefix = "chatcmpl" if kind.startswith("chat") else "cmpl"
    return {
        "id": f"{prefix}-{secrets.token_hex(12)}",
        "object": kind,
        "created": int(time.time()),
        "model": model,
    }


def chat_choice(number: int, one: WrittenText, tokenizer: Any, *, logprobs: bool) -> dict[str, Any]:
    """Return one choice of a chat."""
    content = None
    if logprobs:
        content = {
            "content": [
                {
                    "token": token,
                    "logprob": value,
                    "bytes": list(token.encode()),
                    "top_logprobs": [],
                }
                for token, value in zip(_pieces(one.tokens, tokenizer), one.log_probs, strict=True)
            ]
        }
    return {
        "index": number,
        "message": {"role": "assistant", "content": one.text, "refusal": None},
        "finish_reason": one.finish_reason,
        "logprobs": content,
    }


def image_choice(number: int, image: Image.Image) -> dict[str, Any]:
    """Return one choice of a chat whose answer is an image, as other servers have it."""
    url = f"data:image/png;base64,{encoded(image)}"
    return {
        "index": number,
        "message": {
            "role": "assistant",
            "content": None,
            "images": [{"type": "image_url", "index": 0, "image_url": {"url": url}}],
        },
        "finish_reason": "stop",
        "logprobs": None,
    }


def completion_choice(
    number: int,
    one: WrittenText,
    tokenizer: PreTrainedTokenizerFast,
    *,
    logprobs: bool,
    echoed: str = "",
) -> dict[str, Any]:
    """Return one choice of a completion."""
    found = None
    if logprobs:
        tokens = _pieces(one.tokens, tokenizer)
        values: list[float | None] = [*one.log_probs]
        if echoed:
            asked = _pieces(tokenizer(echoed, add_special_tokens=False).input_ids, tokenizer)
            tokens, values = asked + tokens, [*[None] * len(asked), *values]
        starts, start = [], 0
        for token in tokens:
            starts.append(start)
            start += len(token)
        found = {
            "tokens": tokens,
            "token_logprobs": values,
            "text_offset": starts,
            "top_logprobs": [
                None if value is None else {token: value}
                for token, value in zip(tokens, values, strict=True)
            ],
        }
    return {
        "index": number,
        "text": echoed + one.text,
        "finish_reason": one.finish_reason,
        "logprobs": found,
    }


def _pieces(ids: Sequence[int], tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """Return the text that each id adds, with the space that it brings."""
    pieces = [tokenizer.decode([one]) for one in ids]
    for number, pair in enumerate(pairwise(ids), 1):
        both, first = tokenizer.decode(pair), tokenizer.decode(pair[:1])
        if both.startswith(first):
            pieces[number] = both[len(first) :]
    return pieces


def event(data: dict[str, Any], name: str | None = None) -> str:
    """Return a server-sent event."""
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {json.dumps(data, ensure_ascii=False)}\n\n"
