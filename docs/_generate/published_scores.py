"""The page of published scores: how each was measured, by whom, and its preset."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from docs._generate.files_page import cell
from mmdlm.harnesses.published import Preset, PublishedTask, presets

COLUMNS = (
    *("task", "shots", "tokens", "steps", "block", "commits", "draws", "end of text"),
    *("reported", "hardware, notes"),
)

INTRODUCTION = (
    "How scores of published models were measured, and by whom. The scores are those of others: "
    "none of these models has been measured here yet, for want of their weights. Each section is a "
    "preset: `--model_args preset=NAME` asks a model so "
    "([reproduce a published score](../how-to/reproduce-scores.md)). Facts and presets are one "
    "file, `mmdlm/harnesses/published.yaml`."
)
ALIKE = (
    "Scores are in percent unless the words say otherwise. Harness, prompt, length, block and the "
    "rule for the end of a text each move a score by several points, and so does the card: compare "
    "only what was measured alike."
)


def page() -> str:
    """Return the page as Markdown."""
    lines = [
        "# Published scores",
        "",
        INTRODUCTION,
        "",
        ALIKE,
        "",
    ]
    for preset in presets().values():
        lines += _section(preset)
    return "\n".join(lines)


def _section(preset: Preset) -> list[str]:
    facts = {
        "weights": f"`{preset.checkpoint}`" if "/" in preset.checkpoint else preset.checkpoint,
        "measured with": preset.ran_with,
        "prompt": preset.prompt,
        "end of text": preset.end_rule,
        "source": preset.source,
        "here": f"`{_command(preset)}`",
    }
    return [
        f"## `{preset.name}`: {preset.title}",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {cell(value)} |" for name, value in facts.items()),
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|" + "---|" * len(COLUMNS),
        *("| " + " | ".join(_row(preset, task)) + " |" for task in preset.tasks),
        "",
    ]


def _row(preset: Preset, task: PublishedTask) -> list[str]:
    said = preset.settings_for(task.task[0].replace("*", ""))
    name = cell(f"`{task.task[0]}`")
    shots = "the task's" if task.shots is None else str(task.shots)
    reported = "; ".join(f"{score} ({who})" for score, who in task.reported)
    notes = cell("; ".join(one for one in (task.hardware, task.note) if one))
    if task.kind == "score":
        copies = f"likelihood of each answer, {said.get('samples', 128)} noisy copies at most"
        return [name, shots, copies, "", "", "", "", "", cell(reported or "not found"), notes]
    length, steps = said.get("max_new_tokens"), said.get("num_inference_steps")
    return [
        name,
        shots,
        "the task's" if length is None else str(length),
        _steps(steps, said.get("tokens_per_step")),
        str(said.get("block_length") or "one"),
        cell(_commits(said)),
        cell(_draws(said)),
        cell(said.get("end_of_text") or ""),
        cell(reported or "not found"),
        notes,
    ]


def _steps(steps: int | None, tokens_per_step: float | None) -> str:
    if steps is not None:
        return str(steps)
    return "the model's" if tokens_per_step is None else f"tokens / {tokens_per_step:g}"


def _commits(said: Mapping[str, Any]) -> str:
    """Say which tokens a step commits."""
    parts = [said.get("order", "confidence")]
    if said.get("threshold") is not None:
        parts.append(f"and all of {said['threshold']:g} or more")
    if said.get("schedule") not in (None, "linear"):
        parts.append(f"{said['schedule']} {said.get('shift', '')}".strip())
    if said.get("cache"):
        parts.append(f"{said['cache']} cache")
    return ", ".join(parts)


def _draws(said: Mapping[str, Any]) -> str:
    """Say how tokens are drawn."""
    temperature = said.get("temperature", 0)
    if not temperature:
        return "greedy"
    top_p = said.get("top_p")
    return f"temperature {temperature:g}" + ("" if top_p is None else f", top-p {top_p:g}")


def _command(preset: Preset) -> str:
    """Return the command of the preset's first task."""
    first = preset.tasks[0]
    task = first.task[0].replace("*", "")
    model = preset.checkpoint if "/" in preset.checkpoint else "FOLDER"
    if preset.harness == "lmms_eval":
        return (
            "lmms-eval eval --model mmdlm"
            f" --model_args pretrained={model},preset={preset.name} --tasks {task} --batch_size 8"
        )
    shots = "" if first.shots is None else f" --num_fewshot {first.shots}"
    chat = " --apply_chat_template" if preset.chat else ""
    return (
        f"python -m eval.lm_eval run --model_args pretrained={model} preset={preset.name}"
        f" --tasks {task}{shots}{chat} --batch_size 8"
    )
