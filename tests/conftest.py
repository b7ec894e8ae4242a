"""What all tests share: no network, the list of the project's files, and a tiny checkpoint."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = (
    "1"  # before transformers is imported: a test that asks fails at once
)

ROOT = Path(__file__).parents[1]
OUTPUTS = {"build", "data", "demo", "dist", "runs"}  # of commands; see .gitignore


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what this machine lacks the hardware or the font for."""
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("no CUDA GPU here")
    if item.get_closest_marker("font"):
        from data_pipelines.sources.emoji import find_font

        try:
            find_font()
        except ValueError as error:
            pytest.skip(str(error))


@pytest.fixture(scope="session")
def project_files() -> list[Path]:
    """The project's files, relative to the root, sorted: what git tracks, and what it would add."""
    try:
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split("\0")
        files = {Path(name) for name in listed if name}
    except (OSError, subprocess.CalledProcessError):  # an unpacked archive: no git, or no .git
        files = {path.relative_to(ROOT) for path in ROOT.rglob("*") if not path.is_dir()}
        files = {path for path in files if not _is_output(path)}
    return sorted(path for path in files if (ROOT / path).is_file())


def _is_output(path: Path) -> bool:
    return (
        path.parts[0] in OUTPUTS
        or path.suffix == ".pyc"
        or any(
            part == ".venv" or part.endswith(("cache__", "_cache", ".egg-info"))
            for part in path.parts
        )
    )


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a whole model with random weights: 16 x 16 images of 16 codes, 64 text slots.

    Tests share it: copy it before changing it.
    """
    import torch  # here, so that tests without a model start at once

    from data_pipelines.text_tokenizer import train_text_tokenizer
    from mmdlm.core.vocabulary import Vocabulary
    from mmdlm.models.configuration import MmdlmConfig
    from mmdlm.models.modeling import MmdlmForMaskedDiffusion
    from mmdlm.vision.tokenizers.patch_tokenizer import PatchTokenizer

    folder = tmp_path_factory.mktemp("tiny_checkpoint")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        image_tokenizer = PatchTokenizer(
            image_size=16, patch=4, width=16, heads=2, decoder_depth=1, levels=(5, 5), seam_width=4
        )
        text_tokenizer = train_text_tokenizer(
            ["red heart", "woman dark skin tone", "woman light skin tone"] * 4, size=290
        )
        vocabulary = Vocabulary.build(
            text_size=len(text_tokenizer),
            eos_id=text_tokenizer.eos_token_id,
            image_codes=image_tokenizer.codebook_size,
        )
        denoiser = MmdlmForMaskedDiffusion(
            MmdlmConfig(
                vocabulary=vocabulary.to_dict(),
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=2,
                initializer_range=0.5,  # random weights that still say something
                text_slots=64,
            )
        )
        with torch.no_grad():
            for parameter in image_tokenizer.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    image_tokenizer.save_pretrained(folder / "image_tokenizer")
    text_tokenizer.save_pretrained(folder)
    denoiser.save_pretrained(folder)
    return folder
