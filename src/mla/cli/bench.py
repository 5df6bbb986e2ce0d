"""``mla bench``: how fast a model is here."""

import importlib.metadata
from dataclasses import asdict
from typing import Annotated

import typer
from rich.table import Table

from mla.cli import console
from mla.errors import MLAError

_CONTEXTS = (512, 2048, 4096)


def bench(
    model: console.MLAModel,
    context: Annotated[
        list[int] | None,
        typer.Option(
            help="Tokens that are read before others are written; may be given several times. By default "
            "512, 2048 and 4096, as far as the model goes."
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(help="Tokens written at each.")] = 16,
    stock: Annotated[
        bool, typer.Option("--stock", help="Time the model as Transformers runs it, too.")
    ] = False,
    dtype: console.Dtype = "auto",
    cache_format: console.CacheFormat = "auto",
    device: console.Device = "cpu",
    as_json: console.Json = False,
) -> None:
    """Time MODEL reading and writing, absorbed, one sequence of random tokens.

    Nothing is timed before it gives the answers that Transformers gives.
    """
    import torch

    from mla.integrations.loading import load_mla_config, load_mla_model
    from mla.integrations.speed import measure_speed
    from mla.ops import native

    if tokens < 2:
        raise MLAError(f"--tokens: expected at least 2, got {tokens}")
    checked = console.check_dtype(dtype)
    with console.quiet_libraries():
        _, dimensions = load_mla_config(model)
        most = dimensions.max_position_embeddings - tokens
        contexts = context or [each for each in _CONTEXTS if each <= most] or [most]
        if not all(1 <= each <= most for each in contexts):
            raise MLAError(f"--context: expected 1 to {most} beside {tokens} tokens to write, got {contexts}")
        opened, _, chosen = load_mla_model(model, dtype=checked, cache_format=cache_format, device=device)
        with console.progress("timing") as advance:
            found = measure_speed(
                opened,
                contexts,
                cache_format=chosen,
                tokens=tokens,
                ways=("absorbed", "stock") if stock else ("absorbed",),
                on_progress=advance,
            )
    setting = {
        "model": model,
        "dtype": str(opened.get_input_embeddings().weight.dtype).removeprefix("torch."),
        "cache_format": chosen,
        "device": str(opened.device),
        "threads": torch.get_num_threads(),
        "kernels": native.best() or "none",
        "versions": {name: importlib.metadata.version(name) for name in ("mla", "torch", "transformers")},
    }
    if as_json:
        console.print_json(setting | {"speeds": [asdict(each) for each in found]})
        return
    table = Table()
    for title in ("context", "", "read, tokens/s", "written, tokens/s", "ms/token", "cache bytes/token"):
        table.add_column(title, justify="left" if title == "" else "right")
    for each in found:
        table.add_row(
            f"{each.context:,}",
            each.way,
            f"{each.prefill:,.0f}",
            f"{each.decode:.1f}",
            f"{1e3 / each.decode:.1f}",
            f"{each.cache_bytes_per_token:,.0f}",
        )
    console.answers.print(table)
    console.people.print(
        f"{setting['dtype']}, cache in {chosen}, kernels {setting['kernels']}, {setting['threads']} threads; "
        "answers compared with Transformers' first",
        style="dim",
    )
