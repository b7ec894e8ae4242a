"""Run lm-eval on a model: `python -m eval.lm_eval run --model_args pretrained=X --tasks gsm8k`.

All options are lm-eval's own (`python -m eval.lm_eval run --help`); --model is mmdlm unless given.
The arguments of --model_args are those of `mmdlm.harnesses.lm_eval.MmdlmLM`.
"""

from __future__ import annotations

import sys

COMMANDS = ("run", "ls", "validate")


def main() -> None:
    """Register the model, and hand the command line to lm-eval."""
    try:
        from lm_eval.__main__ import cli_evaluate

        import mmdlm.harnesses.lm_eval  # noqa: F401 - it registers itself
    except ModuleNotFoundError as error:
        print(f"error: {error}; pip install 'mmdlm[lm_eval]'", file=sys.stderr)
        sys.exit(2)
    sys.argv[1:] = with_model(sys.argv[1:])
    try:
        cli_evaluate()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    finally:
        import torch.distributed as dist

        if dist.is_initialized():
            dist.destroy_process_group()


def with_model(words: list[str]) -> list[str]:
    """Return a command line of lm-eval that names the model mmdlm, unless it names one."""
    if not words or words[0] in ("-h", "--help") or words[0] in COMMANDS[1:]:
        return words
    options = words[1:] if words[0] == "run" else words
    named = {word.partition("=")[0] for word in options}
    if not named & {"--model", "-M", "--config", "-C", "-h", "--help"} and options:
        options = ["--model", "mmdlm", *options]
    return ["run", *options]


if __name__ == "__main__":
    main()
