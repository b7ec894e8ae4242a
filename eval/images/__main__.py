"""Draw the images of a benchmark, or measure a folder: `python -m eval.images draw|score`."""

from eval.images.drawing import draw
from eval.images.scoring import keep, score
from mmdlm.cli.recipe import run

if __name__ == "__main__":
    run({"draw": draw, "score": score, "keep": keep})
