"""A folder of stored prefixes, bounded in size, that several processes may share."""

import contextlib
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from mla.cache.contiguous import LatentCache
from mla.cache.store import load_cache, read_tokens, save_cache
from mla.digest import canonical, digest
from mla.errors import MLAError

_SUFFIX = ".latents.safetensors"
#: So many new tokens make a conversation worth writing, and this share of its length.
_WORTH_WRITING, _WORTH_WRITING_SHARE = 32, 8


def common_length(one: Tensor, other: Tensor) -> int:
    """How many token ids two sequences, each [t] of one integer dtype, have in common from the beginning."""
    length = min(len(one), len(other))
    different = (one[:length] != other[:length]).nonzero()
    return int(different[0]) if len(different) else length


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
        self._tokens: dict[tuple[str, int], Tensor | None] = {}
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise MLAError(f"{folder}: expected a folder to keep latents in: {error}") from error
        if not os.access(folder, os.W_OK | os.X_OK):
            raise MLAError(f"{folder}: expected a folder to keep latents in, got one without write access")

    def longest(
        self, tokens: Sequence[int], is_worth: Callable[[int, int], bool] = lambda held, common: True
    ) -> tuple[Path | None, int]:
        """The file that has the longest beginning in common with ``tokens``, and how long that is; of several
        the shortest, since all of a file is read.

        Args:
            tokens: of a prompt. is_worth: whether a file of (tokens held, tokens in common) is one to take.
        """
        wanted = torch.tensor(tokens, dtype=torch.int32, device="cpu")
        best: tuple[Path | None, int] = (None, 0)
        size = 0
        for file, held in self._known().items():
            common = common_length(held, wanted)
            is_better = common > best[1] or (common == best[1] and len(held) < size)
            if common and is_better and is_worth(len(held), common):
                best, size = (file, common), len(held)
        return best

    def wants(self, tokens: Sequence[int]) -> bool:
        """Whether enough of ``tokens`` is new to be worth a file."""
        new = len(tokens) - self.longest(tokens)[1]
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

    def save(self, cache: LatentCache, tokens: Sequence[int]) -> None:
        """Keep the latents of ``tokens``, if the folder has room for them at all; files that hold only a
        beginning of them go.

        Raises:
            MLAError: nothing can be written there.
        """
        # The rows in use: a cache may have room for many more.
        if sum(rows.nbytes for layer in cache.latent_layers for rows in layer.held().values()) > self.limit:
            return
        new = torch.tensor(tokens, dtype=torch.int32, device="cpu")
        file = self.folder / f"{self._model}-{digest(new.numpy().tobytes())}{_SUFFIX}"
        save_cache(file, cache, tokens, self.fingerprint)
        for old, held in self._known().items():
            if old != file and common_length(held, new) == len(held):
                self.remove(old)
        self._shrink()

    def remove(self, file: Path) -> bool:
        """Whether a file of the folder is gone: where users share it, it may be another one's to remove."""
        with contextlib.suppress(OSError):
            file.unlink(missing_ok=True)
            return True
        return False

    def _known(self) -> dict[Path, Tensor]:
        """The tokens of every file of this model; read once, since a file is never written twice."""
        known: dict[Path, Tensor] = {}
        seen: dict[tuple[str, int], Tensor | None] = {}
        for file, status in self._files():
            if not file.name.startswith(self._model):
                continue
            key = (file.name, status.st_ino)
            if key not in self._tokens:
                try:
                    self._tokens[key] = read_tokens(file)
                except MLAError as error:
                    self._tokens[key] = None
                    if file.exists():  # not removed by another process just now
                        self._note(f"{error}; what it may hold is computed again")
            held = seen[key] = self._tokens[key]
            if held is not None:
                known[file] = held
        self._tokens = seen
        return known

    def _files(self) -> list[tuple[Path, os.stat_result]]:
        found = []
        for file in self.folder.glob(f"*{_SUFFIX}"):
            with contextlib.suppress(FileNotFoundError):
                found.append((file, file.stat()))
        return found

    def _shrink(self) -> None:
        files = sorted(self._files(), key=lambda entry: entry[1].st_mtime)
        total = sum(status.st_size for _, status in files)
        for file, status in files:
            if total <= self.limit:
                return
            if self.remove(file):
                total -= status.st_size
