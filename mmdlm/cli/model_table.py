"""List the models that can be had: held equal to the templates and to the README by tests.

The library that has them imports torch, and `mmdlm models` has to be instant.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelRow:
    """A bundled model, or a published family.

    Attributes:
        name: Of the family, as `mmdlm convert --to` has it.
        models: What there is of it.
        example: What `--model` takes.
        parameters: In words.
        memory: Of the weights in bfloat16; in 4 bits, about. Computed from shapes.
        license: Of the weights.
        tasks: Commands that it has.
    """

    name: str
    models: str
    example: str
    parameters: str
    memory: str
    license: str
    tasks: tuple[str, ...]


_TALKS = ("infill", "answer", "chat", "complete")
_WRITES = ("answer", "chat", "complete")
_SEES = ("caption", *_TALKS)

MODELS = (
    ModelRow(
        "mmdlm",
        "emoji (bundled), and models trained here",
        "emoji",
        "6.0 M",
        "23 MB in float32",
        "Apache-2.0",
        ("draw", "caption", "inpaint", "infill", "complete"),
    ),
    ModelRow(
        "llada",
        "LLaDA base, instruct, 1.5",
        "GSAI-ML/LLaDA-8B-Instruct",
        "8.0 B",
        "16 GB; 6 GB",
        "MIT",
        _TALKS,
    ),
    ModelRow(
        "dream",
        "Dream base, instruct",
        "Dream-org/Dream-v0-Instruct-7B",
        "7.6 B",
        "15 GB; 5.5 GB",
        "Apache-2.0",
        _TALKS,
    ),
    ModelRow(
        "sdar",
        "SDAR (dense)",
        "a folder of its checkpoint",
        "4.4 B",
        "9 GB; 3.5 GB",
        "see its card",
        _WRITES,
    ),
    ModelRow(
        "fast_dllm",
        "Fast-dLLM v2",
        "a folder of its checkpoint",
        "7.6 B",
        "15 GB; 5.5 GB",
        "see its card",
        _WRITES,
    ),
    ModelRow(
        "llada_v",
        "LLaDA-V",
        "GSAI-ML/LLaDA-V",
        "8.4 B",
        "17 GB; 6.5 GB",
        "see its card",
        _SEES,
    ),
    ModelRow(
        "lavida_llada",
        "LaViDa on LLaDA",
        "a folder of its checkpoint",
        "8.4 B",
        "17 GB; 6.5 GB",
        "see its card",
        _SEES,
    ),
    ModelRow(
        "lavida_dream",
        "LaViDa on Dream",
        "a folder of its checkpoint",
        "8.0 B",
        "17 GB; 6.5 GB",
        "see its card",
        _SEES,
    ),
    ModelRow(
        "dimple",
        "Dimple",
        "a folder of its checkpoint",
        "8.3 B",
        "17 GB; 6.5 GB",
        "Apache-2.0",
        _SEES,
    ),
    ModelRow(
        "mmada",
        "MMaDA base, MixCoT",
        "Gen-Verse/MMaDA-8B-MixCoT",
        "8.1 B",
        "16 GB; 6 GB",
        "MIT",
        ("draw", "caption", "inpaint", *_TALKS),
    ),
    ModelRow(
        "lumina",
        "Lumina-DiMOO",
        "Alpha-VLLM/Lumina-DiMOO",
        "8.1 B",
        "16 GB; 6 GB",
        "Apache-2.0",
        ("draw", "caption", "inpaint", "edit", "answer"),
    ),
)
