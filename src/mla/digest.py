"""Digests: whether two things are the same, in a line of text."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_STRETCHES, _STRETCH = 64, 4096


def digest(*parts: bytes) -> str:
    """32 hexadecimal digits that depend on every part and on where it ends."""
    total = hashlib.blake2b(digest_size=16)
    for part in parts:
        total.update(len(part).to_bytes(8, "little"))
        total.update(part)
    return total.hexdigest()


def canonical(value: Any) -> bytes:
    """JSON that is the same for equal values, whatever the order of their keys."""
    return json.dumps(value, sort_keys=True, default=str).encode()


def digest_of_weights(model: torch.nn.Module) -> str:
    """Of name, dtype, shape and a thousand numbers of every tensor, buffers like RoPE's included."""
    return digest(*_samples(model))


def digest_of_files(files: Iterable[Path]) -> str:
    """Of name, size and 64 stretches of every file, spread over it."""
    return digest(*(part for file in files for part in _stretches(file)))


def _stretches(file: Path) -> Iterator[bytes]:
    size = file.stat().st_size
    yield f"{file.name} {size}".encode()
    with file.open("rb") as content:
        for index in range(_STRETCHES):
            content.seek(max(0, size - _STRETCH) * index // (_STRETCHES - 1))
            yield content.read(_STRETCH)


def _samples(model: torch.nn.Module) -> Iterator[bytes]:
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        yield f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode()
        for part in _plain(tensor.detach()):
            flat = part.flatten()
            yield flat[:: max(1, flat.numel() // 1000)].cpu().contiguous().view(torch.uint8).numpy().tobytes()


def _plain(tensor: Tensor) -> list[Tensor]:
    """The plain tensors that a quantised one is made of; of a plain one, itself."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [plain for name in names for plain in _plain(getattr(tensor, name))]
