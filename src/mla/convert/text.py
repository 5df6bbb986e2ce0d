"""Calibration text that needs no download, and its cutting into windows of token ids."""

from __future__ import annotations

import ast
import random
import sysconfig
from pathlib import Path
from typing import Any

import torch

from mla.errors import MLAError

# Short docstrings are mostly signatures and stock phrases; the long ones are prose.
_MIN_CHARACTERS = 160
_ENOUGH_CHARACTERS = 420_000


def calibration_text() -> str:
    """English prose that every Python installation holds: docstrings of the standard library.

    The sources of the top-level modules are parsed, not imported, in alphabetical order, so the text is the
    same in every run of one Python release. ``pydoc_data`` is left out on purpose: evaluations use it.

    Returns:
        More than 400,000 characters, docstrings separated by blank lines.

    Raises:
        MLAError: the installation has no standard library sources (a frozen interpreter).
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    paragraphs: list[str] = []
    length = 0
    for path in sorted(root.glob("*.py")) + sorted(root.glob("[a-z]*/*.py")):
        if path.parent.name in {"test", "tests", "idlelib", "lib2to3", "pydoc_data", "site-packages"}:
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError, OSError):
            continue  # some releases ship deliberately broken or non-UTF-8 sources; they are no text for us
        for docstring in _docstrings(tree):
            paragraphs.append(docstring)
            length += len(docstring) + 2
        if length >= _ENOUGH_CHARACTERS:
            break
    if not paragraphs:
        raise MLAError(f"no standard library sources under {root}: give a calibration text of your own")
    return "\n\n".join(paragraphs)


def _docstrings(tree: ast.Module) -> list[str]:
    found = []
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            docstring = ast.get_docstring(node)
            if docstring is not None and len(docstring) >= _MIN_CHARACTERS:
                found.append(docstring)
    return found


def tokenize_windows(text: str, tokenizer: Any, windows: int, length: int, *, seed: int = 0) -> torch.Tensor:
    """Cut ``windows`` windows of ``length`` tokens out of ``text``, spread over all of it.

    Args:
        text: any text; it is split into ``windows`` equal parts and one window is read from each, at a place
            that depends on ``seed`` and on nothing else, so a small calibration still sees every topic.
        tokenizer: a Transformers tokenizer. Its beginning-of-sequence token, where it adds one by itself,
            starts every window, as it does in use.
        windows: number of windows.
        length: tokens per window.
        seed: place of the window inside its part.

    Returns:
        int64 token ids [windows, length].

    Raises:
        MLAError: the text is too short.
    """
    if windows < 1 or length < 2:
        raise MLAError(f"need at least 1 window of 2 tokens, got {windows} of {length}")
    chance = random.Random(seed)
    part = len(text) // windows
    if part < length:  # not even one character per token
        raise MLAError(
            f"the calibration text is too short: {len(text)} characters for {windows} windows of {length} "
            "tokens; give a longer text, fewer windows or shorter ones"
        )
    rows = []
    for index in range(windows):
        # 8 characters per token is more than any tokenizer of a European language needs.
        room = max(part - 8 * length, 0)
        start = index * part + chance.randint(0, room)
        ids = tokenizer(text[start : start + max(part, 8 * length)])["input_ids"]
        if len(ids) < length:
            raise MLAError(
                f"the calibration text is too short: a part of {part} characters gives {len(ids)} tokens, "
                f"{length} are needed; give a longer text, fewer windows or shorter ones"
            )
        rows.append(torch.tensor(ids[:length], dtype=torch.int64))
    return torch.stack(rows)
