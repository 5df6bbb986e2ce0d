"""What a plan says: the table, the sentences below it, the traced figures and the JSON."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from mla.plan.planner import Plan
from mla.plan.rows import COLUMNS, SIDE_BY_SIDE
from mla.plan.steps import SHEET
from mla.plan.words import byte_words, count_words, plain_words, time_words, whole_words, words

#: What a reader must know before memory is bought by these figures.
NOT_COUNTED = "Not counted: activations, the runtime's own memory, communication between devices."
TITLES = {"mha": "MHA", "gqa": "GQA", "mqa": "MQA", "mla": "MLA absorbed", "expanded": "MLA expanded"}


def column_titles(plan: Plan) -> dict[str, str]:
    """Titles of the five columns, with the groups of GQA."""
    return {**TITLES, "gqa": f"GQA ({plan.shape.groups[0]['groups']:.0f} groups)"}


def own_column(plan: Plan) -> str:
    """The column of the attention that the model was published with."""
    return plan.shape.kind.lower()


def table(plan: Plan) -> list[tuple[str, list[str]]]:
    """Rows of the comparison: a label, and a cell for each of the five columns."""
    batch, query = plan.question.batch, plan.question.query_tokens
    devices = plan.question.tensor_parallel
    each = " on each device" if devices > 1 else ""
    together = f", {batch:,} sequences together" if batch > 1 else ""

    def row(label: str, name: str, show: Any) -> tuple[str, list[str]]:
        cached = [column if f"{name}_{column}" in SHEET.formulas else "mla" for column in COLUMNS]
        return label, [show(plan[f"{name}_{column}"]) for column in cached]

    def per_token(name: str, factor: float, show: Any) -> list[str]:
        return [show(plan[f"{name}_{column}"] / factor) for column in COLUMNS]

    rows = [
        row("cached numbers per token and layer", "numbers", plain_words),
        row("cache per token, all layers", "token_bytes", byte_words),
        row(f"cache of one sequence of {plan.question.context:,} tokens", "sequence_bytes", byte_words),
    ]
    if batch > 1:
        rows.append(row(f"cache of {batch:,} sequences", "cache_bytes", byte_words))
    if devices > 1:
        rows.append(row(f"copies of the cache over {devices} devices", "copies", plain_words))
    rows += [
        row(f"weights{each}", "weights_device", byte_words),
        row("sequences that fit beside them", "sequences", plain_words),
        ("attention per token", per_token("attention_ops", query, lambda x: count_words(x, "op"))),
        ("  cache moved", per_token("cache_moved", batch * query, byte_words)),
        row("  operations per byte", "intensity", lambda x: f"{x:.1f}"),
        ("whole model per token", per_token("model_ops", query, lambda x: count_words(x, "op"))),
        row("  bytes moved", "moved_per_token", byte_words),
        row("step at the roofline: weights", "weights_time", time_words),
        row("  attention", "attention_time", time_words),
        row("  together", "step_time", time_words),
        ("attention bound by", [bound(plan, "attention", column) for column in COLUMNS]),
        ("weights bound by", [bound(plan, "weights", column) for column in COLUMNS]),
        row(f"tokens per second{together}", "tokens_per_second", lambda x: count_words(x).replace(" ", "")),
    ]
    return rows


def bound(plan: Plan, part: str, column: str) -> str:
    """Whether moving or computing takes longer in "attention" or "weights"."""
    memory, arithmetic = plan[f"{part}_memory_time_{column}"], plan[f"{part}_arithmetic_time_{column}"]
    return "memory" if memory >= arithmetic else "arithmetic"


def sentences(plan: Plan) -> list[str]:
    """What the table does not show: crossings, fit, tensor parallel, MTP, and what was assumed."""
    question = plan.question
    lines = [
        f"Absorbed takes fewer operations than expanded up to {_down(plan['queries_crossing'])} query tokens "
        f"at a context of {question.context:,}; for {question.query_tokens} query token(s) {_fewer(plan)}."
    ]
    lines += [_overtakes(plan, column) for column in ("mha", "gqa", "mqa", "expanded")]
    lines.append(
        "The cache weighs as much as the weights at a context of "
        + ", ".join(f"{whole_words(plan[f'outweighs_{c}'])} ({TITLES[c]})" for c in SIDE_BY_SIDE)
        + f" with a batch of {question.batch:,}."
    )
    memory = plan["memory"]
    weights = plan[f"weights_device_{own_column(plan)}"]
    if weights >= memory:
        lines.append(
            f"The weights do not fit: {byte_words(weights)} on a device of {byte_words(memory)}. "
            f"{_what_fits(plan)}; the times are what the bandwidth would allow if they did."
        )
    elif plan["weights_device_mla"] >= memory:
        lines.append(
            f"As MLA the weights would not fit: {byte_words(plan['weights_device_mla'])} on a device of "
            f"{byte_words(memory)}; the model's own {byte_words(weights)} do."
        )
    few = [TITLES[c] for c in SIDE_BY_SIDE if plan[f"sequences_{c}"] < question.batch]
    if few and weights < memory:
        lines.append(
            f"As {', '.join(few)} there is no room beside the weights for {question.batch:,} sequence(s) of "
            f"{question.context:,} tokens: the times are what the bandwidth would allow if there were."
        )
    if question.tensor_parallel > 1:
        shared = plan["replicated_parameters"] + plan["indexer_parameters"]
        lines.append(
            f"Tensor parallel over {question.tensor_parallel}: every device holds the whole latent cache "
            f"and {byte_words(plan['weight_bytes'] * shared)} of shared projections; "
            "heads, kv_b_proj, experts and the rest are split. Data-parallel attention avoids the copies."
        )
    return [*lines, *notes(plan)]


def notes(plan: Plan) -> list[str]:
    """What a reader must know of the model and of what is left out."""
    found = list(plan.shape.notes)
    if layers := int(plan["mtp_layers"]):
        found.append(
            f"{layers} multi-token-prediction (MTP) layer(s) are counted apart: "
            f"{byte_words(plan['mtp_bytes'])} more cache per token if a drafter runs them."
        )
    return [*found, NOT_COUNTED]


def _down(value: float) -> str:
    return "any number of" if not math.isfinite(value) else f"{math.floor(value):,}"


def _what_fits(plan: Plan) -> str:
    """The fewest devices that heads can be split over and weights fit on, or that there are none."""
    heads = math.gcd(*(int(group["h"]) for group in plan.shape.groups))
    for devices in range(plan.question.tensor_parallel + 1, heads + 1):
        there = plan.values.replaced("devices", devices)
        if heads % devices == 0 and there[f"weights_device_{own_column(plan)}"] < plan["memory"]:
            return f"--tensor-parallel {devices} is the least that holds them, or a smaller --weight-format"
    return f"No --tensor-parallel that divides {heads} heads holds them, a smaller --weight-format may"


def _leaders(plan: Plan, variable: str, now: float, figure: str, column: str) -> list[tuple[float, bool]]:
    """From where on MLA absorbed has less of a figure than a column, or more: the first entry from 1 on.

    Equality is no turn; ``now``, the value that is asked for, is always looked at.
    """
    mla, other = f"{figure}_mla", f"{figure}_{column}"
    at_one = plan.values.replaced(variable, 1)
    difference = at_one[mla] - at_one[other]
    orders = [
        (1.0, (difference > 0) - (difference < 0)),
        *plan.values.turns(variable, mla, other, by_way_of=now),
    ]
    leaders: list[tuple[float, bool]] = []
    for place, order in orders:
        if order and (not leaders or leaders[-1][1] != (order < 0)):
            leaders.append((place, order < 0))
    return leaders


def _fewer(plan: Plan) -> str:
    """Whether absorbed or expanded takes fewer operations, by context."""
    leaders = _leaders(plan, "t", plan.question.context, "attention_ops", "expanded")
    names = {True: "absorbed", False: "expanded"}
    if len(leaders) < 2:
        return f"{names[bool(leaders and leaders[0][1])]} wins at every context"
    turns = [f"{names[mla]} wins beyond {whole_words(place)}" for place, mla in leaders[1:]]
    return f"{' and '.join(turns)} tokens of context"


def _overtakes(plan: Plan, column: str) -> str:
    """Who is faster now, and where that changes, along the context and along the batch."""
    gain = plan[f"step_time_{column}"] / plan["step_time_mla"]
    other = TITLES[column]
    if math.isclose(gain, 1):
        now = f"A step with MLA absorbed takes as long as with {other} here"
    elif gain > 1:
        now = f"A step with MLA absorbed is {gain:.2f} times as fast as with {other} here"
    else:
        now = f"A step with {other} is {1 / gain:.2f} times as fast as with MLA absorbed here"
    names = {True: "MLA", False: other}
    turns = [
        f"{names[mla]} overtakes {names[not mla]} at {whole_words(place)} {unit}"
        for variable, asked, unit in (
            ("t", plan.question.context, "tokens of context with this batch"),
            ("b", plan.question.batch, "sequences of this length"),
        )
        for place, mla in _leaders(plan, variable, asked, "step_time", column)[1:]
    ]
    return f"{now}; {' and '.join(turns) if turns else 'no length and no batch changes who is first'}."


def assumptions(plan: Plan) -> str:
    """Model, machine and question in one line."""
    shape, question, hardware = plan.shape, plan.question, plan.hardware
    total = count_words(plan[f"parameters_{own_column(plan)}"])
    active = count_words(plan[f"active_parameters_{own_column(plan)}"])
    peaks = count_words(plan["peak_attention"], "op/s")
    if plan["peak_weights"] != plan["peak_attention"]:
        peaks += f" ({count_words(plan['peak_weights'], 'op/s')} with weights)"
    return (
        f"{shape.name}: {shape.kind}, {total} parameters ({active} active) in {plan.weight_words}, cache in "
        f"{question.cache_format}; {hardware.name}"
        + (f" x {question.tensor_parallel}" if question.tensor_parallel > 1 else "")
        + f": {byte_words(plan['memory'])}, {count_words(plan['bandwidth'], 'B/s')}, "
        f"{peaks}; context {question.context:,}, batch "
        f"{question.batch:,}, {question.query_tokens} query token(s)"
    )


def explained(plan: Plan) -> Iterator[str]:
    """Every figure: formula, numbers put in, result, meaning and source."""
    yield f"model: {plan.shape.source}"
    yield f"machine: {plan.hardware.source}" + (f" ({plan.hardware.note})" if plan.hardware.note else "")
    for index, group in enumerate(plan.shape.groups):
        numbers = ", ".join(f"{name} = {plain_words(value)}" for name, value in group.items())
        yield f"layers, group {index + 1}: {numbers}"
    given = ", ".join(f"{name} = {plain_words(value)}" for name, value in plan.values.inputs.items())
    yield f"given: {given}"
    yield ""
    for figure in plan.figures():
        put_in = ", ".join(f"{name} = {plain_words(value)}" for name, value in figure.numbers.items())
        exact = plain_words(figure.result)
        rounded = words(figure.result, figure.unit)
        shown = rounded if rounded.startswith(exact) else f"{exact} {figure.unit} ({rounded})"
        yield f"{figure.name} = {figure.formula}"
        if put_in:
            yield f"    {put_in}"
        yield f"    = {shown}: {figure.meaning} [{figure.source}]"


def as_json(plan: Plan) -> dict[str, Any]:
    """Everything as plain data; a crossing that never comes is null."""

    def finite(value: float) -> float | None:
        return value if math.isfinite(value) else None

    figures = {}
    for figure in plan.figures():
        numbers = {name: finite(value) for name, value in figure.numbers.items()}
        figures[figure.name] = {**asdict(figure), "numbers": numbers, "result": finite(figure.result)}
        del figures[figure.name]["name"]
    shape = plan.shape
    return {
        "model": {
            "name": shape.name,
            "kind": shape.kind,
            "source": shape.source,
            "max_context": shape.max_context,
        },
        "hardware": {**asdict(plan.hardware), "memory": plan["memory"]},
        "question": {
            **asdict(plan.question),
            "weight_format": plan.weight_words,
        },
        "notes": notes(plan),
        "summary": sentences(plan),
        "inputs": {name: finite(value) for name, value in plan.values.inputs.items()},
        "groups": list(shape.groups),
        "figures": figures,
    }
