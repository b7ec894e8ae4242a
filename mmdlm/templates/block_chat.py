"""Lay out prompts of SDAR and Fast-dLLM v2: Qwen's ChatML, written block after block."""

from __future__ import annotations

from typing import ClassVar

from mmdlm.core.sequence import text_segment
from mmdlm.templates.dream import Dream
from mmdlm.templates.prompt_template import Generation
from mmdlm.templates.segments import answering
from mmdlm.templates.task_prompt import TaskPrompt
from mmdlm.templates.text_codec import TextCodec

# As many steps as tokens; all tokens that the model is sure of at once.
_SDAR = {"num_inference_steps": 512, "reproduce": "sdar", "threshold": 0.85, "cache": "blocks"}
_FAST = {
    "num_inference_steps": 512,
    "reproduce": "fast_dllm",
    "threshold": 0.9,
    "block_length": 8,
    "cache": "blocks",
}


class Sdar(Dream):
    """SDAR's conversations have no system message of their own; no token precedes a text.

    Source: arXiv:2510.06303 and its published code.
    Departures: Its temperature of 1 is 0 here, as for other families.
    """

    family: ClassVar[str] = "sdar"
    tasks: ClassVar[tuple[str, ...]] = ("answer", "chat", "complete")
    generation: ClassVar[Generation] = {
        "answer": _SDAR,
        "complete": _SDAR,
        "max_new_tokens": 512,
    }
    system: ClassVar[str] = ""

    def completion_prompt(self, codec: TextCodec, text: str, *, length: int) -> TaskPrompt:
        """Ask for what follows a text."""
        return answering(codec, (text_segment(codec.encode(text)),), length=length)


class FastDllm(Sdar):
    """Fast-dLLM v2, whose blocks of 32 tokens are written in pieces of 8.

    Source: arXiv:2509.26328 and its published code.
    Departures: Its threshold of 1, one token in each step, is 0.9 here, as in its paper.
    """

    family: ClassVar[str] = "fast_dllm"
    generation: ClassVar[Generation] = {
        "answer": _FAST,
        "complete": _FAST,
        "max_new_tokens": 512,
    }
    system: ClassVar[str] = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
