"""``mla convert``: an MHA, GQA or MQA model becomes an MLA checkpoint that stock software loads."""

import json
import time
from pathlib import Path
from typing import Annotated

import typer

from mla.cli import console


def convert(
    model: console.Model,
    out: Annotated[Path, typer.Argument(help="Folder to write; must not exist, or --overwrite.")],
    cache: Annotated[
        float | None, typer.Option(help="Cache of the result as a share of the original's, such as 0.5.")
    ] = None,
    rank: Annotated[
        int | None, typer.Option(help="Latent rank r: instead of --cache, or beside --rope.")
    ] = None,
    rope: Annotated[int | None, typer.Option(help="Width p of the shared rotary key, even.")] = None,
    calibration: Annotated[
        str | None,
        typer.Option(help="A UTF-8 text to calibrate on; by default English that ships with Python."),
    ] = None,
    windows: Annotated[int, typer.Option(help="Windows of calibration text.")] = 24,
    window: Annotated[int, typer.Option(help="Tokens per window.")] = 256,
    seed: Annotated[int, typer.Option(help="Which part of the calibration text is read.")] = 0,
    dtype: Annotated[str, typer.Option(help="Of the written weights: float32 or bfloat16.")] = "float32",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it exists.")] = False,
    as_json: console.Json = False,
) -> None:
    """Convert a Llama-type MODEL (MHA, GQA or MQA) to Multi-head Latent Attention and write it to OUT.

    OUT is a DeepseekV3ForCausalLM checkpoint: Transformers and vLLM load it without remote code. It appears
    when it is whole; an interrupted conversion leaves nothing that looks like a model.
    """
    content = None if calibration is None else console.read_text(calibration)
    started = time.monotonic()
    import torch

    from mla.convert import calibration_text, check_convertible, check_output, save, tokenize_windows
    from mla.convert import convert as to_mla
    from mla.integrations.loading import load_config, load_model, load_tokenizer

    written: torch.dtype = getattr(torch, console.check_dtype(dtype, "float32", "bfloat16", "float16"))
    with console.quiet_libraries():
        check_output(out, dtype=written, overwrite=overwrite)
        check_convertible(load_config(model))
        tokenizer = load_tokenizer(model)
        ids = tokenize_windows(content or calibration_text(), tokenizer, windows, window, seed=seed)
        teacher = load_model(model, dtype="float32")
        with console.progress("converting") as advance:
            student = to_mla(
                teacher,
                cache=cache if cache is not None or rank is not None or rope is not None else 0.5,
                rank=rank,
                rope=rope,
                calibration=ids,
                on_progress=lambda label, done, total: advance(done, total, label),
            )
        config = student.config
        report = {
            "source": model,
            "calibration": calibration or "docstrings of the Python standard library",
            "calibration_tokens": ids.numel(),
            "seed": seed,
            "seconds": round(time.monotonic() - started, 1),
        }
        save(student, tokenizer, out, report=report, dtype=written, overwrite=overwrite)
    if as_json:
        console.print_json(json.loads((out / "convert.json").read_text(encoding="utf-8")))
        return
    console.people.print(
        f"{out}: latent rank {config.kv_lora_rank} + rotary key {config.qk_rope_head_dim} numbers per token "
        f"and layer, in {report['seconds']} s. Next: mla generate {out} 'Hello'"
    )
