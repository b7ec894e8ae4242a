"""A small image tokenizer made of matrix products: patches, attention, scalar quantization."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from mmdlm.core.kernels.attention import attention
from mmdlm.vision.pixels import check_finite
from mmdlm.vision.tokenizers.base import ImageTokenizer


class FiniteScalarQuantizer(nn.Module):
    """Rounds each latent channel to one of a few levels; a code is the tuple of its levels.

    No codebook is learned, so none can collapse and no auxiliary loss is needed; gradients pass
    straight through the rounding. Source: arXiv:2309.15505, section 3.1. Departure: levels lie at
    evenly spaced points of [-1, 1], end points included, for even counts as for odd ones.
    """

    steps: Tensor  # [C] int64, levels - 1
    places: Tensor  # [C] int64, what one level of each channel is worth in a code

    def __init__(self, levels: Sequence[int]) -> None:
        super().__init__()
        if not levels or min(levels) < 2:
            raise ValueError(f"levels {list(levels)}: every channel needs at least 2")
        self.levels = tuple(int(level) for level in levels)
        steps = torch.tensor(self.levels) - 1
        places = torch.tensor([math.prod(self.levels[:i]) for i in range(len(self.levels))])
        self.register_buffer("steps", steps, persistent=False)
        self.register_buffer("places", places, persistent=False)

    @property
    def codebook_size(self) -> int:
        """Number of codes: the product of the levels."""
        return math.prod(self.levels)

    def forward(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        """Latents [..., C] -> (quantized [..., C] in [-1, 1], codes [...])."""
        scaled = (torch.tanh(latent) + 1) / 2 * self.steps
        digits = scaled.round()
        quantized = scaled + (digits - scaled).detach()
        return quantized / self.steps * 2 - 1, self._code(digits)

    def lookup(self, codes: Tensor) -> Tensor:
        """Codes [...] -> quantized latents [..., C]."""
        digits = codes[..., None] // self.places % (self.steps + 1)
        return digits / self.steps * 2 - 1

    def _code(self, digits: Tensor) -> Tensor:
        return (digits.detach().long() * self.places).sum(-1)


class Block(nn.Module):
    """Pre-norm self-attention and MLP over the cells of the grid, each around a residual."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.attention_out = nn.Linear(width, width, bias=False)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp_in = nn.Linear(width, 4 * width)
        self.mlp_out = nn.Linear(4 * width, width)
        # A new block adds nothing, so that depth costs nothing at the start of training.
        nn.init.zeros_(self.attention_out.weight)
        nn.init.zeros_(self.mlp_out.weight)
        nn.init.zeros_(self.mlp_out.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[N, K, D] -> [N, K, D]."""
        qkv = rearrange(
            self.qkv(self.attention_norm(x)),
            "n k (three h d) -> three n h k d",
            three=3,
            h=self.heads,
        )
        attended = attention(*qkv.unbind(0))
        x = x + self.attention_out(rearrange(attended, "n h k d -> n k (h d)"))
        return x + self.mlp_out(F.gelu(self.mlp_in(self.mlp_norm(x)), approximate="tanh"))


class PatchTokenizer(ImageTokenizer):
    """Patch -> Transformer -> finite scalar quantizer -> Transformer -> patch, then seams mended.

    After arXiv:2110.04627 (ViT-VQGAN) without its adversarial and perceptual losses, with a finite
    scalar quantizer in place of its codebook. Departures: the decoder reads a learned embedding of
    each code beside its lattice point, which adds capacity at no arithmetic; two 3x3 convolutions
    over the pixels mend the seams between patches.

    It takes images of the one size that its position embeddings were made for.
    """

    family = "PatchTokenizer"

    def __init__(
        self,
        *,
        image_size: int = 64,
        patch: int = 8,
        width: int = 192,
        heads: int = 6,
        encoder_depth: int = 1,
        decoder_depth: int = 3,
        levels: Sequence[int] = (8, 8, 8, 6),
        seam_width: int = 16,
    ) -> None:
        super().__init__()
        if image_size % patch:
            raise ValueError(f"image_size {image_size} is not a multiple of patch {patch}")
        if width % heads:
            raise ValueError(f"width {width} is not a multiple of heads {heads}")
        self._config = {
            "image_size": image_size,
            "patch": patch,
            "width": width,
            "heads": heads,
            "encoder_depth": encoder_depth,
            "decoder_depth": decoder_depth,
            "levels": list(levels),
            "seam_width": seam_width,
        }
        cells, pixels = (image_size // patch) ** 2, 3 * patch * patch
        self.quantizer = FiniteScalarQuantizer(levels)
        self.image_size, self.downsampling = image_size, patch
        self.codebook_size = self.quantizer.codebook_size

        self.patch_in = nn.Linear(pixels, width)
        self.encoder_position = nn.Parameter(0.02 * torch.randn(cells, width))
        self.encoder = nn.Sequential(*(Block(width, heads) for _ in range(encoder_depth)))
        self.to_latent = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, len(levels)))

        self.from_latent = nn.Linear(len(levels), width)
        self.code_embedding = nn.Embedding(self.codebook_size, width)
        self.decoder_position = nn.Parameter(0.02 * torch.randn(cells, width))
        self.decoder = nn.Sequential(*(Block(width, heads) for _ in range(decoder_depth)))
        self.patch_out = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, pixels))
        last = nn.Conv2d(seam_width, 3, 3, padding=1)
        self.seams = nn.Sequential(nn.Conv2d(3, seam_width, 3, padding=1), nn.GELU(), last)
        nn.init.zeros_(self.code_embedding.weight)
        nn.init.zeros_(last.weight)
        assert last.bias is not None
        nn.init.zeros_(last.bias)

    @property
    def config(self) -> dict[str, Any]:
        """See `ImageTokenizer.config`."""
        return dict(self._config)

    def deeper(self, *, encoder_depth: int, decoder_depth: int) -> PatchTokenizer:
        """Return a copy with blocks added at the end of its stacks, which makes the same images.

        Args:
            encoder_depth: Blocks of its encoder, at least as many as there are.
            decoder_depth: Blocks of its decoder, at least as many as there are.

        Returns:
            A tokenizer on the same device; this one stays as it is.
        """
        depths = {"encoder_depth": encoder_depth, "decoder_depth": decoder_depth}
        present = {"encoder_depth": len(self.encoder), "decoder_depth": len(self.decoder)}
        for name, depth in depths.items():
            if depth < present[name]:
                raise ValueError(
                    f"{name} {depth}: blocks can be added to the {present[name]} of the tokenizer "
                    "to start from, not taken away"
                )
        grown = PatchTokenizer.from_config({**self.config, **depths})
        known = self.state_dict()
        grown.load_state_dict({**grown.state_dict(), **known})
        return grown.to(self.decoder_position)

    def encode(self, pixels: Tensor) -> Tensor:
        """See `ImageTokenizer.encode`; images are `image_size` square."""
        latents = self._latents(pixels)
        check_finite(latents)
        codes: Tensor = self.quantizer(latents)[1]
        return codes

    def decode(self, codes: Tensor, *, grid: tuple[int, int] | None = None) -> Tensor:
        """See `ImageTokenizer.decode`; the grid is that of `image_size`."""
        self._check_grid(self.check_codes(codes, grid))
        return self._render(self.quantizer.lookup(codes), codes)

    def reconstruct(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """See `ImageTokenizer.reconstruct`; the auxiliary loss is zero."""
        return self._render(*self.quantizer(self._latents(pixels))), pixels.new_zeros(())

    def _latents(self, pixels: Tensor) -> Tensor:
        """[N, 3, H, W] -> [N, K, C], not quantized yet."""
        self.check_pixels(pixels)
        patch = self.downsampling
        self._check_grid((pixels.shape[2] // patch, pixels.shape[3] // patch))
        patches = rearrange(pixels, "n c (i p) (j q) -> n (i j) (c p q)", p=patch, q=patch)
        cells = self.encoder(self.patch_in(patches) + self.encoder_position)
        latents: Tensor = self.to_latent(cells)
        return latents

    def _render(self, quantized: Tensor, codes: Tensor) -> Tensor:
        """Latents [N, K, C] and their codes [N, K] -> [N, 3, H, W]."""
        patch, edge = self.downsampling, self.image_size // self.downsampling
        cells = self.from_latent(quantized) + self.code_embedding(codes) + self.decoder_position
        pixels = rearrange(
            self.patch_out(self.decoder(cells)),
            "n (i j) (c p q) -> n c (i p) (j q)",
            i=edge,
            j=edge,
            p=patch,
            q=patch,
        )
        return pixels + self.seams(pixels)

    def _check_grid(self, grid: tuple[int, int]) -> None:
        edge = self.image_size // self.downsampling
        if grid != (edge, edge):
            raise ValueError(
                f"a grid of {grid[0]}x{grid[1]} codes: this tokenizer makes images of "
                f"{self.image_size}x{self.image_size} pixels, {edge}x{edge} codes, and no others"
            )
