"""Run the speed benchmark: `python -m eval.speed`."""

from eval.speed.benchmark import main
from mmdlm.cli.recipe import run

if __name__ == "__main__":
    run(main)
