"""diffusers' VQModel as an image tokenizer (aMUSEd's, VQ-Diffusion's and VQGANs' format)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Self

import torch
from einops import rearrange
from torch import Tensor, nn

from mmdlm.vision.pixels import check_finite
from mmdlm.vision.tokenizers.base import ImageTokenizer

if TYPE_CHECKING:
    from diffusers import VQModel


class VQModelTokenizer(ImageTokenizer):
    """Wraps a diffusers `VQModel`; codes are the indices of the nearest codebook vectors.

    Options and tensors have diffusers' own names, so its checkpoints load here, and what is saved
    here loads there once model.safetensors is named diffusion_pytorch_model.safetensors.
    `image_size` is the config's sample_size, which many checkpoints leave at diffusers' default of
    32. diffusers is imported when a tokenizer is built, and not before.

    aMUSEd's, which Lumina-DiMOO took over, was trained on pixels in [0, 1]; its config is told by
    `lookup_from_codebook`. Here as everywhere pixels lie in [-1, 1], and are moved inside.

    Source: arXiv:2012.09841 (VQGAN); arXiv:2401.01808 (aMUSEd); diffusers.VQModel.
    """

    family = "VQModel"

    def __init__(self, model: VQModel) -> None:
        super().__init__()
        for name in ("in_channels", "out_channels"):
            if model.config[name] != 3:
                raise ValueError(f"{name} must be 3 (RGB), not {model.config[name]}")
        self.model = model
        self.codebook_size = int(model.config["num_vq_embeddings"])
        self.image_size = int(model.config["sample_size"])
        # each block but the last halves the resolution
        self.downsampling = 2 ** (len(model.config["block_out_channels"]) - 1)
        self.unit_range = bool(model.config["lookup_from_codebook"])

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Build an untrained tokenizer from the options of diffusers' `VQModel`.

        Raises ValueError for an option that it does not have, or where diffusers is not installed.
        """
        try:
            from diffusers import VQModel
        except ImportError as error:
            raise ValueError(
                "a VQModel tokenizer needs diffusers; install it with: pip install 'mmdlm[vision]'"
            ) from error
        return cls(VQModel(**cls.options(config, VQModel)))

    @property
    def config(self) -> dict[str, Any]:
        """See `ImageTokenizer.config`."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in self.model.config.items()
            if not name.startswith("_")
        }

    def stored_module(self) -> nn.Module:
        return self.model

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """See `ImageTokenizer.encode`; any size of whole codes."""
        self.check_pixels(pixels)
        z = self._latents(pixels)
        check_finite(z)
        _, _, (_, _, codes) = self.model.quantize(z)
        return codes.reshape(len(pixels), -1)

    def decode(self, codes: Tensor, *, grid: tuple[int, int] | None = None) -> Tensor:
        """See `ImageTokenizer.decode`; any grid."""
        rows, columns = self.check_codes(codes, grid)
        vectors = self.model.quantize.embedding(codes)  # [N, K, C]
        return self._decode(rearrange(vectors, "n (h w) c -> n c h w", h=rows, w=columns))

    def reconstruct(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """[N, 3, H, W] -> (reconstruction, codebook and commitment loss).

        The loss is diffusers': mean (z - sg e)^2 + 0.25 mean (e - sg z)^2 (it keeps taming's
        original weighting, which puts 0.25 on the codebook's term rather than the encoder's).
        """
        self.check_pixels(pixels)
        quantized, loss, _ = self.model.quantize(self._latents(pixels))
        return self._decode(quantized), loss

    def _latents(self, pixels: Tensor) -> Tensor:
        """[N, 3, H, W] -> [N, C, h, w], not quantized yet."""
        latents: Tensor = self.model.encode((pixels + 1) / 2 if self.unit_range else pixels).latents
        return latents

    def _decode(self, quantized: Tensor) -> Tensor:
        """[N, C, h, w] codebook vectors -> [N, 3, H, W]."""
        spatial = quantized if self.model.config["norm_type"] == "spatial" else None
        pixels: Tensor = self.model.decoder(self.model.post_quant_conv(quantized), spatial)
        return pixels * 2 - 1 if self.unit_range else pixels
