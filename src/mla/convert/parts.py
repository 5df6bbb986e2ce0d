"""Finished parts of a conversion on disk: whole, or not there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mla.errors import MLAError
from mla.whole import whole


def store(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors to a file that appears at once.

    Raises:
        UnwrittenError: the disk is full, or the folder cannot be written.
    """
    with whole(path, SafetensorError) as partial:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial)


def load(path: Path, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """What :func:`store` wrote, copied: Windows neither replaces nor removes a file that is still mapped.

    Raises:
        MLAError: the file is damaged.
    """
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            return {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - no mapping
    except SafetensorError as error:
        raise MLAError(f"{path} is damaged ({error}): delete it, and it is made anew") from error
