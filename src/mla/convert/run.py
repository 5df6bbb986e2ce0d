"""A whole conversion, from a model on disk to a checkpoint folder with its report; it survives being killed.

What is finished lies in a hidden folder beside the result: the calibration tokens, the factors of every
layer, the state of the healing. The same request finds it again and goes on; another request starts anew. The
folder goes when the result is in place.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import DeepseekV3ForCausalLM, PreTrainedModel

from mla import __version__
from mla.convert.check import check_convertible
from mla.convert.checkpoint import cached_numbers
from mla.convert.evaluation import evaluate, layer_errors
from mla.convert.healing import heal
from mla.convert.pipeline import budget_for, check_split_query, convert
from mla.convert.saving import check_output, save
from mla.convert.text import check_windows, tokenize_windows, write_windows
from mla.digest import canonical, digest, digest_of_weights
from mla.errors import MLAError

Progress = Callable[[str, float, float], None]

# Windows that only measure, beside every so many that calibrate.
_CALIBRATING_PER_MEASURING = 6
# Self-written tokens more per minute of healing: each is read a few times until the time is over.
_TOKENS_PER_MINUTE = 1536


@dataclass(frozen=True)
class Request:
    """What the user asks for; two runs with equal requests of one model give the same result.

    Attributes:
        cache, rank, rope: see :func:`mla.convert.convert`.
        calibration: texts that share the windows: "self" (the model writes its own), paths of UTF-8 files.
        windows: calibration windows. ``window``: tokens per window. ``seed``: of text and training order.
        heal: minutes of training after the conversion; 0 for none.
        split_query: see :func:`mla.convert.convert`.
        dtype: of the written weights, "float32" or "bfloat16".
    """

    cache: float | None = None
    rank: int | None = None
    rope: int | None = None
    calibration: tuple[str, ...] = ("self",)
    windows: int = 12
    window: int = 1024
    seed: int = 0
    heal: float = 0.0
    split_query: bool = False
    dtype: str = "float32"


def run(
    source: str,
    teacher: PreTrainedModel,
    tokenizer: Any,
    out: Path,
    request: Request,
    *,
    overwrite: bool = False,
    on_progress: Progress | None = None,
) -> dict[str, Any]:
    """Convert ``teacher``, heal it where asked for, measure the result, write it to ``out``.

    Args:
        source: name of the teacher for the report.
        teacher: fp32 model that :func:`check_convertible` accepts.
        tokenizer: its tokenizer.
        out: folder to create.
        request: see :class:`Request`.
        overwrite: replace ``out`` if it exists.
        on_progress: called as (stage, done, total).

    Returns:
        The facts that report.json holds.

    Raises:
        MLAError: the model, the request or the folder cannot be used.
    """
    check_output(out, dtype=getattr(torch, request.dtype), overwrite=overwrite)
    check_convertible(teacher.config)
    check_split_query(teacher, request.split_query)
    if request.heal < 0:
        raise MLAError(f"heal takes minutes, 0 or more, got {request.heal}")
    budget_for(teacher.config, cache=request.cache, rank=request.rank, rope=request.rope)
    with workspace(teacher, tokenizer, out, request, "converting", on_progress) as work:
        return _finish(source, teacher, tokenizer, out, work, request, overwrite, on_progress)


@dataclass(frozen=True)
class Workspace:
    """A folder for finished parts, and token ids [w, t] to calibrate on, to heal on and to measure on."""

    place: Path
    calibration: Tensor
    training: Tensor
    held_out: Tensor


@contextlib.contextmanager
def workspace(
    teacher: PreTrainedModel,
    tokenizer: Any,
    out: Path,
    request: Request,
    purpose: str,
    on_progress: Progress | None = None,
) -> Iterator[Workspace]:
    """The folder ``.OUT.PURPOSE`` beside ``out`` while inside: found again after a kill, gone after success.

    Raises:
        MLAError: the text or the windows cannot be used. Raised inside it is a mistake in the request, of
            which nothing is worth keeping: the folder goes as well.
    """
    check_windows(request.windows, request.window)
    if not 1 <= len(request.calibration) <= request.windows:
        raise MLAError(
            f"{request.windows} windows cannot be shared by {len(request.calibration)} texts: ask for as "
            "many windows as texts, or more"
        )
    texts = [_read(name) for name in request.calibration]
    place = _place(out, purpose, _identity(teacher, request, texts))
    try:
        yield Workspace(place, *_windows(place, teacher, tokenizer, request, texts, on_progress))
    except MLAError:
        shutil.rmtree(place, ignore_errors=True)
        raise
    shutil.rmtree(place, ignore_errors=True)


def _finish(
    source: str,
    teacher: PreTrainedModel,
    tokenizer: Any,
    out: Path,
    work: Workspace,
    request: Request,
    overwrite: bool,
    on_progress: Progress | None,
) -> dict[str, Any]:
    started = time.monotonic()
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
    facts = _facts(source, teacher, student, request)
    facts["heal"] = None if healing is None else {"minutes": request.heal} | asdict(healing)
    facts["quality"] = _quality(teacher, student, work.held_out, request, on_progress)
    facts["layer_errors"] = layer_errors(student, teacher, work.held_out)
    facts["seconds"] = round(time.monotonic() - started, 1)
    save(student, tokenizer, out, report=facts, dtype=getattr(torch, request.dtype), overwrite=overwrite)
    told: dict[str, Any] = json.loads((out / "report.json").read_text(encoding="utf-8"))
    return told


def _read(calibration: str) -> str | None:
    """The calibration text; None where the model writes it."""
    if calibration == "self":
        return None
    path = Path(calibration).expanduser()
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise MLAError(f"{calibration}: no such text file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise MLAError(f"{calibration} is not readable as UTF-8 text: {error}") from error


def _windows(
    place: Path,
    teacher: PreTrainedModel,
    tokenizer: Any,
    request: Request,
    texts: list[str | None],
    on_progress: Progress | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids [w, t] to calibrate on, to heal on and to measure on; the last are in neither of the two."""
    path = place / "windows.safetensors"
    if not path.exists():
        measuring = max(4, len(texts), request.windows // _CALIBRATING_PER_MEASURING)
        more = int(request.heal * _TOKENS_PER_MINUTE) // request.window
        found = []
        for index, text in enumerate(texts):
            calibrating, held, extra = (
                (count + index) // len(texts) for count in (request.windows, measuring, more)
            )
            if text is None:
                ids = write_windows(
                    teacher,
                    tokenizer,
                    calibrating + held + extra,
                    request.window,
                    seed=request.seed,
                    on_progress=on_progress,
                )
                rest = ids[held:]
                found.append({"calibration": rest[:calibrating], "training": rest, "held_out": ids[:held]})
            else:
                found.append(_cut(text, tokenizer, request, calibrating, held))
        parts = {
            name: _mixed([windows[name] for windows in found], seed=request.seed, evenly=name == "training")
            for name in ("calibration", "training", "held_out")
        }
        save_file(parts, path.with_suffix(".partial"))
        path.with_suffix(".partial").replace(path)
    stored = load_file(path)
    return stored["calibration"], stored["training"], stored["held_out"]


def _mixed(texts: list[Tensor], *, seed: int, evenly: bool) -> Tensor:
    """The windows of all texts in an order that ``seed`` fixes; ``evenly``, shorter texts are repeated."""
    if evenly:
        most = max(len(ids) for ids in texts)
        texts = [ids[torch.arange(most) % len(ids)] for ids in texts]
    windows = torch.cat(texts)
    return windows[torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))]


def _cut(text: str, tokenizer: Any, request: Request, calibrating: int, measuring: int) -> dict[str, Tensor]:
    """Windows of a file to calibrate on, to heal on and to measure on: the last part of it only measures."""
    border = int(len(text) * calibrating / (calibrating + measuring))
    size, seed = request.window, request.seed
    calibration = tokenize_windows(text[:border], tokenizer, calibrating, size, seed=seed)
    held_out = tokenize_windows(text[border:], tokenizer, measuring, size, seed=seed)
    training = calibration
    if request.heal:
        ids = tokenizer(text[:border], add_special_tokens=False, verbose=False)["input_ids"]
        count = len(ids) // size
        if count > calibrating:
            training = torch.tensor(ids[: count * size]).view(count, size)
    return {"calibration": calibration, "training": training, "held_out": held_out}


def _identity(teacher: PreTrainedModel, request: Request, texts: list[str | None]) -> dict[str, Any]:
    """Everything that the finished parts depend on."""
    return {
        "version": __version__,
        "config": digest(canonical(teacher.config.to_dict())),
        "weights": digest_of_weights(teacher),
        "texts": [None if text is None else digest(text.encode()) for text in texts],
        "request": asdict(request),
        "torch": torch.__version__,
    }


def _place(out: Path, purpose: str, identity: dict[str, Any]) -> Path:
    """The folder for finished parts of this very request: found again, or new and empty."""
    place = out.absolute().parent / f".{out.name}.{purpose}"
    described = place / "request.json"
    content = json.dumps(identity, sort_keys=True)
    if place.is_dir() and described.exists() and described.read_text(encoding="utf-8") == content:
        return place
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    described.write_text(content, encoding="utf-8")
    return place


def _facts(
    source: str, teacher: PreTrainedModel, student: DeepseekV3ForCausalLM, request: Request
) -> dict[str, Any]:
    """What only this run knows; :func:`save` adds dims, dtype and versions."""
    config, old = student.config, teacher.config
    original = cached_numbers(old)
    cached = config.kv_lora_rank + config.qk_rope_head_dim
    size = 4 if request.dtype == "float32" else 2
    return {
        "source": source,
        "dims": {"original_numbers_per_token_and_layer": original},
        "calibration": {
            "texts": list(request.calibration),
            "windows": request.windows,
            "window": request.window,
            "seed": request.seed,
        },
        "cache_bytes_per_token": {
            "original": original * size * config.num_hidden_layers,
            "converted": cached * size * config.num_hidden_layers,
        },
    }


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
