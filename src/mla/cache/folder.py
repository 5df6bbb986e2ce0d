"""A folder of stored prefixes, bounded in size, that several processes may share."""

import contextlib
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from mla.cache.contiguous import LatentCache
from mla.cache.store import load_cache, read_tokens, save_cache
from mla.digest import canonical, digest
from mla.errors import MLAError

_SUFFIX = ".latents.safetensors"
#: So many new tokens make a conversation worth writing, and this share of its length.
_WORTH_WRITING, _WORTH_WRITING_SHARE = 32, 8
_ID_BYTES = 4


def common_length(one: Tensor, other: Tensor) -> int:
    """How many token ids two sequences, each [t] of one integer dtype, have in common from the beginning."""
    length = min(len(one), len(other))
    different = (one[:length] != other[:length]).nonzero()
    return int(different[0]) if len(different) else length


def _always(held: int, common: int) -> bool:
    return True


class _Held(NamedTuple):
    """Token ids [t] int32, and the same as bytes, which tell sooner whether two begin alike."""

    ids: Tensor
    raw: bytes


class PrefixFolder:
    """The prefixes that models have read before; each file is one of ``mla.cache.store``.

    A file's name begins with a digest of the fingerprint, so that servers of several models can share the
    folder, and goes on with a digest of the tokens, so that two processes that save the same write the same.

    Args:
        folder: made where it is missing.
        fingerprint: of the model, as for :func:`mla.cache.store.save_cache`.
        limit: bytes that all files may take together, those of other models included; beyond it the ones
            not used for longest are removed.
        note: told once about every file of the model that cannot be read, and why.

    Raises:
        MLAError: the folder cannot be made or written to.
    """

    def __init__(
        self,
        folder: Path,
        fingerprint: Mapping[str, str],
        limit: int,
        note: Callable[[str], object] = warnings.warn,
    ) -> None:
        self.folder = folder
        self.fingerprint = dict(fingerprint)
        self.limit = limit
        self._note = note
        self._model = digest(canonical(self.fingerprint))
        self._tokens: dict[tuple[str, int], _Held | None] = {}
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise MLAError(f"{folder}: expected a folder to keep latents in: {error}") from error
        if not os.access(folder, os.W_OK | os.X_OK):
            raise MLAError(f"{folder}: expected a folder to keep latents in, got one without write access")

    def longest(
        self, tokens: Sequence[int], is_worth: Callable[[int, int], bool] = _always, *, beyond: int = 0
    ) -> tuple[Path | None, int]:
        """The file that has the longest beginning in common with ``tokens``, and how long that is; of several
        the shortest, since all of a file is read.

        Args:
            tokens: of a prompt. is_worth: whether a file of (tokens held, tokens in common) is one to take.
            beyond: files with up to so many tokens in common are none to take.
        """
        wanted = _held(tokens)
        best, most, size = None, beyond, 0
        for name, held in self._known().items():
            # In a folder of thousands nearly all are passed over here.
            needed = most if len(held.raw) < size else most + 1
            if needed > len(tokens) or not held.raw.startswith(wanted.raw[: needed * _ID_BYTES]):
                continue
            common = common_length(held.ids, wanted.ids)
            if is_worth(len(held.ids), common):
                best, most, size = self.folder / name, common, len(held.raw)
        return best, most if best is not None else 0

    def wants(self, tokens: Sequence[int], goes_on: Callable[[int, int], bool] = _always) -> bool:
        """Whether enough of ``tokens`` is new to be worth a file; ``goes_on`` as for :meth:`save`."""
        new = len(tokens) - self.longest(tokens, goes_on)[1]
        return new >= max(_WORTH_WRITING, len(tokens) // _WORTH_WRITING_SHARE)

    def load(self, file: Path, cache: LatentCache, keep: int, device: torch.device) -> None:
        """Fill the empty ``cache`` with the first ``keep`` tokens of ``file``, which counts as used now.

        Raises:
            MLAError: as for ``load_cache``; the file is not looked at again.
        """
        try:
            load_cache(file, cache, self.fingerprint, device=device, keep=keep)
        except MLAError:
            self._tokens = {key: None if key[0] == file.name else held for key, held in self._tokens.items()}
            raise
        with contextlib.suppress(OSError):
            os.utime(file)

    def save(
        self,
        cache: LatentCache,
        tokens: Sequence[int],
        goes_on: Callable[[int, int], bool] = _always,
    ) -> None:
        """Keep the latents of ``tokens``, if the folder has room for them at all; files that hold only a
        beginning of them go, unless they are others than these: ``goes_on`` says of (tokens held, tokens in
        common) whether ``tokens`` may be read on from such a file.

        Raises:
            MLAError: nothing can be written there.
        """
        # The rows in use: a cache may have room for many more.
        if sum(rows.nbytes for layer in cache.latent_layers for rows in layer.held().values()) > self.limit:
            return
        new = _held(tokens)
        file = self.folder / f"{self._model}-{digest(new.raw)}{_SUFFIX}"
        save_cache(file, cache, tokens, self.fingerprint)
        for name, old in self._known().items():
            length = len(old.ids)
            if name != file.name and new.raw.startswith(old.raw) and goes_on(length, length):
                self.remove(self.folder / name)
        self._shrink()

    def remove(self, file: Path) -> bool:
        """Whether a file of the folder is gone: where users share it, it may be another one's to remove."""
        with contextlib.suppress(OSError):
            file.unlink(missing_ok=True)
            return True
        return False

    def _known(self) -> dict[str, _Held]:
        """What every file of this model holds, by name; read once, since a file is never written twice."""
        seen: dict[tuple[str, int], _Held | None] = {}
        for entry in self._entries():
            if entry.name.startswith(self._model):
                key = (entry.name, entry.inode())
                seen[key] = self._tokens[key] if key in self._tokens else self._read(Path(entry.path))
        self._tokens = seen
        return {name: held for (name, _), held in seen.items() if held is not None}

    def _read(self, file: Path) -> _Held | None:
        try:
            return _held(read_tokens(file))
        except MLAError as error:
            if file.exists():  # not removed by another process just now
                self._note(f"{error}; what it may hold is computed again")
            return None

    def _entries(self) -> list["os.DirEntry[str]"]:
        """Names and numbers of all files, none of which is asked for more: there may be thousands."""
        with contextlib.suppress(FileNotFoundError), os.scandir(self.folder) as entries:
            return [entry for entry in entries if entry.name.endswith(_SUFFIX)]
        return []

    def _files(self) -> list[tuple[Path, os.stat_result]]:
        found = []
        for entry in self._entries():
            with contextlib.suppress(FileNotFoundError):
                found.append((Path(entry.path), entry.stat()))
        return found

    def _shrink(self) -> None:
        files = sorted(self._files(), key=lambda entry: entry[1].st_mtime)
        total = sum(status.st_size for _, status in files)
        for file, status in files:
            if total <= self.limit:
                return
            if self.remove(file):
                total -= status.st_size


def _held(tokens: Sequence[int] | Tensor) -> _Held:
    ids = torch.as_tensor(tokens, dtype=torch.int32, device="cpu")
    return _Held(ids, ids.numpy().tobytes())
