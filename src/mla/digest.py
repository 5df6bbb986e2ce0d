"""Digests: whether two things are the same, in a line of text."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mla.errors import MLAError

# Of a tensor in a file: pieces that are read, and their bytes.
_STRETCHES, _STRETCH = 4, 256


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


def digest_of_checkpoint(files: Iterable[Path]) -> str:
    """Of name, dtype, shape and a thousand bytes of every tensor in safetensors files.

    Raises:
        MLAError: a file that is not one.
    """
    return digest(*(part for file in files for part in _stretches(file)))


def _stretches(file: Path) -> Iterator[bytes]:
    try:
        with file.open("rb") as content:
            start = 8 + int.from_bytes(content.read(8), "little")
            header = json.loads(content.read(start - 8))
            yield canonical(header)
            for name in sorted(header.keys() - {"__metadata__"}):
                begin, end = header[name]["data_offsets"]
                for index in range(_STRETCHES):
                    content.seek(start + begin + max(0, end - begin - _STRETCH) * index // (_STRETCHES - 1))
                    yield content.read(min(_STRETCH, end - begin))
    except (ValueError, TypeError, AttributeError, KeyError, OverflowError, MemoryError) as error:
        raise MLAError(f"{file} is damaged: expected safetensors; fetch or convert it again") from error


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
