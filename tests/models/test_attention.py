"""Who sees whom, and that every kernel agrees about it."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch._dynamo
from torch.nn.attention.flex_attention import create_block_mask
from torch.utils._python_dispatch import TorchDispatchMode

from mmdlm.core.sequence import pack
from mmdlm.models import attention
from mmdlm.models.attention import AttentionPattern, attend, visible
from tests.models.tiny import TOLERANCE, VOCABULARY, document, random_ids, tiny_model

PACKED = torch.tensor([[0, 0, 1, 1, 1, 2, -1, -1], [0, 0, 0, 0, 0, 0, 0, -1]])


def heads(count: int, *, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, count, 8, 16, generator=generator)


def test_a_token_sees_its_own_document_and_no_other() -> None:
    seen = AttentionPattern.of(PACKED, flex=False).dense
    assert seen is not None
    for b, row in enumerate(PACKED.tolist()):
        for q, of_query in enumerate(row):
            assert seen[b, 0, q].tolist() == [of_key == of_query for of_key in row]


def test_one_full_document_a_row_needs_no_mask() -> None:
    """The fastest kernels take none."""
    assert AttentionPattern.of(torch.zeros(2, 5, dtype=torch.int64), flex=False).dense is None


@pytest.mark.parametrize("key_value_heads", [4, 2, 1])
@pytest.mark.parametrize("document", [PACKED, torch.zeros_like(PACKED)], ids=["packed", "full"])
def test_flex_attention_equals_sdpa(key_value_heads: int, document: torch.Tensor) -> None:
    query, key, value = (
        heads(4, seed=0),
        heads(key_value_heads, seed=1),
        heads(key_value_heads, seed=2),
    )
    sdpa, flex = (
        attend(query, key, value, AttentionPattern.of(document, flex=flex))
        for flex in (False, True)
    )
    torch.testing.assert_close(flex, sdpa)


def test_a_pattern_moves_with_the_hidden_states() -> None:
    """Models spread over devices move what a layer is given by its `to`."""
    from accelerate.utils import send_to_device

    moved = send_to_device(AttentionPattern.of(PACKED, flex=False), "meta")
    assert moved.dense.device.type == "meta"
    assert send_to_device(AttentionPattern(), "meta") == AttentionPattern()


@pytest.mark.parametrize("lookahead", [[0, 0], [1, 3], [0, 20]])
@pytest.mark.parametrize("local_window", [None, 1, 2])
def test_what_lies_too_far_away_is_not_seen(lookahead: list[int], local_window: int | None) -> None:
    pattern = AttentionPattern.of(
        PACKED, flex=False, lookahead=torch.tensor(lookahead), local_window=local_window
    )
    assert pattern.dense is not None
    for b, row in enumerate(PACKED.tolist()):
        for q in range(8):
            assert pattern.dense[b, 0, q].tolist() == [
                row[k] == row[q]
                and k - q <= lookahead[b]
                and (local_window is None or abs(k - q) <= local_window)
                for k in range(8)
            ]


@pytest.mark.parametrize("lookahead, local_window", [([0, 2], None), (None, 2), ([1, 0], 3)])
def test_kernels_agree_about_distances(
    lookahead: list[int] | None, local_window: int | None
) -> None:
    query, key, value = heads(4, seed=0), heads(2, seed=1), heads(2, seed=2)
    seen = None if lookahead is None else torch.tensor(lookahead)
    sdpa, flex = (
        attend(
            query,
            key,
            value,
            AttentionPattern.of(PACKED, flex=flex, lookahead=seen, local_window=local_window),
        )
        for flex in (False, True)
    )
    torch.testing.assert_close(flex, sdpa)


def test_kernels_agree_about_a_prefix() -> None:
    query, key, value = heads(4, seed=0), heads(2, seed=1), heads(2, seed=2)
    prefix = torch.tensor(
        [[True, False, True, True, False, False, False, False], [True] * 3 + [False] * 5]
    )
    sdpa, flex = (
        attend(query, key, value, AttentionPattern.of(PACKED, flex=flex, prefix=prefix))
        for flex in (False, True)
    )
    torch.testing.assert_close(flex, sdpa)
    unhindered = attend(query, key, value, AttentionPattern.of(PACKED, flex=False))
    assert not torch.allclose(sdpa, unhindered)


BLOCK = torch.tensor([[0, 1, 0, 0, 1, 0, 0, 0], [0, 0, 0, 1, 1, 2, 3, 0]])
NOISY = torch.tensor([[1, 0, 1, 0, 1, 1, 0, 0], [1, 0, 1, 1, 0, 0, 1, 0]]).bool()


@pytest.mark.parametrize("noisy", [None, NOISY], ids=["one copy", "noisy and clean"])
def test_a_token_sees_the_blocks_up_to_its_own(noisy: torch.Tensor | None) -> None:
    """Pair by pair; a noisy token stands beside the clean copy of its block, not in front of it."""
    pattern = AttentionPattern.of(PACKED, flex=False, block=BLOCK, noisy=noisy)
    assert pattern.dense is not None
    of_copy = torch.zeros_like(NOISY) if noisy is None else noisy
    for b, row in enumerate(PACKED.tolist()):
        for q in range(8):
            for k in range(8):
                own, before = BLOCK[b, k] == BLOCK[b, q], BLOCK[b, k] < BLOCK[b, q]
                if of_copy[b, k]:
                    expected = bool(of_copy[b, q] and own)
                else:
                    expected = bool(before or (own and not of_copy[b, q]))
                assert bool(pattern.dense[b, 0, q, k]) == (row[q] == row[k] and expected)


@pytest.mark.parametrize("noisy", [None, NOISY], ids=["one copy", "noisy and clean"])
def test_kernels_agree_about_blocks(noisy: torch.Tensor | None) -> None:
    query, key, value = heads(4, seed=0), heads(2, seed=1), heads(2, seed=2)
    sdpa, flex = (
        attend(
            query,
            key,
            value,
            AttentionPattern.of(PACKED, flex=flex, block=BLOCK, noisy=noisy),
        )
        for flex in (False, True)
    )
    torch.testing.assert_close(flex, sdpa)
    unhindered = attend(query, key, value, AttentionPattern.of(PACKED, flex=False))
    assert not torch.allclose(sdpa, unhindered)


@pytest.mark.slow
def test_block_masks_are_compiled_once_for_all_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, but that the traced graph is run as it is."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    attention._create_block_mask.cache_clear()
    create = attention._create_block_mask(True)
    attention._create_block_mask.cache_clear()
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        document = torch.randint(3, (2, 300), generator=generator).sort(1).values
        allowed = visible(document)
        found = create(allowed, 2, None, 300, 300, device="cpu")
        expected = create_block_mask(allowed, 2, None, 300, 300, device="cpu")
        assert torch.equal(found.to_dense(), expected.to_dense())
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]


def test_a_window_wider_than_the_row_needs_no_mask() -> None:
    full = torch.zeros(2, 5, dtype=torch.int64)
    assert AttentionPattern.of(full, flex=False, local_window=4).dense is None
    assert AttentionPattern.of(full, flex=False, local_window=3).dense is not None


# ---- long rows ----------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """The most elements that a mask made under it has."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for one in found if isinstance(found, list | tuple) else (found,):
            if isinstance(one, torch.Tensor) and one.dtype == torch.bool:
                self.most = max(self.most, one.numel())
        return found


@pytest.mark.parametrize("options", [{}, {"prefix_attention": True}, {"block_length": 4}])
def test_no_mask_of_a_long_row_is_ever_whole(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Packed rows, and the last layer, which is computed at some places alone."""
    model = tiny_model(**options)
    length = 96
    batch = pack([document(n, 16, seed=n) for n in (3, 9, 14, 20, 5)], VOCABULARY, length=length)
    query_mask = batch.target & (torch.arange(length) % 3 > 0)

    def run() -> tuple[torch.Tensor, list[torch.Tensor]]:
        model.zero_grad()
        states = model.hidden(batch.ids, batch, query_mask=query_mask)[query_mask]
        states.pow(2).sum().backward()
        return states.detach(), [one.grad.clone() for one in model.model.layers.parameters()]

    expected, slopes = run()
    monkeypatch.setattr(attention, "_MOST_PAIRS", length * 20)
    with Largest() as largest:
        found, new = run()
    assert 0 < largest.most <= length * 20
    torch.testing.assert_close(found, expected, **TOLERANCE)
    torch.testing.assert_close(new, slopes, rtol=1e-4, atol=1e-4)
    whole = model.hidden(batch.ids, batch).detach()
    torch.testing.assert_close(found, whole[query_mask], **TOLERANCE)


def test_masks_are_whole_up_to_4096_tokens() -> None:
    two = torch.zeros(1, 4097, dtype=torch.int64)
    two[:, 100:] = 1
    pattern = AttentionPattern.of(two, flex=False)
    assert pattern.dense is None
    assert pattern.wide is not None
    assert pattern.wide.step * 4097 <= 4096 * 4096
    assert AttentionPattern.of(two[:, :4096], flex=False).dense is not None


# ---- graphs -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("masked", [False, True])
@torch.no_grad()
def test_a_forward_pass_is_one_graph(masked: bool) -> None:
    torch._dynamo.reset()
    model, ids = tiny_model(), random_ids(2, 12)
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0
    given = {"attention_mask": mask} if masked else {}
    expected = model(ids, **given).logits
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(ids, **given).logits, expected, **TOLERANCE)
    exported = torch.export.export(model, (ids,), given).module()
    torch.testing.assert_close(exported(ids, **given).logits, expected, **TOLERANCE)


def test_a_pattern_can_be_traced() -> None:
    torch._dynamo.reset()
    make = torch.compile(
        lambda document: AttentionPattern.of(document, flex=False).dense,
        fullgraph=True,
        backend="eager",
    )
    assert torch.equal(make(PACKED), AttentionPattern.of(PACKED, flex=False).dense)
