"""Commands that run no model: the list of models, completion, and where training lives."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from mmdlm.cli.model_table import MODELS

# Where shells complete the names of files: destinations of options and arguments.
FILES = ("images", "image", "mask", "output", "animate", "folders", "adapter", "model")
ELSEWHERE = {
    "train": "python -m train.own_images --images photos --out runs/mine (a folder of images), or "
    "python -m train.pretrain, train.sft, train.rl, train.preference, train.image_tokenizer "
    "--config FILE",
    "eval": "python -m eval.run --config FILE (a benchmark), python -m eval.emoji, python -m "
    "eval.speed",
}


def models(options: argparse.Namespace) -> None:
    """Print the models that can be had, with memory, license and commands."""
    if options.json:
        for row in MODELS:
            print(json.dumps(asdict(row), ensure_ascii=False))
        return
    for row in MODELS:
        print(f"{row.name}: {row.models}")
        print(f"  --model {row.example}" if " " not in row.example else f"  --model: {row.example}")
        print(f"  {row.parameters} parameters; {row.memory}; license: {row.license}")
        print(f"  {', '.join(row.tasks)}")
    print("Memory is of the weights, in bfloat16 and in 4 bits (--quantization 4bit).")


def completion(options: argparse.Namespace) -> None:
    """Print a script by which a shell completes commands, options and files."""
    try:
        import shtab
    except ImportError as error:
        raise ValueError(
            "completion needs the package shtab; install it: pip install 'mmdlm[shell]'"
        ) from error
    parser: argparse.ArgumentParser = options.parser()
    (commands,) = (one for one in parser._actions if isinstance(one.choices, dict))
    assert isinstance(commands.choices, dict)
    for command in commands.choices.values():
        for action in command._actions:
            if action.dest in FILES and action.choices is None:
                action.complete = shtab.FILE
    print(shtab.complete(parser, options.shell))


def elsewhere(options: argparse.Namespace) -> None:
    """Say where training or evaluation lives; ValueError, for it does not run here."""
    here = Path(options.command, "__init__.py").is_file()
    how = "here" if here else "from a checkout (git clone, then make install)"
    raise ValueError(
        f"{options.command} is no command of the wheel; it runs {how}: {ELSEWHERE[options.command]}"
    )
