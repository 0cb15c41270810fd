"""Training in more than one process is refused until processes can choose together."""

from __future__ import annotations

import torch.distributed as dist

from selectune.errors import TunerError


def refuse_many() -> None:
    """Raises TunerError if more than one process trains: each would select by its own share of the batch."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        raise TunerError(
            f"A tuner trains in one process, and this one belongs to a group of {dist.get_world_size()}. Each process "
            "would select scalars by its own share of the batch, so the models would differ. Train in one process "
            "(without torchrun or accelerate's multi-GPU launch), with more accumulation steps for a larger batch."
        )
