"""Files that are written as a whole, or not at all. Level 0."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mla.errors import MLAError


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
    # A name may be as long as the system allows, and still leaves room for the other one.
    beside = place.with_name(f".{place.name[:40]}.{os.getpid()}.part")
    try:
        if path.is_dir():
            raise MLAError(f"{path} cannot be written: expected a file, got a folder")
        if path.exists() and not path.is_file():  # /dev/stdout is one by its own name only
            yield path
            return
        place.parent.mkdir(parents=True, exist_ok=True)
        yield beside
        flush(beside)  # else a machine that loses its power may keep the name and not the content
        _take_place(beside, place)
    except failures as error:
        raise UnwrittenError(path, error) from error
    finally:
        with suppress(OSError):  # it is usually not there, and where it cannot be there is no folder
            beside.unlink()


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
