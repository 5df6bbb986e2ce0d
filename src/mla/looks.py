"""How the package's HTML pages look: one palette, for light and dark, and one type for all of them."""

from pathlib import Path


def style_of(page: Path) -> str:
    """The style sheet of a page whose own rules lie in the file ``page``, to be put into the page itself."""
    shared = Path(__file__).with_suffix(".css")
    return "".join(sheet.read_text(encoding="utf-8") for sheet in (shared, page))
