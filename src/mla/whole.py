"""Files that are written as a whole, or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mla.errors import MLAError


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """``with whole(path) as partial:`` write to ``partial``, which then takes the place of ``path``.

    Whatever ends the block early, a file that was there stays as it was, and nothing is left beside it. A
    link is followed; a pipe or a device has no place to take and is written to itself.

    Raises:
        MLAError: a folder, or the system refuses to write.
    """
    place = Path(os.path.realpath(path))
    # A name may be as long as the system allows, and still leaves room for the other one.
    beside = place.with_name(f".{place.name[:40]}.{os.getpid()}.partial")
    try:
        if place.is_dir():
            raise MLAError(f"{path} cannot be written: expected a file, got a folder")
        if place.exists() and not place.is_file():
            yield place
            return
        yield beside
        beside.replace(place)
    except OSError as error:
        raise MLAError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        with suppress(OSError):  # it is usually not there, and where it cannot be there is no folder
            beside.unlink()
