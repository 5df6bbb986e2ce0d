"""``mla convert --explore`` and ``--max-kl``: which cache to convert to."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mla.cli import console
from mla.errors import MLAError
from mla.whole import UnwrittenError, whole

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from mla.convert.explore import Exploration, Point
    from mla.convert.promise import Promise


def check_page(path: Path, *, overwrite: bool, source: str | None = None) -> None:
    """Refuse, before hours of work, a page that cannot be written, or in the place of the original."""
    from mla.convert.saving import check_place

    check_place(path, source)
    if path.is_dir():
        raise MLAError(f"--explore: expected a file to write, got the folder {path}")
    if path.exists() and not overwrite:
        raise MLAError(f"--explore: {path} exists; choose another file or use --overwrite")


def explore_command(
    teacher: PreTrainedModel,
    calibration: Tensor,
    held_out: Tensor,
    *,
    source: str,
    out: Path,
    overwrite: bool = False,
    state: Path | None = None,
    as_json: bool = False,
) -> None:
    """Explore, write the page to ``out``, print a table or JSON on standard output.

    Args:
        teacher: fp32 model.
        calibration: int64 token ids [w, t]. ``held_out``: likewise, they only measure.
        source: the model's name for the page.
        out: the HTML file; see :func:`check_page`. ``overwrite``: replace it if it exists.
        state: folder for what is finished. The caller removes it when it is no longer needed.
        as_json: print the exploration instead of a table.

    Raises:
        MLAError: the model, the state or the page cannot be used.
    """
    from mla.convert.explore import explore
    from mla.convert.explore_page import page

    check_page(out, overwrite=overwrite, source=source)
    with console.progress("exploring") as advance:
        found = explore(
            teacher,
            calibration,
            held_out,
            state=state,
            on_progress=console.teller(advance),
        )
    with whole(out) as partial:
        partial.write_text(page(found, source), encoding="utf-8")
    if as_json:
        console.print_json(found)
        return
    _show(found)
    console.people.print(f"{out} has the curves and what every layer needs.")


def choose_command(
    teacher: PreTrainedModel,
    calibration: Tensor,
    held_out: Tensor,
    promise: Promise,
    *,
    state: Path | None = None,
) -> Point:
    """The smallest cache that keeps the promise; says what was tried. Convert with its rank and rope.

    Raises:
        MLAError: no cache keeps it, with the best seen.
    """
    from mla.convert.explore import smallest

    try:
        with console.progress("searching") as advance:
            found = smallest(
                teacher,
                calibration,
                held_out,
                promise,
                state=state,
                on_progress=console.teller(advance),
            )
    except UnwrittenError:
        raise
    except MLAError as error:
        kept = "" if state is None else f". What was measured stays in {state.parent} for another promise"
        raise MLAError(f"{error}{kept}") from error
    point = found.point
    console.people.print(
        f"chosen of {len(found.tried)} tried: rank {point.rank}, rope {point.rope}, {point.cache:.1%} of the "
        f"original cache; KL {point.kl:.4f}, perplexity {point.perplexity:.3f} (original "
        f"{found.teacher_perplexity:.3f})"
    )
    return point


def _show(found: Exploration) -> None:
    from rich.table import Table

    table = Table(caption=f"perplexity of the original {found.teacher_perplexity:.2f}; * the knee")
    for title in ("bytes/token", "cache", "r", "p", "perplexity", "KL", "same token", ""):
        table.add_column(title, justify="right")
    for point in found.points:
        table.add_row(
            f"{point.bytes_per_token:,}",
            f"{point.cache:.1%}",
            str(point.rank),
            str(point.rope),
            f"{point.perplexity:.2f}",
            f"{point.kl:.4f}",
            f"{point.top1:.1%}",
            "*" if point == found.knee else "",
        )
    console.answers.print(table)
