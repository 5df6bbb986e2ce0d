"""``mla eval``: perplexity on a text, and how far a model is from another."""

from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.table import Table

from mla.cli import console


def evaluate(
    model: console.Model,
    text: Annotated[str, typer.Option(help='A UTF-8 text file; "-" reads standard input.')],
    against: Annotated[
        str | None, typer.Option(help="A reference model: adds KL divergence and agreement with it.")
    ] = None,
    window: Annotated[int, typer.Option(help="Tokens per window.")] = 1024,
    max_tokens: Annotated[int | None, typer.Option(help="Stop after this many tokens of the text.")] = None,
    stock: Annotated[bool, typer.Option("--stock", help="Run an MLA model as Transformers does.")] = False,
    dtype: console.Dtype = "auto",
    cache_format: Annotated[
        str | None,
        typer.Option(help="Run over a latent cache in fp32, fp16, bf16 or int8; by default without one."),
    ] = None,
    device: console.Device = "cpu",
    as_json: console.Json = False,
) -> None:
    """Measure MODEL on a text. Any causal language model will do; MLA models run absorbed."""
    content = console.read_text(text)
    from mla.convert.evaluation import evaluate as measure
    from mla.convert.text import check_window, cut_text
    from mla.errors import MLAError
    from mla.integrations.loading import load_config, load_model, load_tokenizer
    from mla.integrations.transformers import absorb, latent_attentions

    if max_tokens is not None and max_tokens < 1:
        raise MLAError(f"--max-tokens: expected at least 1, got {max_tokens}")
    if max_tokens is not None and max_tokens < window:
        raise MLAError(
            f"--max-tokens: expected at least one window (--window {window}), got {max_tokens}: allow more "
            "tokens, or shorten the window"
        )
    checked = console.check_dtype(dtype)
    with console.quiet_libraries():
        check_window(load_config(model), window)
        tokenizer = load_tokenizer(model)
        windows = cut_text(content, tokenizer, window, limit=max_tokens)
        if not len(windows):
            count = len(tokenizer(content, add_special_tokens=False)["input_ids"])
            raise MLAError(
                f"the text has {count} tokens, less than one window of {window}: shorten the window"
            )
        opened = load_model(model, dtype=checked, device=device)
        if latent_attentions(opened) and not stock:
            absorb(opened)
        elif cache_format is not None:
            raise MLAError("--cache-format: expected an MLA model without --stock; nothing else reads it")
        dtypes = {"dtype": _dtype(opened)}
        # "auto" may be another for the reference, and what is measured is the difference of the models alone.
        alike = dtypes["dtype"] if checked == "auto" else checked
        reference = None if against is None else load_model(against, dtype=alike, device=device)
        dtypes["reference_dtype"] = None if reference is None else _dtype(reference)
        with console.progress("measuring") as advance:
            result = measure(
                opened, windows, against=reference, cache_format=cache_format, on_progress=advance
            )
    if as_json:
        console.print_json(asdict(result) | dtypes)
        return
    table = Table(show_header=False)
    table.add_row("computed in", dtypes["dtype"])
    table.add_row("tokens", f"{result.tokens}")
    table.add_row("perplexity", f"{result.perplexity:.3f}")
    if result.kl is not None and result.agreement is not None:
        table.add_row("reference computed in", dtypes["reference_dtype"])
        table.add_row("KL to the reference", f"{result.kl:.4f} nats per token")
        table.add_row("same most likely token", f"{result.agreement:.1%}")
    by_position = ", ".join(f"{nll:.2f}" for nll in result.nll_by_position)
    table.add_row("nats per token, start to end of the window", by_position)
    console.answers.print(table)


def _dtype(model: Any) -> Any:
    """The name of the dtype that a model computes in, as --dtype takes it."""
    return str(model.get_input_embeddings().weight.dtype).removeprefix("torch.")
