"""Run the emoji benchmark: `python -m eval.emoji`."""

from eval.emoji.benchmark import main
from mmdlm.cli.recipe import run

if __name__ == "__main__":
    run(main)
