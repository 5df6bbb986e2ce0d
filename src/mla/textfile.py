"""Texts that the user names."""

from pathlib import Path

from mla.errors import MLAError


def read_text(name: str, *, again: bool = False) -> str:
    """The text of a UTF-8 file.

    Args:
        name: of the file.
        again: whether it will be read again later, which a pipe cannot be.

    Raises:
        MLAError: it cannot be read, or not again.
    """
    try:
        path = Path(name).expanduser()
        if again and path.exists() and not path.is_file():
            raise MLAError(
                f"{name} is no regular file, and will be read again: write the text to a file first"
            )
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise MLAError(f"{name}: no such text file") from error
    except (OSError, RuntimeError, UnicodeDecodeError) as error:  # RuntimeError: ~nobody
        raise MLAError(f"{name} is not readable as UTF-8 text: {error}") from error
