"""``mla plan``: how much cache, how many users, how fast, bound by what, and what MLA changes."""

import math
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from mla.cli import console


def plan(
    model: Annotated[
        str, typer.Argument(help="A model folder, a config.json, a known name such as deepseek-v3, a Hub id.")
    ],
    context: Annotated[
        int | None, typer.Option(help="Tokens per sequence; by default 32768, or what the model takes.")
    ] = None,
    batch: Annotated[int, typer.Option(help="Sequences that decode together.")] = 1,
    hardware: Annotated[
        str,
        typer.Option(help='A known machine such as h200 or macbook-m4-max; "this machine" is measured.'),
    ] = "h100",
    memory: Annotated[
        str | None,
        typer.Option(help="Memory of one device, instead of what is known of the hardware: 80GB, 24GiB."),
    ] = None,
    cache_format: Annotated[
        str, typer.Option(help="Number format of the cache: bf16, fp16, fp32, int8 or fp8.")
    ] = "bf16",
    weight_format: Annotated[
        str | None,
        typer.Option(
            help="Number format of the weights: fp32, bf16, fp16, fp8, int8, int4, mxfp4 or nvfp4; by "
            "default the model's own."
        ),
    ] = None,
    tensor_parallel: Annotated[
        int, typer.Option(help="Devices of this hardware that share every layer.")
    ] = 1,
    query_tokens: Annotated[
        int, typer.Option(help="Query tokens per sequence and step: 1 decodes, more when speculating.")
    ] = 1,
    rank: Annotated[int | None, typer.Option(help="Another latent rank for the MLA column.")] = None,
    html: Annotated[
        str | None, typer.Option(help="Write one self-contained page with sliders to this file.")
    ] = None,
    png: Annotated[
        str | None, typer.Option(help="Draw cache against context to this PNG file; needs matplotlib.")
    ] = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="Print every formula with the numbers put in and its source.")
    ] = False,
    as_json: console.Json = False,
) -> None:
    """Compare MODEL as MHA, GQA, MQA and MLA: cache, operations, bytes moved, time at the roofline.

    Needs no weights and no torch. Every figure can be traced with --explain. docs/planning.md says what is
    counted and where published figures differ.
    """
    from mla.plan import Question, get_hardware, load_shape, make_plan, report
    from mla.reading import expect_bytes

    shape = load_shape(model, rank=rank)
    longest = math.inf if shape.max_context is None else shape.max_context
    question = Question(
        context=int(min(32768, longest)) if context is None else context,
        batch=batch,
        query_tokens=query_tokens,
        cache_format=cache_format,
        weight_format=weight_format,
        tensor_parallel=tensor_parallel,
        memory=None if memory is None else expect_bytes("--memory", memory),
    )
    answer = make_plan(shape, get_hardware(hardware), question)
    if html is not None:
        from mla.plan.page import write_page

        write_page(answer, html)
        console.people.print(f"{html}: open it in any browser; it needs no network")
    if png is not None:
        from mla.plan.picture import write_picture

        write_picture(answer, png)
        console.people.print(f"{png}: cache against context")
    if as_json:
        console.print_json(report.as_json(answer))
        return
    if explain:
        print("\n".join(report.explained(answer)))
        return
    # The answer goes to standard output; piped, it is not cut to the width of a screen that is not there.
    screen = Console(highlight=False)
    screen = screen if screen.is_terminal else Console(highlight=False, width=160)
    screen.print(report.assumptions(answer), markup=False)
    if question.context > longest:
        console.people.print(f"note: the model is made for {longest:,} tokens, not for {question.context:,}")
    shown = Table("", *report.column_titles(answer).values())
    for column in shown.columns[1:]:
        column.justify = "right"
    for label, cells in report.table(answer):
        shown.add_row(label, *cells)
    screen.print(shown)
    for line in report.sentences(answer):
        screen.print(f"- {line}", markup=False)
