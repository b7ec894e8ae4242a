"""What a pass through a Transformer costs, and the least time it takes on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from mmdlm.core.kernels.linear import linear
from mmdlm.models.configuration import MmdlmConfig

Pass = tuple[float, float]  # floating-point operations, and bytes that are read


@dataclass(frozen=True)
class Machine:
    """What this machine reaches.

    Attributes:
        flops: Per second, a product of large matrices, as torch's `@` makes it.
        bandwidth: Bytes per second, read and written in a copy.
        fastest_flops: As `flops`, by the faster of `@` and `linear`, which our layers call: what is
            so fast may beat a floor that `flops` sets.
    """

    flops: float
    bandwidth: float
    fastest_flops: float

    @classmethod
    def medians(cls, machines: Sequence[Machine]) -> Machine:
        """Of what was measured again and again."""
        return cls(
            median(one.flops for one in machines),
            median(one.bandwidth for one in machines),
            median(one.fastest_flops for one in machines),
        )

    @classmethod
    def measure(cls, device: torch.device, dtype: torch.dtype) -> Machine:
        """Medians of 5 runs after a warm-up; takes 1 GB for a moment."""
        store = torch.zeros(1 << 27, device=device)  # 512 MB, beyond any cache
        other = torch.empty_like(store)
        copy = timed(lambda: other.copy_(store), device)
        products = product_rate(device, dtype), product_rate(device, dtype, product=linear)
        return cls(products[0], 2 * 4 * store.numel() / copy, max(products))

    def seconds(self, passes: Sequence[Pass]) -> float:
        """Return the least seconds of some passes: each computes or reads, whichever is longer."""
        return sum(max(flops / self.flops, bytes_ / self.bandwidth) for flops, bytes_ in passes)


@torch.no_grad()
def product_rate(
    device: torch.device,
    dtype: torch.dtype,
    *,
    product: Callable[[Tensor, Tensor], Tensor] = torch.matmul,
) -> float:
    """Floating-point operations a second in a product of large matrices; median of 5 runs."""
    size = 8192 if device.type == "cuda" else 1536
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / timed(lambda: product(a, b), device)


def timed(work: Callable[[], object], device: torch.device, *, repeats: int = 5) -> float:
    """Median seconds of a call, after one that does not count."""
    found = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        work()
        synchronize(device)
        found.append(time.perf_counter() - began)
    return median(found[1:])


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(frozen=True)
class Costs:
    """What passes through a Transformer cost: matrix products and attention, nothing else.

    Attributes:
        bytes_each: Of a stored weight.
    """

    config: MmdlmConfig
    bytes_each: int = 4

    @property
    def layer(self) -> tuple[int, int]:
        """Weights of a layer: of keys and values, and of all else."""
        c = self.config
        kv = 2 * c.hidden_size * int(c.num_key_value_heads or 0) * int(c.head_dim or 0)
        own = 2 * c.hidden_size * c.num_attention_heads * int(c.head_dim or 0)
        return kv, own + 3 * c.hidden_size * c.intermediate_size

    @property
    def body(self) -> int:
        """Weights of all layers."""
        return sum(self.layer) * self.config.num_hidden_layers

    @property
    def parameters(self) -> int:
        """Weights of the matrices: of the layers, the embeddings and the head."""
        ends = 1 if self.config.tie_word_embeddings else 2
        return self.body + ends * self.config.vocab_size * self.config.hidden_size

    def states(self, tokens: int) -> int:
        """Numbers that a training step keeps of so many tokens at least: the layers' inputs."""
        return tokens * self.config.hidden_size * self.config.num_hidden_layers

    def forward(self, *, rows: int, length: int, computed: int, read: int, ids: int) -> Pass:
        """Count the operations of a forward pass, and the bytes of the weights, read once.

        Args:
            rows: Sequences of `length` tokens.
            length: Tokens of a sequence.
            computed: Tokens of each that go through the layers.
            read: Of these, the tokens whose logits are wanted, of `ids` ids; the last layer serves
                only them where the whole row is computed.
            ids: Number of ids that there are logits of.

        Returns:
            Operations and bytes.
        """
        kv, own = self.layer
        layers, d = self.config.num_hidden_layers, self.config.hidden_size
        last = read if computed == length else computed
        flops = 2 * rows * (layers * computed * kv + ((layers - 1) * computed + last) * own)
        flops += 4 * rows * d * length * ((layers - 1) * computed + last)
        flops += 2 * rows * read * d * ids
        weights = self.body + ids * d
        return flops, weights * self.bytes_each

    def training(
        self,
        *,
        tokens: int,
        pairs: int,
        head: Tensor | int,
        learning: float = 1.0,
        head_learns: bool = True,
    ) -> Tensor:
        """Count the floating-point operations of a forward and a backward pass.

        Recomputation is not counted.

        Args:
            tokens: That go through the layers.
            pairs: Of tokens that see each other: the sum of squares of the documents' lengths.
            head: Tokens whose logits are wanted, each times the number of ids.
            learning: Share of the layers' weights that learn; of others gradients of states are
                taken alone.
            head_learns: Whether the weights of the head do.

        Returns:
            A scalar.
        """
        d, layers = self.config.hidden_size, self.config.num_hidden_layers
        body = (4 + 2 * learning) * tokens * self.body + 12 * pairs * d * layers
        logits = torch.as_tensor((6.0 if head_learns else 4.0) * head * d, dtype=torch.float64)
        return logits + body
