"""Finished parts of a conversion on disk: whole, or not there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor


def store(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors to a file that appears at once."""
    partial = path.with_suffix(".partial")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial)
    partial.replace(path)
