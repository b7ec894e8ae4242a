"""What the host knows of marked positions, so that nobody asks a device for it again and again."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from mmdlm.core.vocabulary import Modality


def on_host(values: Tensor) -> Tensor:
    """Return a tensor on the CPU; one that lies on a device makes the host wait for it."""
    return values if values.device.type == "cpu" else values.cpu()


def numbers_of(marked: Tensor) -> Tensor:
    """[..] bool -> [M] int64 on the CPU, the numbers of the marked elements in reading order."""
    # By NumPy: an operator of torch could as well be one that waits for a device.
    return torch.from_numpy(on_host(marked).numpy().ravel().nonzero()[0])


def sent(values: Tensor, device: torch.device) -> Tensor:
    """Return a tensor of the CPU on a device, without waiting for it."""
    return values.to(device, non_blocking=True)


@dataclass(frozen=True)
class HostMasks:
    """The layout of a batch on the CPU.

    Attributes:
        target: [B, L] bool.
        suffix_mask: [B, L] bool, context that does not stand before the first target of its
            document.
        modality: [B, L] int64.
        whole: [B] bool, rows that are one document from end to end.
        length: [B] int64, tokens of a row without the padding at its end.
    """

    target: Tensor
    suffix_mask: Tensor
    modality: Tensor
    whole: Tensor
    length: Tensor

    @classmethod
    def of(cls, *, target: Tensor, prefix: Tensor, modality: Tensor, document: Tensor) -> HostMasks:
        """Ask the device for the layout of a batch, once."""
        asked = torch.stack([target.long(), prefix.long(), modality, document])  # [4, B, L]
        target, prefix, modality, document = on_host(asked)
        target, prefix = target.bool(), prefix.bool()
        count = torch.arange(target.shape[1] + 1)  # of tokens up to each place
        return cls(
            target=target,
            suffix_mask=~prefix & ~target,
            modality=modality,
            whole=(document == document[:, :1]).all(1),
            length=(count * torch.nn.functional.pad(document >= 0, (1, 0))).amax(1),
        )

    def of_modality(self, modality: Modality) -> Tensor:
        """[B, L] bool: positions of one modality."""
        return self.modality == modality

    def rows(self, index: Tensor) -> HostMasks:
        """Rows [N] int64."""
        return HostMasks(**{f.name: getattr(self, f.name)[index] for f in fields(self)})

    @classmethod
    def joined(cls, several: list[HostMasks]) -> HostMasks:
        """Return the rows of several batches, batch after batch."""
        return cls(
            **{f.name: torch.cat([getattr(one, f.name) for one in several]) for f in fields(cls)}
        )
