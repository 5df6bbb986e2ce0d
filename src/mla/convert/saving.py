"""Writing a converted model so that a folder is either whole or not there."""

from __future__ import annotations

import contextlib
import errno
import getpass
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from filelock import FileLock, Timeout
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError
from transformers import DeepseekV3ForCausalLM, PreTrainedTokenizerBase

from mla import __version__
from mla.convert.report import card, page
from mla.digest import digest
from mla.errors import MLAError
from mla.reading import local_path
from mla.whole import UnwrittenError, flush

FORMAT = 2  # of report.json
_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


def save(
    student: DeepseekV3ForCausalLM,
    tokenizer: PreTrainedTokenizerBase | None,
    out_dir: str | os.PathLike[str],
    *,
    report: Mapping[str, Any],
    dtype: torch.dtype = torch.float32,
    overwrite: bool = False,
) -> Path:
    """Write the checkpoint, tokenizer, chat template, generation config, model card, ``report.json`` and
    ``report.html``.

    Everything goes into a hidden sibling folder first, ``config.json`` last, is flushed to the disk and then
    renamed: a process killed at any moment leaves no folder that looks whole, and an exception (an interrupt
    included) removes the sibling. What a killed one has left is undone at the start.

    Args:
        student: from :func:`convert`; not changed.
        tokenizer: the teacher's, or None for a model without one.
        out_dir: folder to create; its parent is created where missing.
        report: JSON values for report.json, the page and the card (see report.py): "source", and what was
            measured. Dimensions (but "original_numbers_per_token_and_layer" in "dims"), dtype and versions
            are read off the model here.
        dtype: torch.float32 or torch.bfloat16.
        overwrite: replace a folder that is already there.

    Returns:
        The folder.

    Raises:
        MLAError: the dtype cannot hold the model, or the folder is in use or cannot be written.
    """
    out = Path(out_dir).absolute()
    check_output(out, dtype=dtype, overwrite=overwrite)
    facts = _facts(student, report, dtype)
    # Facts that are no JSON, or not the page's, fail here, before any work.
    told = {
        "README.md": card(out.name, facts),
        "report.html": page(facts),
        "report.json": json.dumps(facts, indent=2) + "\n",
    }
    partial = _partial(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
        weights = {
            name: value.detach().to("cpu", dtype).contiguous() for name, value in student.state_dict().items()
        }
        save_torch_state_dict(weights, partial, metadata={"format": "pt"})
        if student.generation_config is not None:
            # Not by its save_pretrained, which refuses what some published models have.
            student.generation_config.to_json_file(partial / "generation_config.json", use_diff=True)
        if tokenizer is not None:
            _save_tokenizer(tokenizer, partial)
        for name, text in told.items():
            (partial / name).write_text(text, encoding="utf-8")
        for path in partial.rglob("*"):
            if path.is_file():
                path.chmod(0o666 & ~_umask())  # safetensors writes files that only their owner can read
            flush(path)
        config = student.config.to_dict()
        config |= {"dtype": _DTYPES[dtype], "architectures": ["DeepseekV3ForCausalLM"]}
        (partial / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")
        flush(partial / "config.json")
        flush(partial)
        _put_in_place(partial, out)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError | SafetensorError):
            raise UnwrittenError(out, error) from error
        raise
    return out


def _save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:
        if type(error) is Exception:  # all that tokenizers says of a full disk
            raise OSError(str(error)) from error
        raise


@contextlib.contextmanager
def exclusive(out: Path) -> Iterator[None]:
    """No other conversion by this user on this machine goes to ``out`` while inside, if it asks for it, too.

    Two conversions to one place would take each other's finished parts for their own.

    Raises:
        MLAError: one does, or there is nowhere to say so.
    """
    # Not beside it: that would leave a file, or folders that nobody asked for, where a request is refused.
    user = os.getuid() if hasattr(os, "getuid") else getpass.getuser()
    # A home may be shared by machines, whose /tmp/out are not the same.
    place = digest(platform.node().encode(), os.fsencode(os.path.realpath(out)))
    file = _locks() / f"mla-{user}-{place}.lock"
    lock = FileLock(file, timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise MLAError(f"another conversion to {out} is running: wait for it, or end it first") from error
    except OSError as error:
        raise MLAError(f"{file} cannot be locked for this conversion: {error}") from error
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # Windows keeps a file that is open
            file.unlink()
        lock.release()


def _locks() -> Path:
    """A folder that is the same for all of a user's sessions, which may each have a temporary folder."""
    with contextlib.suppress(OSError, RuntimeError):  # a home that cannot be written, or none
        folder = Path.home() / ".cache" / "mla" / "locks"
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK | os.X_OK):
            return folder
    return Path(tempfile.gettempdir())


def check_output(
    out_dir: str | os.PathLike[str], *, dtype: torch.dtype, overwrite: bool, source: str | None = None
) -> None:
    """Refuse, before any work, a folder that :func:`save` would refuse, or that is the original's.

    An earlier call of :func:`save` that was killed is undone first: it may have left no folder at all where
    one was to be replaced.

    Args:
        source: name of the original, where it is known. Others: as for :func:`save`.

    Raises:
        MLAError: see :func:`save` and :func:`check_place`.
    """
    if dtype == torch.float16:
        raise MLAError(
            "float16 cannot hold a converted model: the latent norm is folded out with a factor of 2^-30, "
            "far below the smallest float16 number; save bfloat16 or float32"
        )
    if dtype not in _DTYPES:
        raise MLAError(f"dtype must be float32 or bfloat16, got {str(dtype).removeprefix('torch.')}")
    out = Path(out_dir).absolute()
    check_place(out, source)
    here, target = Path.cwd(), Path(os.path.realpath(out))
    if target == here or target in here.parents:
        raise MLAError(
            f"{out} is the current folder, or holds it, and another one would take its place: choose another "
            "folder, or give the command outside of it"
        )
    _undo_killed(out)
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise MLAError(f"{out} exists and is not a folder")
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise MLAError(f"{out} is not empty: choose another folder or ask to overwrite it")
    if out.is_dir():
        _check_replaceable(out)


def check_place(out: Path, source: str | None) -> None:
    """Refuse, before any work, a path that cannot be written, or where it would harm the original.

    Args:
        out: file or folder; folders on the way to it need not exist.
        source: name of the original: a folder, a file or anything else.

    Raises:
        MLAError: names what stands in the way.
    """
    folder = out.absolute().parent
    while not os.path.lexists(folder) and folder != folder.parent:  # a drive may not be there
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise MLAError(f"{out} cannot be written: {folder} is no folder that you may write to")
    original, target = None if source is None else local_path(source), Path(os.path.realpath(out))
    if original is not None:
        original = Path(os.path.realpath(original))
        if target == original or target in original.parents or original in target.parents:
            raise MLAError(
                f"{out} and the original {source} lie one in the other: choose another place for OUT"
            )


def _check_replaceable(out: Path) -> None:
    """Refuse a folder whose place :func:`_put_in_place` could not give to another: it is tried."""
    aside = _replaced(out)  # killed in between: the next call brings it back
    try:
        os.rename(out, aside)
        os.rename(aside, out)
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise MLAError(
                f"{out} is a mount point, and no other folder can take its place: name a folder inside it"
            ) from error
        if any(out.iterdir()):  # an empty one is removed, which may be allowed where this is not
            raise UnwrittenError(out, error) from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _put_in_place(partial: Path, out: Path) -> None:
    """Rename; an old folder steps aside first and comes back if the rename fails."""
    replaced = _replaced(out)
    if out.is_dir():
        if any(out.iterdir()):
            os.rename(out, replaced)
        else:
            out.rmdir()
    try:
        os.rename(partial, out)
    except BaseException:
        if replaced.is_dir():
            os.rename(replaced, out)
        raise
    flush(out.parent)
    shutil.rmtree(replaced, ignore_errors=True)  # the new folder is whole: a leftover is untidy, not wrong


def _undo_killed(out: Path) -> None:
    """A folder being written goes; one that stepped aside comes back unless another is in its place."""
    partial, replaced = _partial(out), _replaced(out)
    if partial.is_dir():
        shutil.rmtree(partial)
    else:
        partial.unlink(missing_ok=True)
    if replaced.is_dir():
        if out.is_dir() and any(out.iterdir()):
            shutil.rmtree(replaced)
        else:
            if out.is_dir():
                out.rmdir()
            os.rename(replaced, out)


def _partial(out: Path) -> Path:
    return out.parent / f".{out.name}.partial"


def _replaced(out: Path) -> Path:
    return out.parent / f".{out.name}.replaced"


def _facts(student: DeepseekV3ForCausalLM, report: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    config = student.config
    cached = config.kv_lora_rank + config.qk_rope_head_dim
    return {
        **report,
        "format": FORMAT,
        "dims": {
            **report.get("dims", {}),
            "layers": config.num_hidden_layers,
            "hidden": config.hidden_size,
            "heads": config.num_attention_heads,
            "rank": config.kv_lora_rank,
            "rope": config.qk_rope_head_dim,
            "nope": config.qk_nope_head_dim,
            "value": config.v_head_dim,
            "rope_theta": config.rope_parameters["rope_theta"],
            "biases": config.attention_bias,
            "cached_numbers_per_token_and_layer": cached,
        },
        "dtype": _DTYPES[dtype],
        "versions": {
            "mla": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
