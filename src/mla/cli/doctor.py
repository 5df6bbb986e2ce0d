"""``mla doctor``: is it MLA, which family, and is it safe to run absorbed?"""

from typing import Annotated

import typer
from rich.table import Table

from mla.cli import console


def doctor(
    model: console.MLAModel,
    tokens: Annotated[int, typer.Option(help="Length of the text that is compared, 8 or more.")] = 64,
    dtype: Annotated[
        str, typer.Option(help="float32 shows defects clearly; half precision adds its own rounding.")
    ] = "float32",
    device: console.Device = "cpu",
    as_json: console.Json = False,
) -> None:
    """Compare MODEL absorbed with itself as Transformers runs it, layer by layer.

    Both ends of its context are checked, the first positions and the last.

    Exit status 0: safe. 1: it differs, see the table. 2: not an MLA model, or not to be absorbed.
    """
    import torch

    from mla.config import MLAConfig
    from mla.errors import MLAError
    from mla.integrations.doctor import diagnose
    from mla.integrations.loading import load_model

    if tokens < 8:
        raise MLAError(f"--tokens: expected at least 8, got {tokens}")
    checked = console.check_dtype(dtype)
    with console.quiet_libraries():
        opened = load_model(model, dtype=checked, device=device)
        config = MLAConfig.from_transformers(opened.config)
        vocabulary = opened.config.get_text_config(decoder=True).vocab_size
        generator = torch.Generator().manual_seed(0)
        length = min(tokens, config.max_position_embeddings)
        ids = torch.randint(vocabulary, (1, length), generator=generator)
        with console.progress("comparing") as advance:
            report = diagnose(opened, ids.to(opened.device), on_progress=advance)
    worst = max(layer.error for layer in report.layers)
    spans = " and ".join(f"{first}..{last}" for first, last in report.positions)
    verdict = (
        f"safe: {model} ({report.model_type}) absorbed equals stock to {max(worst, report.logit_error):.1e} "
        f"in {len(report.layers)} attentions at positions {spans}"
        if report.safe
        else f"NOT safe: {model} ({report.model_type}): {'; '.join(report.problems)}"
    )
    if as_json:
        from dataclasses import asdict

        console.print_json({**asdict(report), "safe": report.safe, "verdict": verdict})
    else:
        table = Table("attention", "relative error")
        for layer in report.layers:
            table.add_row(layer.name, f"{layer.error:.1e}")
        table.add_row("logits", f"{report.logit_error:.1e}")
        console.people.print(table)
        console.people.print(
            f"softmax scale {report.scale[1]:.6g}, {report.bytes_per_token[0]:.0f} bytes of cache per token, "
            f"same most likely token at {report.agreement:.1%} of the positions"
        )
        print(verdict)
    if not report.safe:
        raise typer.Exit(1)
