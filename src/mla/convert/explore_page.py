"""The page of an exploration: quality against cache, the knee, and what every layer needs."""

from __future__ import annotations

from mla.convert import drawing
from mla.convert.drawing import Chart, Series
from mla.convert.explore import Exploration, Point

_KNEE = (
    "The knee is the point of the curve that lies furthest below the straight line between its two ends, "
    "both axes scaled to the range that was tried: beyond it a byte saved costs more than the average one. "
    "It depends on that range and promises nothing; mla convert --max-kl keeps a promise."
)


def page(exploration: Exploration, source: str) -> str:
    """One self-contained HTML page about ``source``, the name of the model that was explored."""
    parts = [
        f"<h1>{drawing.text(source)}: how small may its cache be?</h1>",
        f"<p>{drawing.text(_summary(exploration))}</p>",
        drawing.cards(_cards(exploration)),
        '<div class="charts">',
        drawing.figure("KL against cache", drawing.lines(_kl(exploration)), _caption(exploration)),
        drawing.figure(
            "Perplexity against cache",
            drawing.lines(_perplexity(exploration)),
            f"Dashed: the original, {exploration.teacher_perplexity:.2f}.",
        ),
        drawing.figure("Every conversion", _table(exploration), _KNEE, across=True),
        drawing.figure(
            "Directions that a layer needs",
            drawing.lines(_directions(exploration)),
            "How many directions of the latent hold 90% and 99% of the layer's joint key and value energy, "
            "measured as squared error of the block's output on the calibration text. Layers above the "
            "dashed line (the rank at the knee, or of the largest cache) lose the most.",
        ),
        drawing.figure(
            "Energy that a rank leaves out",
            drawing.lines(_spectra(exploration)),
            "One line per layer.",
        ),
        "</div>",
        f"<footer>{drawing.text(_footer(exploration))}</footer>",
    ]
    return drawing.frame(f"{source}: cache and quality", "\n".join(parts))


def _summary(exploration: Exploration) -> str:
    windows, length = exploration.held_out
    sizes = len({point.numbers for point in exploration.points})
    return (
        f"The attention was converted to Multi-head Latent Attention {len(exploration.points)} times, "
        f"without healing: {sizes} sizes of the cache, several splits between latent and rotary key. Each "
        f"was measured on the same {windows:,} held-out windows of {length:,} tokens."
    )


def _cards(exploration: Exploration) -> list[tuple[str, str]]:
    knee = exploration.knee
    if knee is None:
        return [
            ("no knee", "every byte costs as much as the others: the curve is straight, or has two points")
        ]
    return [
        (f"{knee.bytes_per_token:,}", f"bytes per token at the knee, {knee.cache:.1%} of the original's"),
        (f"{knee.rank} + {knee.rope}", "latent rank + rotary key"),
        (f"{knee.kl:.3f}", "KL to the original, nats per token"),
        (f"{knee.perplexity:.2f}", f"perplexity (original: {exploration.teacher_perplexity:.2f})"),
    ]


def _caption(exploration: Exploration) -> str:
    marked = "" if exploration.knee is None else "Ring: the knee. "
    original = exploration.original_bytes_per_token
    return f"{marked}Caches in bf16; the original's takes {original:,} bytes per token."


def _series(exploration: Exploration, name: str) -> list[Series]:
    def place(point: Point) -> tuple[float, float]:
        return float(point.bytes_per_token), getattr(point, name)

    best = [place(point) for point in exploration.frontier]
    rest = [place(point) for point in exploration.points if point not in exploration.frontier]
    return [Series("best split", "mla", best), Series("other splits", "gqa", rest, "dots")]


def _kl(exploration: Exploration) -> Chart:
    knee = exploration.knee
    return Chart(
        label="KL divergence from the original against cache bytes per token",
        x_label="cache, bytes per token",
        y_label="KL, nats per token",
        series=_series(exploration, "kl"),
        floor=0.0,
        ring=None if knee is None else (float(knee.bytes_per_token), knee.kl),
    )


def _perplexity(exploration: Exploration) -> Chart:
    knee = exploration.knee
    return Chart(
        label="Perplexity against cache bytes per token",
        x_label="cache, bytes per token",
        y_label="perplexity, logarithmic",
        series=_series(exploration, "perplexity"),
        log=True,
        across=[exploration.teacher_perplexity],
        ring=None if knee is None else (float(knee.bytes_per_token), knee.perplexity),
    )


def _directions(exploration: Exploration) -> Chart:
    spectra = exploration.spectra
    return Chart(
        label="Directions that hold 90% and 99% of the energy, by layer",
        x_label="layer",
        y_label="directions",
        series=[
            Series("99%", "mla", [(float(i), float(each.directions_99)) for i, each in enumerate(spectra)]),
            Series("90%", "mqa", [(float(i), float(each.directions_90)) for i, each in enumerate(spectra)]),
        ],
        floor=0.0,
        across=[float((exploration.knee or exploration.points[0]).rank)],
        whole=True,
    )


def _spectra(exploration: Exploration) -> Chart:
    # 1e-6 of the energy is nothing, and far below it lies rounding.
    visible = [
        [(float(rank), left) for rank, left in zip(each.ranks, each.left_out, strict=True) if left > 1e-6]
        for each in exploration.spectra
    ]
    return Chart(
        label="Share of the energy that a latent of a given rank leaves out, one line per layer",
        x_label="latent rank",
        y_label="share left out, logarithmic",
        series=[Series("layers", "mla", points, "thin") for points in visible],
        log=True,
        down=[float((exploration.knee or exploration.points[0]).rank)],
    )


def _table(exploration: Exploration) -> str:
    head = ("bytes per token", "of original", "r", "p", "perplexity", "KL", "same token", "time")
    rows = [
        (
            f"{point.bytes_per_token:,}",
            f"{point.cache:.1%}",
            f"{point.rank}",
            f"{point.rope}",
            f"{point.perplexity:.2f}",
            f"{point.kl:.4f}",
            f"{point.top1:.1%}",
            f"{point.seconds:.0f} s",
        )
        for point in exploration.points
    ]
    chosen = None if exploration.knee is None else exploration.points.index(exploration.knee)
    return drawing.table(head, rows, chosen=chosen)


def _footer(exploration: Exploration) -> str:
    from mla import __version__

    windows, length = exploration.calibration
    return (
        f"Calibrated on {windows:,} windows of {length:,} tokens. Written by mla {__version__}; mla convert "
        "--explore --json gives the figures."
    )
