"""One self-contained page of a plan: style, formulas, drawing and data in a single HTML file."""

from __future__ import annotations

import html
import json
import math
from pathlib import Path
from typing import Any

from mla.looks import style_of
from mla.plan import formulas
from mla.plan.hardware import Hardware, all_hardware
from mla.plan.planner import Plan, weight_peak
from mla.plan.report import column_titles, notes, own_column
from mla.plan.shape import converted
from mla.plan.steps import SHEET
from mla.plan.words import count_words
from mla.whole import whole

_HERE = Path(__file__).parent


def write_page(plan: Plan, path: str | Path) -> None:
    """Write the page to ``path``, whole or not at all; MLAError if that cannot be done."""
    with whole(Path(path)) as partial:
        partial.write_text(page(plan), encoding="utf-8")


def page(plan: Plan) -> str:
    """The page as text. Nothing in it is loaded from anywhere."""
    shape = plan.shape
    data = {
        "inputs": {name: value for name, value in plan.values.inputs.items() if math.isfinite(value)},
        "groups": list(shape.groups),
        "rotaryKeys": _rotary_keys(plan),
        "machines": [_machine(plan, hardware) for hardware in _machines(plan)],
        "own": own_column(plan),
        "titles": column_titles(plan),
        "explained": {
            name: {"text": f.text, "unit": f.unit, "meaning": f.meaning, "source": f.source}
            for name, f in SHEET.formulas.items()
        },
        "notes": _notes(plan),
        "setting": _setting(plan),
        "source": shape.source,
        "version": _version(),
        "steps": formulas.STEPS,
        "lastDoubling": formulas.LAST_DOUBLING,
    }
    text = (_HERE / "page.html").read_text(encoding="utf-8")
    parts = {
        "@TITLE@": html.escape(shape.name),
        "@CSS@": style_of(_HERE / "page.css"),
        "@FORMULAS@": SHEET.javascript(),
        # "</" would end the script element, whatever it stands in.
        "@DATA@": json.dumps(data, ensure_ascii=False).replace("</", "<\\/"),
        "@JS@": (_HERE / "page.js").read_text(encoding="utf-8"),
    }
    for mark, part in parts.items():
        text = text.replace(mark, part)
    return text


def _machines(plan: Plan) -> list[Hardware]:
    others = [hardware for hardware in all_hardware() if hardware.name != plan.hardware.name]
    return [plan.hardware, *others]


def _machine(plan: Plan, hardware: Hardware) -> dict[str, Any]:
    own = hardware.name == plan.hardware.name
    return {
        "name": hardware.name,
        "memory": plan["memory"] if own else hardware.memory,
        "bandwidth": hardware.bandwidth,
        "peak_weights": weight_peak(plan.shape, plan.question, hardware),
        "peak_attention": hardware.peak("fp32" if plan.question.cache_format == "fp32" else "bf16"),
        "source": hardware.source,
    }


def _rotary_keys(plan: Plan) -> list[tuple[int, int]]:
    """(rank, rotary key) of a converted model wherever the key changes; MLA models keep theirs: none."""
    if plan.shape.kind == "MLA":
        return []
    main, hidden = plan.shape.groups[0], int(plan.shape.inputs["d"])
    kv, width = int(main["own_groups"]), int(main["w"])
    found: list[tuple[int, int]] = []
    # A cache no larger than the model's own has room for these ranks beside the widest key.
    for rank in range(1, 2 * kv * width - max(2, width) + 1):
        rope = converted(kv, width, hidden, rank).rope
        if not found or found[-1][1] != rope:
            found.append((rank, rope))
    return found


def _setting(plan: Plan) -> str:
    shape, question = plan.shape, plan.question
    own = own_column(plan)
    return (
        f"{shape.kind}, {count_words(plan[f'parameters_{own}'])} parameters "
        f"({count_words(plan[f'active_parameters_{own}'])} active) in "
        f"{plan.weight_words}, cache in {question.cache_format}, "
        f"{question.query_tokens} query token(s) per step, {question.tensor_parallel} device(s)."
    )


def _notes(plan: Plan) -> list[str]:
    general = [
        "Times are the roofline, weights then attention without overlap, at the clocks and number formats "
        "stated: neither predictions (launches, communication, imperfect kernels) nor bounds (a step that "
        "overlaps the two, or a processor above its base clock, may be faster).",
        "MHA means keys as wide as MLA's part without position and values as they are, RoPE inside; caching "
        f"MLA's expanded keys and values would take {plan['numbers_expanded_cache']:,.0f} numbers per token "
        "and layer.",
    ]
    return [*notes(plan), *general]


def _version() -> str:
    from mla import __version__

    return __version__
