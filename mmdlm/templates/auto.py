"""Find the prompt template of a family by the name that a checkpoint stores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from mmdlm.templates.block_chat import FastDllm, Sdar
from mmdlm.templates.dimple import Dimple
from mmdlm.templates.dream import Dream
from mmdlm.templates.lavida import LavidaDream, LavidaLlada
from mmdlm.templates.llada import Llada
from mmdlm.templates.llada_v import LladaV
from mmdlm.templates.lumina import Lumina
from mmdlm.templates.mmada import Mmada
from mmdlm.templates.native import Native
from mmdlm.templates.native_vision import NativeVision
from mmdlm.templates.prompt_template import PromptTemplate

LAYOUTS: Mapping[str, PromptTemplate] = {
    prompt_template.family: prompt_template
    for prompt_template in (
        Native(),
        NativeVision(),
        Llada(),
        Mmada(),
        LladaV(),
        LavidaLlada(),
        Dream(),
        LavidaDream(),
        Dimple(),
        Lumina(),
        Sdar(),
        FastDllm(),
    )
}


# A model of text that was given a vision adapter speaks as the one of its kind that sees.
GIVEN_EYES = {
    Native.family: NativeVision.family,
    Llada.family: LladaV.family,
    Dream.family: LavidaDream.family,
}


def prompt_template_for(
    family: str | None, *, seeing: bool = False, tasks: Sequence[str] | None = None
) -> PromptTemplate:
    """Return the prompt template of a published family.

    A model that was trained here from the start has ours, and so has one that was made of an
    autoregressive model or an encoder, which brings no tasks of its own.

    Args:
        family: Its name; None: a model that was trained here.
        seeing: Whether the model has a vision adapter.
        tasks: Those that a model which was trained here records; None: it records none.

    Returns:
        The template, for the tasks that the model knows.

    Raises:
        ValueError: If `tasks` are not a list of names.
    """
    if tasks is not None and not (
        isinstance(tasks, list | tuple) and all(isinstance(one, str) for one in tasks)
    ):
        raise ValueError(f"config.json has trained_tasks = {tasks!r}; a list of names is needed")
    name = Native.family if family not in LAYOUTS or family is None else family
    prompt_template = LAYOUTS[GIVEN_EYES.get(name, name) if seeing else name]
    if isinstance(prompt_template, Native) and tasks is not None:
        return replace(prompt_template, trained=tuple(tasks))
    return prompt_template
