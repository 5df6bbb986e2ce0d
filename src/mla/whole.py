"""Files that are written as a whole, or not at all. Level 0."""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mla.errors import MLAError

# A name that nobody else gives, since what has it is deleted when nobody writes there any more.
_TEMPORARY = ".mla-writing-"
_OURS = re.compile(re.escape(_TEMPORARY) + "[0-9a-f]{16}")
# Age in seconds beyond which nobody writes there any more.
_ABANDONED = 3600.0


class UnwrittenError(MLAError):
    """A file or folder that could not be written, most often to a full disk; what was there is there still.

    Args:
        path: what was to be written.
        error: what the system said.
    """

    def __init__(self, path: Path, error: Exception) -> None:
        reason = error.strerror if isinstance(error, OSError) else None
        super().__init__(
            f"{path} cannot be written: {reason or error}. There must be room for it on the disk, and the "
            "right to write there"
        )


@contextmanager
def whole(path: Path, *others: type[Exception]) -> Iterator[Path]:
    """``with whole(path) as partial:`` write to ``partial``, which then takes the place of ``path``.

    Whatever ends the block early, a file that was there stays as it was, and nothing is left beside it.
    Folders on the way are created. A link is followed; a pipe or a device has no place to take and is written
    to itself, and so is a file that a container mounts alone.

    Args:
        path: the file; one that is there already is replaced.
        others: what the writer raises instead of ``OSError``.

    Raises:
        UnwrittenError: the system refuses to write.
        MLAError: ``path`` is a folder.
    """
    failures: tuple[type[Exception], ...] = (OSError, *others)
    place = Path(os.path.realpath(path))
    try:
        if path.is_dir():
            raise MLAError(f"{path} cannot be written: expected a file, got a folder")
        if path.exists() and not path.is_file():  # /dev/stdout is one by its own name only
            yield path
            return
        place.parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(place.parent, _ABANDONED)
        # Beside the file, so that a rename replaces it in one step, and in a folder of its own: safetensors
        # puts a file of a name of its own beside what it writes.
        folder = place.parent / f"{_TEMPORARY}{secrets.token_hex(8)}"
        folder.mkdir(mode=0o777 if os.name == "nt" else 0o700)  # Windows' rights would stay with the file
        try:
            partial = folder / place.name
            yield partial
            flush(partial)  # else a machine that loses its power may keep the name and not the content
            _take_place(partial, place)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        with suppress(OSError):  # not every disk can, and the file is there
            flush(place.parent)
    except failures as error:
        raise UnwrittenError(path, error) from error


def remove_abandoned(folder: Path, age: float = 0.0) -> None:
    """Delete what killed processes left half written; another user's stays.

    Args:
        folder: where :func:`whole` wrote.
        age: in seconds; what was written to since then stays.
    """
    for left in folder.glob(f"{_TEMPORARY}*"):
        with suppress(OSError):
            if not _OURS.fullmatch(left.name) or left.is_symlink() or not _is_mine(left):
                continue
            newest = max(path.stat().st_mtime for path in (left, *left.iterdir()))
            if time.time() - newest >= age:
                shutil.rmtree(left)


def _is_mine(folder: Path) -> bool:
    return os.name == "nt" or folder.stat().st_uid == os.getuid()


def flush(path: Path) -> None:
    """Wait until the disk has a file's content, or a folder's names."""
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot open folders
    handle = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _take_place(beside: Path, place: Path) -> None:
    try:
        beside.replace(place)
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        shutil.copyfile(beside, place)  # mounted alone: no other file can have its name
