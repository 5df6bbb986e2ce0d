"""The main plot of a plan, cache against context, as a PNG. Needs matplotlib."""

from __future__ import annotations

from pathlib import Path

from mla.errors import MLAError
from mla.plan.planner import Plan
from mla.plan.report import column_titles, own_column
from mla.plan.rows import SIDE_BY_SIDE
from mla.plan.words import byte_words
from mla.whole import whole

_COLOURS = {"mha": "#b3443c", "gqa": "#b07a14", "mqa": "#3d7f5c", "mla": "#2c5fc4"}


def write_picture(plan: Plan, path: str | Path) -> None:
    """Draw cache bytes of the batch against context, both logarithmic, 1,200 by 800 pixels.

    Raises:
        MLAError: matplotlib is not installed, or the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import FuncFormatter
    except ImportError as error:
        raise MLAError("--png needs matplotlib: pip install matplotlib") from error
    # Figure without pyplot: no window system is asked for, no global state is left.
    figure = Figure(figsize=(8, 5.33), dpi=150, layout="constrained")
    axes = figure.subplots()
    top = max(17, (max(plan.shape.max_context or 1, plan.question.context) - 1).bit_length())
    contexts = [2 ** (step / 2) for step in range(14, 2 * top + 1)]
    titles = column_titles(plan)
    for column in SIDE_BY_SIDE:
        name = f"cache_device_{column}"
        values = [plan.values.replaced("t", context)[name] for context in contexts]
        axes.loglog(contexts, values, label=titles[column], color=_COLOURS[column], linewidth=2, base=2)
        axes.plot([plan.question.context], [plan[name]], "o", color=_COLOURS[column])
    axes.axvline(plan.question.context, color="#5b6675", linestyle=":", linewidth=1)
    free = plan["memory"] - plan[f"weights_device_{own_column(plan)}"]
    if free > 0:
        axes.axhline(free, color="#5b6675", linestyle="--", linewidth=1)
        axes.annotate(f"{byte_words(free)} free beside the weights", (contexts[0], free), va="bottom")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x / 1024:g}k" if x >= 1024 else f"{x:g}"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: byte_words(y)))
    axes.set_xlabel("tokens of context")
    each = " on each device" if plan.question.tensor_parallel > 1 else ""
    axes.set_ylabel(f"cache in {plan.question.cache_format}{each}, batch {plan.question.batch:,}")
    axes.set_title(f"{plan.shape.name}: cache against context ({plan.hardware.name})")
    axes.grid(alpha=0.3)
    axes.legend()
    with whole(Path(path)) as partial:
        figure.savefig(partial, format="png")
