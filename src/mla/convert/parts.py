"""Finished parts of a conversion on disk: whole, or not there."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mla import __version__
from mla.digest import digest, digest_of_weights
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
        raise damaged(path, error) from error


def load_json(path: Path) -> dict[str, Any]:
    """The object in a file of JSON.

    Raises:
        MLAError: the file is damaged.
    """
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise damaged(path, error) from error
    return content


def damaged(path: Path, reason: object) -> MLAError:
    """What to raise for a part that cannot be read."""
    return MLAError(f"{path} is damaged ({reason}): delete it, and it is made anew")


def mark(windows: Sequence[Tensor], models: Sequence[torch.nn.Module]) -> str:
    """What has to agree for kept work to belong to a run: mla, token ids [w, t] and the models' weights."""
    shapes = [f"{list(ids.shape)}".encode() for ids in windows]
    texts = [ids.cpu().contiguous().numpy().tobytes() for ids in windows]
    weights = [digest_of_weights(model).encode() for model in models]
    return digest(__version__.encode(), *shapes, *texts, *weights)
