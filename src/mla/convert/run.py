"""A whole conversion, from a model on disk to a checkpoint folder with its report."""

from __future__ import annotations

import json
import re
import shlex
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DeepseekV3ForCausalLM, PreTrainedModel

from mla.convert.check import check_convertible
from mla.convert.checkpoint import cached_numbers
from mla.convert.evaluation import Decoding, decode_greedily, evaluate, layer_errors
from mla.convert.healing import heal
from mla.convert.pipeline import budget_for, convert
from mla.convert.promise import Promise
from mla.convert.saving import check_output, save
from mla.convert.workspace import Notice, Progress, Request, Workspace, workspace
from mla.reading import is_hub_id, local_path


def run(
    source: str,
    teacher: PreTrainedModel,
    tokenizer: Any,
    out: Path,
    request: Request,
    *,
    overwrite: bool = False,
    texts: Sequence[str | None] | None = None,
    promise: Promise | None = None,
    search: Workspace | None = None,
    on_progress: Progress | None = None,
    on_notice: Notice | None = None,
) -> dict[str, Any]:
    """Convert ``teacher``, heal it where asked for, measure the result, write it to ``out``.

    Args:
        source: name of the teacher for the report.
        teacher: fp32 model that :func:`check_convertible` accepts.
        tokenizer: its tokenizer.
        out: folder to create.
        request: see :class:`Request`.
        overwrite: replace ``out`` if it exists.
        texts: the request's, of :func:`read_texts`, where they have been read.
        promise: what the result is held against; the report says whether it is kept.
        search: the workspace in which this request's budget was found: see :func:`workspace`.
        on_progress: called as (stage, done, total).
        on_notice: called with a sentence where parts of an earlier request cannot be used.

    Returns:
        The facts that report.json holds.

    Raises:
        MLAError: the model, the request or the folder cannot be used.
    """
    out = out.absolute()  # whatever the current folder is when the work is done
    check_output(out, dtype=getattr(torch, request.dtype), overwrite=overwrite, source=source)
    check_convertible(teacher.config)
    budget_for(teacher.config, cache=request.cache, rank=request.rank, rope=request.rope)
    with workspace(
        teacher,
        tokenizer,
        out,
        request,
        "converting",
        texts=texts,
        search=search,
        on_progress=on_progress,
        on_notice=on_notice,
    ) as work:
        return _finish(source, teacher, tokenizer, out, work, request, promise, overwrite, on_progress)


def _finish(
    source: str,
    teacher: PreTrainedModel,
    tokenizer: Any,
    out: Path,
    work: Workspace,
    request: Request,
    promise: Promise | None,
    overwrite: bool,
    on_progress: Progress | None,
) -> dict[str, Any]:
    dtype = getattr(torch, request.dtype)
    student = convert(
        teacher,
        calibration=work.calibration,
        cache=request.cache,
        rank=request.rank,
        rope=request.rope,
        split_query=request.split_query,
        state=work.place,
        on_progress=on_progress,
    )
    healing = None
    if request.heal:
        healing = heal(
            student,
            teacher,
            work.training,
            work.held_out,
            minutes=request.heal,
            seed=request.seed,
            state=work.place / "healing.pt",
            on_progress=on_progress,
        )
    with torch.no_grad():
        for parameter in student.parameters():  # what is measured is what is written
            parameter.copy_(parameter.to(dtype))
    # As it is cached by default: a checkpoint in bf16 decodes on latents in bf16.
    cache_format = "bf16" if dtype == torch.bfloat16 else None
    decoded = decode_greedily(student, work.held_out, cache_format=cache_format)
    facts = _facts(source, teacher, request, out, decoded)
    facts["heal"] = None
    if healing is not None:
        # The windows are too few to choose the weights on some and to report on others.
        given = {"minutes": request.heal, "chosen_on": "the windows that quality is measured on"}
        facts["heal"] = given | asdict(healing)
    facts["quality"] = _quality(teacher, student, work.held_out, request, on_progress)
    kept = promise is not None and _kept(promise, facts["quality"])
    facts["promise"] = None
    if promise is not None:
        facts["promise"] = asdict(promise) | {
            "kept": kept,
            "new_text": not work.seen,
            "seen_windows": work.seen,
        }
    facts["layer_errors"] = layer_errors(student, teacher, work.held_out)
    facts["seconds"] = round(time.monotonic() - work.started, 1)
    student.to(dtype)  # one tensor after another: the save then holds no second copy of them
    save(student, tokenizer, out, report=facts, dtype=dtype, overwrite=overwrite)
    told: dict[str, Any] = json.loads((out / "report.json").read_text(encoding="utf-8"))
    return told


def _facts(
    source: str, teacher: PreTrainedModel, request: Request, out: Path, decoded: Decoding
) -> dict[str, Any]:
    """What only this run knows; :func:`save` adds dims, dtype and versions."""
    original = cached_numbers(teacher.config)
    size = 4 if request.dtype == "float32" else 2
    return {
        "source": source,
        # What is not here came from the Hub.
        "base_model": source if is_hub_id(source) and local_path(source) is None else None,
        "license": _licence(source),
        "command": _command(source, out, request),
        "dims": {"original_numbers_per_token_and_layer": original},
        "calibration": {
            "texts": list(request.calibration),
            "windows": request.windows,
            "window": request.window,
            "seed": request.seed,
        },
        "cache_bytes_per_token": {
            "original": original * size * teacher.config.num_hidden_layers,
            "converted": decoded.cache_bytes_per_token,
        },
        "decoding": asdict(decoded),
    }


def _command(source: str, out: Path, request: Request) -> str:
    """The command line that asks for the same."""
    words: list[object] = ["mla", "convert", source, out.name]
    for name in ("cache", "rank", "rope"):
        value = getattr(request, name)
        words += [] if value is None else [f"--{name}", value]
    for text in request.calibration:
        words += ["--calibration", text]
    words += ["--windows", request.windows, "--window", request.window, "--seed", request.seed]
    words += ["--heal", request.heal] if request.heal else []
    words += ["--split-query"] if request.split_query else []
    return shlex.join(str(word) for word in [*words, "--dtype", request.dtype])


def _licence(source: str) -> str | None:
    """What the model card in the original's folder names as its licence, if there is one that does."""
    folder = local_path(source)
    card = None if folder is None else folder / "README.md"
    if card is None or not card.is_file():
        return None
    try:
        text = card.read_text(encoding="utf-8", errors="replace")
    except OSError:  # the model is converted, and its licence is a matter of its own
        return None
    head = re.match(r"---\s*\n(.*?)\n---", text, re.DOTALL)
    if head is None:
        return None
    named = re.search(r"^license:[ \t]*[\"']?([\w.+-]+)[\"']?[ \t]*$", head[1], re.MULTILINE)
    return None if named is None else named[1]


def _kept(promise: Promise, quality: dict[str, Any]) -> bool:
    return promise.kept(
        kl=quality["kl"], perplexity=quality["perplexity"], original=quality["teacher_perplexity"]
    )


def _quality(
    teacher: PreTrainedModel,
    student: DeepseekV3ForCausalLM,
    held_out: Tensor,
    request: Request,
    on_progress: Progress | None,
) -> dict[str, Any]:
    def tell(done: int, total: int) -> None:
        if on_progress is not None:
            on_progress("measuring", done, 2 * total)

    original = evaluate(teacher, held_out, on_progress=tell)
    found = evaluate(
        student,
        held_out,
        against=teacher,
        on_progress=lambda done, total: tell(total + done, total),
    )
    return {
        "text": " and ".join(
            "written by the model itself" if name == "self" else f"the last part of {name}"
            for name in request.calibration
        ),
        "windows": held_out.shape[0],
        "window": held_out.shape[1],
        "tokens": found.tokens,
        "teacher_perplexity": original.perplexity,
        "perplexity": found.perplexity,
        "kl": found.kl,
        "top1": found.agreement,
        "nll_by_position": list(found.nll_by_position),
        "teacher_nll_by_position": list(original.nll_by_position),
    }
