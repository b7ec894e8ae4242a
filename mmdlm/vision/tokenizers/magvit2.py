"""The MAGVIT-v2 image tokenizer: convolutions, and a quantizer that needs no codebook look-up."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from mmdlm.vision.pixels import check_finite
from mmdlm.vision.tokenizers.base import ImageTokenizer

NORM_GROUPS = 32


class Magvit2Tokenizer(ImageTokenizer):
    """MAGVIT-v2 for single images, with the names and shapes of `showlab/magvitv2`.

    ch, ch_mult, num_res_blocks: channels, their multiple per level and the residual blocks per
        level of the encoder, finest level first; each level but the last halves the resolution.
    decoder_ch_mult, decoder_num_res_blocks: the same for the decoder. By default the decoder level
        that *ends* at a resolution has what the encoder level that *starts* at twice it has, so the
        encoder's list moves down one level, its first entry twice: (1, 2, 2, 4, 4) becomes
        (1, 1, 2, 2, 4). Published weights are built so.
    z_channels: bits per code; there are 2 ** z_channels codes.
    resolution: edge in pixels of the training images; any multiple of 2 ** (levels - 1) works.
    commitment_weight, entropy_weight: weights in the auxiliary loss of `reconstruct`.

    Defaults are the published tokenizer: 95.4M parameters, 16 pixels per code, 8,192 codes.
    Raises ValueError for lists of different lengths and for channels that 32 does not divide.

    Source: arXiv:2310.05737, section 3.1; layout of the layers as in showlab/magvitv2.
    """

    family = "MAGVITv2"

    def __init__(
        self,
        *,
        ch: int = 128,
        ch_mult: Sequence[int] = (1, 2, 2, 4, 4),
        num_res_blocks: Sequence[int] = (4, 3, 4, 3, 4),
        decoder_ch_mult: Sequence[int] | None = None,
        decoder_num_res_blocks: Sequence[int] | None = None,
        z_channels: int = 13,
        in_ch: int = 3,
        out_ch: int = 3,
        resolution: int = 256,
        commitment_weight: float = 0.25,
        entropy_weight: float = 0.1,
    ) -> None:
        super().__init__()
        levels = {
            "ch_mult": tuple(ch_mult),
            "num_res_blocks": tuple(num_res_blocks),
            "decoder_ch_mult": _one_level_down(ch_mult, decoder_ch_mult),
            "decoder_num_res_blocks": _one_level_down(num_res_blocks, decoder_num_res_blocks),
        }
        for name, values in levels.items():
            if not values or len(values) != len(ch_mult) or min(values) < 1:
                raise ValueError(
                    f"{name} must give one positive number for each of the {len(ch_mult)} levels "
                    f"of ch_mult, not {list(values)}"
                )
        if ch < 1 or ch % NORM_GROUPS:
            raise ValueError(f"ch must be a positive multiple of {NORM_GROUPS}, not {ch}")
        if not 1 <= z_channels <= 24:
            raise ValueError(f"z_channels must be between 1 and 24 bits, not {z_channels}")
        if in_ch != 3 or out_ch != 3:
            raise ValueError(f"in_ch and out_ch must be 3 (RGB), not {in_ch} and {out_ch}")

        self.codebook_size = 2**z_channels
        self.image_size = resolution
        self.downsampling = 2 ** (len(ch_mult) - 1)
        if resolution < 1 or resolution % self.downsampling:
            raise ValueError(f"resolution must divide by {self.downsampling}, not {resolution}")
        self._config: dict[str, Any] = {
            "ch": ch,
            **{name: list(values) for name, values in levels.items()},
            "z_channels": z_channels,
            "in_ch": in_ch,
            "out_ch": out_ch,
            "resolution": resolution,
            "commitment_weight": commitment_weight,
            "entropy_weight": entropy_weight,
        }
        self.commitment_weight = commitment_weight
        self.entropy_weight = entropy_weight
        self.encoder = Encoder(
            [ch * multiple for multiple in levels["ch_mult"]],
            levels["num_res_blocks"],
            stem=ch,
            pixels=in_ch,
            bits=z_channels,
        )
        self.decoder = Decoder(
            [ch * multiple for multiple in levels["decoder_ch_mult"]],
            levels["decoder_num_res_blocks"],
            pixels=out_ch,
            bits=z_channels,
        )
        self.quantize = LookupFreeQuantizer(z_channels)

    @property
    def config(self) -> dict[str, Any]:
        """See `ImageTokenizer.config`."""
        return dict(self._config)

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """See `ImageTokenizer.encode`; any size of whole codes."""
        self.check_pixels(pixels)
        z = self.encoder(pixels)
        check_finite(z)
        return rearrange(self.quantize.codes(z), "n h w -> n (h w)")

    def decode(self, codes: Tensor, *, grid: tuple[int, int] | None = None) -> Tensor:
        """See `ImageTokenizer.decode`; any grid."""
        rows, columns = self.check_codes(codes, grid)
        bits = self.quantize.bits(codes)  # [N, K, C]
        return self.decoder(rearrange(bits, "n (h w) c -> n c h w", h=rows, w=columns))

    def reconstruct(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """[N, 3, H, W] -> (reconstruction, weighted commitment and entropy loss).

        commitment = mean (z - sign z)^2 pulls the encoder towards its bits; the entropy penalty is
        that of `LookupFreeQuantizer.entropy_penalty`.
        """
        self.check_pixels(pixels)
        z = self.encoder(pixels)
        signs = self.quantize(z)
        commitment = F.mse_loss(z, signs.detach())
        penalty = self.quantize.entropy_penalty(z)
        auxiliary = self.commitment_weight * commitment + self.entropy_weight * penalty
        return self.decoder(signs), auxiliary


class LookupFreeQuantizer(nn.Module):
    """Each of C channels becomes one bit, z > 0; the first channel is the highest bit of the code.

    The buffers are derived from C; they are stored because published checkpoints hold them.

    Source: arXiv:2310.05737, section 3.1, equations 3 to 5.
    """

    embedding: Tensor
    power_vals: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        powers = 2 ** torch.arange(channels - 1, -1, -1)
        bits = torch.arange(2**channels)[:, None] & powers > 0  # [V, C]
        self.register_buffer("embedding", bits.float() * 2 - 1)  # [V, C] of -1 and 1
        self.register_buffer("power_vals", powers)  # [C]

    def forward(self, z: Tensor) -> Tensor:
        """[N, C, h, w] -> its signs, -1 or 1, with the gradient of the identity."""
        signs = torch.where(z > 0, 1.0, -1.0).to(z.dtype)
        return z + (signs - z).detach()

    def codes(self, z: Tensor) -> Tensor:
        """[N, C, h, w] -> [N, h, w] int64 codes."""
        return torch.einsum("nchw,c->nhw", (z > 0).long(), self.power_vals)

    def bits(self, codes: Tensor) -> Tensor:
        """Codes of any shape [...] -> [..., C] signs, -1 or 1, in the dtype of the weights."""
        return F.embedding(codes, self.embedding)

    def entropy_penalty(self, z: Tensor, *, group: int = 9) -> Tensor:
        """Return mean H(q(z)) - H(mean q(z)) in nats: sure of each code, and using all of them.

        q(z) is the softmax over codes c of -|z - c|^2, under which bits are independent with
        p(bit = 1) = sigmoid(4 z). H(q(z)) is thus a sum over bits. H(mean q(z)) is taken jointly
        over groups of at most `group` channels and summed, because all channels together would
        cost positions x codes; the sum over groups is an upper bound that is exact for C <= group.

        Source: arXiv:2310.05737, equation 5, with a temperature of 1; the grouping is ours.
        """
        logits = 4 * rearrange(z, "n c h w -> (n h w) c").float()  # [P, C]
        p = torch.sigmoid(logits)
        # H = -p log p - (1 - p) log (1 - p), by softplus so that it is finite at p = 0 and 1
        certainty = (p * F.softplus(-logits) + (1 - p) * F.softplus(logits)).sum(-1).mean()
        diversity = torch.zeros((), device=z.device)
        groups = math.ceil(p.shape[1] / group)
        for part in p.chunk(groups, dim=1):
            joint = torch.ones_like(part[:, :1])  # [P, 2 ** bits so far]
            for bit in part.split(1, dim=1):
                joint = torch.cat([joint * (1 - bit), joint * bit], dim=1)
            mean = joint.mean(0)
            diversity = diversity - torch.xlogy(mean, mean.clamp_min(1e-12)).sum()
        return certainty - diversity


class Encoder(nn.Module):
    """[N, 3, H, W] pixels -> [N, bits, H / f, W / f]. Level 0 is the finest."""

    def __init__(
        self, channels: Sequence[int], blocks: Sequence[int], *, stem: int, pixels: int, bits: int
    ) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(pixels, stem, 3, padding=1)
        last = len(channels) - 1
        self.down = nn.ModuleList(
            DownLevel(before, width, count, halves=index < last)
            for index, (before, width, count) in enumerate(
                zip((stem, *channels[:-1]), channels, blocks, strict=True)
            )
        )
        self.mid = Middle(channels[-1])
        self.norm_out = _norm(channels[-1])
        self.conv_out = nn.Conv2d(channels[-1], bits, 3, padding=1)
        self.quant_conv = nn.Conv2d(bits, bits, 1)

    def forward(self, pixels: Tensor) -> Tensor:
        h = self.conv_in(pixels)
        for level in self.down:
            h = level(h)
        h = self.conv_out(F.silu(self.norm_out(self.mid(h))))
        return self.quant_conv(h)


class Decoder(nn.Module):
    """[N, bits, h, w] signs -> [N, 3, f h, f w] pixels. Level 0 is the finest."""

    def __init__(
        self, channels: Sequence[int], blocks: Sequence[int], *, pixels: int, bits: int
    ) -> None:
        super().__init__()
        self.post_quant_conv = nn.Conv2d(bits, bits, 1)
        self.conv_in = nn.Conv2d(bits, channels[-1], 3, padding=1)
        self.mid = Middle(channels[-1])
        self.up = nn.ModuleList(
            UpLevel(before, width, count, doubles=index > 0)
            for index, (before, width, count) in enumerate(
                zip((*channels[1:], channels[-1]), channels, blocks, strict=True)
            )
        )
        self.norm_out = _norm(channels[0])
        self.conv_out = nn.Conv2d(channels[0], pixels, 3, padding=1)

    def forward(self, signs: Tensor) -> Tensor:
        h = self.mid(self.conv_in(self.post_quant_conv(signs)))
        for level in reversed(self.up):
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(h)))


class DownLevel(nn.Module):
    """Residual blocks at one resolution, then half of it."""

    def __init__(self, channels_in: int, channels_out: int, count: int, *, halves: bool) -> None:
        super().__init__()
        self.block = _residual_blocks(channels_in, channels_out, count)
        self.downsample = Downsample(channels_out) if halves else None

    def forward(self, h: Tensor) -> Tensor:
        for block in self.block:
            h = block(h)
        return h if self.downsample is None else self.downsample(h)


class UpLevel(nn.Module):
    """Residual blocks at one resolution, then twice it."""

    def __init__(self, channels_in: int, channels_out: int, count: int, *, doubles: bool) -> None:
        super().__init__()
        self.block = _residual_blocks(channels_in, channels_out, count)
        self.upsample = Upsample(channels_out) if doubles else None

    def forward(self, h: Tensor) -> Tensor:
        for block in self.block:
            h = block(h)
        return h if self.upsample is None else self.upsample(h)


class Middle(nn.Module):
    """Residual block, attention over all positions, residual block."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block_1 = ResidualBlock(channels, channels)
        self.attn_1 = Attention(channels)
        self.block_2 = ResidualBlock(channels, channels)

    def forward(self, h: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(h)))


class ResidualBlock(nn.Module):
    """Twice norm, swish, 3x3 convolution; added to the input."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.norm1 = _norm(channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.norm2 = _norm(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        # a checkpoint holds a shortcut only where the width changes
        self.nin_shortcut = (
            nn.Conv2d(channels_in, channels_out, 1) if channels_in != channels_out else None
        )

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (x if self.nin_shortcut is None else self.nin_shortcut(x))


class Attention(nn.Module):
    """One head over all positions; added to the input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = _norm(channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (
            rearrange(project(h), "n c h w -> n 1 (h w) c") for project in (self.q, self.k, self.v)
        )
        h = F.scaled_dot_product_attention(q, k, v)
        h = rearrange(h, "n 1 (h w) c -> n c h w", h=x.shape[2])
        return x + self.proj_out(h)


class Downsample(nn.Module):
    """Halves the resolution; pads right and below only, as the published weights expect."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, h: Tensor) -> Tensor:
        return self.conv(F.pad(h, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Doubles the resolution by nearest neighbor, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, h: Tensor) -> Tensor:
        return self.conv(F.interpolate(h, scale_factor=2.0, mode="nearest"))


def _one_level_down(encoder: Sequence[int], decoder: Sequence[int] | None) -> tuple[int, ...]:
    """Return the decoder's numbers per level: as given, or the encoder's, one level down."""
    if decoder is not None:
        return tuple(decoder)
    return (*encoder[:1], *encoder[:-1])


def _residual_blocks(channels_in: int, channels_out: int, count: int) -> nn.ModuleList:
    widths = [channels_in] + [channels_out] * count
    return nn.ModuleList(ResidualBlock(a, b) for a, b in pairwise(widths))


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(NORM_GROUPS, channels, eps=1e-6)
