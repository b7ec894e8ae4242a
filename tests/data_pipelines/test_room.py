"""What no memory holds is refused before it is allocated, with what it would take."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
import torch
from torch import nn

from data_pipelines import room
from data_pipelines.room import bytes_of, check_batch, check_room
from data_pipelines.shards.images import image_loader
from data_pipelines.shards.loader import build_loader
from mmdlm.models.costs import Costs
from mmdlm.models.modeling import MmdlmForMaskedDiffusion
from tests.models.tiny import tiny_config


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of 2 GB."""
    monkeypatch.setattr(room, "room", lambda device=None: 2 * 10**9)


def test_the_sentence_has_the_estimate_and_what_to_mend() -> None:
    check_room("x", {"weights": 1e9, "gradients": 1e9}, mend="y")
    with pytest.raises(ValueError, match="model needs at least") as error:
        check_room("model", {"weights": 2e12, "gradients": 1e9, "nothing": 0}, mend="its shape")
    assert str(error.value) == (
        "model needs at least 2.0 TB of memory (2.0 TB of weights, 1.0 GB of gradients), but this "
        "machine has 2.0 GB; make its shape smaller"
    )


def test_batches() -> None:
    check_batch(1000, 1000, states=1e9)
    with pytest.raises(ValueError, match="a batch of 1000000 rows of 82 tokens needs at least 3.4"):
        check_batch(10**6, 82)
    with pytest.raises(ValueError, match="a batch of 1000000000 rows of 82 tokens needs at least"):
        build_loader(
            [None],  # type: ignore[list-item]
            None,  # type: ignore[arg-type]
            tokenizer=None,  # type: ignore[arg-type]
            batch_size=10**9,
            length=82,
        )
    with pytest.raises(ValueError, match="1000000 images of 64 x 64 pixels needs .*98.3 GB of pix"):
        image_loader("nowhere", batch_size=10**6, image_size=64)


def test_nothing_is_allocated_to_count() -> None:
    assert bytes_of(lambda: nn.Linear(10**6, 10**6, bias=False)) == 4 * 10**12
    assert bytes_of(lambda: nn.Linear(10**10, 10**10)) == 1 << 63


@pytest.mark.parametrize("tied", [False, True])
def test_weights_of_a_shape_are_counted_without_it(tied: bool) -> None:
    config = tiny_config(tie_word_embeddings=tied)
    model = MmdlmForMaskedDiffusion(config)
    matrices = {id(p): p.numel() for p in model.parameters() if p.ndim == 2}
    assert Costs(config).parameters == sum(matrices.values())


def test_the_limit_of_a_container_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.undo()
    whole = psutil.virtual_memory().total
    file = tmp_path / "memory.max"
    for text, expected in (("max\n", whole), ("1000000\n", 10**6), (f"{2**63}\n", whole)):
        file.write_text(text)
        monkeypatch.setattr(room, "CGROUP_LIMITS", (str(file), str(tmp_path / "none")))
        assert room.room(torch.device("cpu")) == expected
