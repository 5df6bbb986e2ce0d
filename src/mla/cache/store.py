"""Latents in files: what a model has read survives the process that read it.

A file is safetensors: the rows of every layer as the cache stores them, the token ids they belong to, and a
header with a fingerprint of the model and a checksum over all of it. It is written whole or not at all.
"""

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import cache_utils

from mla.cache.contiguous import LatentCache, LatentLayer
from mla.errors import MLAError
from mla.whole import whole

T = TypeVar("T")

# Transformers' place-holder of layers that read what another one stores; there is none in 5.19.
_HOLDS_NOTHING: Any = getattr(cache_utils, "DummyLayer", ())

FORMAT = "mla latent cache 1"


def is_storable(cache: LatentCache) -> bool:
    """Whether the cache is latents of its tokens and nothing else: states of linear attention and sliding
    windows cannot be cut back to a prefix, and the context of a cross-attention is not part of one. Layers
    that hold nothing, because they read the latents of others, stand in nobody's way."""
    others = (layer for layer in cache.layers if not isinstance(layer, _HOLDS_NOTHING))
    return all(isinstance(layer, LatentLayer) and not layer.holds_context for layer in others)


def copy_prefix(source: LatentCache, target: LatentCache, length: int) -> None:
    """Give the empty ``target`` the first ``length`` tokens that ``source`` holds.

    Raises:
        ValueError: the source holds more than latents of its tokens.
    """
    _check_storable(source)
    for index, old in _latent_layers(source):
        if held := old.held():
            first = {name: rows[:, :length] for name, rows in held.items()}
            device = next(iter(first.values())).device
            target.layer_at(index).restore(first, rank=old.rank, rope=old.rope, device=device)


def save_cache(path: Path, cache: LatentCache, tokens: Sequence[int], fingerprint: Mapping[str, str]) -> None:
    """Write the latents of ``tokens``, one sequence, to a file; it appears whole or not at all.

    Args:
        path: the file; one that is there already is replaced in one step.
        cache: holds exactly ``tokens``.
        fingerprint: what :func:`load_cache` will ask for, field by field.

    Raises:
        ValueError: the cache holds another number of tokens, several sequences, or more than latents of its
            tokens.
        UnwrittenError: the folder cannot be written, or the disk is full.
    """
    _check_storable(cache)
    tensors: dict[str, Tensor] = {"tokens": torch.tensor(tokens, dtype=torch.int32, device="cpu")}
    layers: dict[str, tuple[int, int]] = {}
    for index, layer in _latent_layers(cache):
        for name, rows in layer.held().items():
            if rows.shape[:2] != (1, len(tokens)):
                raise ValueError(f"expected rows [1, {len(tokens)}, width], got {tuple(rows.shape)}")
            tensors[f"{index}.{name}"] = rows.cpu().contiguous()
            layers[str(index)] = (layer.rank, layer.rope)
    header = {
        "format": FORMAT,
        "fingerprint": json.dumps(dict(fingerprint), sort_keys=True),
        "layers": json.dumps(layers, sort_keys=True),
    }
    header["checksum"] = _checksum(header, tensors)
    with whole(path, SafetensorError) as partial:
        save_file(tensors, partial, metadata=header)
        partial.chmod(0o600)


def load_cache(
    path: Path,
    cache: LatentCache,
    fingerprint: Mapping[str, str],
    *,
    device: torch.device,
    keep: int | None = None,
) -> list[int]:
    """Fill the empty ``cache`` from a file that :func:`save_cache` wrote.

    Args:
        path: the file. All of it is compared with its checksum before anything is used.
        cache: a new cache for the model, in the format that the file was saved in.
        fingerprint: what the file must have been saved with.
        device: where the rows go.
        keep: how many tokens to take, from the beginning; None takes all.

    Returns:
        The token ids that the cache now holds.

    Raises:
        MLAError: no such file, not such a file, damaged, or of another model; the cache is still empty.
    """
    header, tensors = _of_one_file(path, _verified)
    _compare(path, dict(fingerprint), json.loads(header["fingerprint"]))
    tokens: list[int] = tensors["tokens"].tolist()[:keep]
    for index, (rank, rope, *_) in json.loads(header["layers"]).items():  # files once named a dtype, too
        layer = cache.layer_at(int(index))
        names = [name for name in tensors if name.startswith(f"{index}.")]
        rows = {name.partition(".")[2]: tensors[name][:, : len(tokens)] for name in names}
        layer.restore(rows, rank=rank, rope=rope, device=device)
    return tokens


def read_tokens(path: Path) -> Tensor:
    """The token ids [t] that a file says it holds. Nothing is checked yet: that is :func:`load_cache`'s part.

    Raises:
        MLAError: no such file, or not one of ours.
    """
    return _of_one_file(path, _tokens)


def _latent_layers(cache: LatentCache) -> list[tuple[int, LatentLayer]]:
    """The layers that hold latents, and where they stand among all."""
    return [(index, layer) for index, layer in enumerate(cache.layers) if isinstance(layer, LatentLayer)]


def _check_storable(cache: LatentCache) -> None:
    if not is_storable(cache):
        raise ValueError(
            "expected a cache of latents only, got one with other layers, or with the context of a "
            "cross-attention (see is_storable)"
        )


def _compare(path: Path, expected: dict[str, str], got: dict[str, str]) -> None:
    for name in sorted(expected.keys() | got.keys()):
        if expected.get(name) != got.get(name):
            raise MLAError(
                f"{path} belongs to another model or setting: its {name} is {got.get(name, 'missing')}, "
                f"expected {expected.get(name, 'none')}"
            )


def _of_one_file(path: Path, read: Callable[[Path], T]) -> T:
    """``read(path)``, of one and the same file.

    safetensors opens a path twice, for the header and for the tensors. Another process may have put a new
    file there in between, or have removed it: what is wrong with the two is said of neither, the path is read
    again.
    """
    while True:
        before = _identity(path)
        try:
            return read(path)
        except MLAError:
            if _identity(path) == before:
                raise


def _identity(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except FileNotFoundError as error:
        raise MLAError(f"{path}: no such file") from error
    except OSError as error:
        raise MLAError(f"{path} cannot be read: {error.strerror}") from error
    return status.st_ino, status.st_mtime_ns


def _tokens(path: Path) -> Tensor:
    with _opened(path) as file:
        tokens: Tensor = file.get_tensor("tokens")
        if tokens.dtype != torch.int32 or tokens.ndim != 1:
            got = f"{tokens.dtype} {tuple(tokens.shape)}"
            raise MLAError(f"{path} is damaged: expected its tokens as int32 [t], got {got}")
        return tokens.clone()


def _verified(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Header and tensors of a whole file, verified. The tensors are views of the mapped file."""
    with _opened(path) as file:
        header: dict[str, str] = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    checksum = header.pop("checksum", None)
    if checksum != _checksum(header, tensors):
        raise MLAError(f"{path} is damaged: its checksum is not that of its content")
    return header, tensors


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            found = (file.metadata() or {}).get("format")
            if found != FORMAT:
                raise MLAError(f"{path}: expected a file of format {FORMAT!r}, got {found!r}")
            yield file
    except (OSError, SafetensorError, ValueError, RuntimeError) as error:  # torch's is a RuntimeError
        if isinstance(error, MLAError):
            raise
        raise MLAError(f"{path} is damaged: {str(error).splitlines()[0]}") from error


def _checksum(header: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """BLAKE2b over names, dtypes, shapes and bytes of everything but the checksum itself."""
    total = hashlib.blake2b(digest_size=32)
    fields = {name: value for name, value in header.items() if name != "checksum"}
    shapes = {name: [str(x.dtype), *x.shape] for name, x in tensors.items()}
    total.update(json.dumps([fields, shapes], sort_keys=True).encode())
    for name in sorted(tensors):
        total.update(tensors[name].flatten().view(torch.uint8).numpy().data)
    return total.hexdigest()
