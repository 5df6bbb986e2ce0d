"""Texts that the user names."""

from pathlib import Path

from mla.errors import MLAError


def read_text(name: str) -> str:
    """The text of a UTF-8 file; raises MLAError where it cannot be read."""
    try:
        return Path(name).expanduser().read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise MLAError(f"{name}: no such text file") from error
    except (OSError, RuntimeError, UnicodeDecodeError) as error:  # RuntimeError: ~nobody
        raise MLAError(f"{name} is not readable as UTF-8 text: {error}") from error
