"""Known models and hardware: JSON that ships with the package, found by a forgiving name."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

from mla.errors import MLAError
from mla.plan.shape import Shape, read_shape
from mla.reading import config_file, is_hub_id, local_config, read_config

_HERE = Path(__file__).parent


@cache
def known_models() -> dict[str, dict[str, Any]]:
    """Name -> title, aliases, published parameter counts, source and config of every known model."""
    return _table("models.json")


@cache
def known_hardware() -> dict[str, dict[str, Any]]:
    """Name -> title, memory (bytes), bandwidth (B/s), FLOP/s by format, and source of every known machine."""
    return _table("hardware.json")


def _table(file: str) -> dict[str, dict[str, Any]]:
    table: dict[str, dict[str, Any]] = json.loads((_HERE / file).read_text(encoding="utf-8"))
    return table


def plain(name: str) -> str:
    """A name without case, punctuation and a Hub namespace: "deepseek-ai/DeepSeek_V3" is "deepseekv3"."""
    return re.sub(r"[^a-z0-9]", "", name.rsplit("/", 1)[-1].lower())


def find(name: str, table: Mapping[str, Mapping[str, Any]]) -> str | None:
    """The key of ``table`` that ``name`` means, by key, title or alias."""
    names = {plain(word): key for key, row in table.items() for word in (*row["aliases"], row["title"], key)}
    return names.get(plain(name))


def nearest(name: str, table: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Up to three names of ``table`` that look like ``name``; the nearest first."""
    words = {plain(word): key for key, row in table.items() for word in (*row["aliases"], row["title"], key)}
    close = get_close_matches(plain(name), words, n=8, cutoff=0.5)
    return list(dict.fromkeys(words[word] for word in close))[:3]


def load_shape(model: str, *, rank: int | None = None) -> Shape:
    """The shape of a folder, a config.json, a known name or a Hub id, tried in this order.

    Raises:
        MLAError: none of them, with the nearest known names; or a model that cannot be counted.
    """
    file = local_config(model)
    if file is None:
        key = find(model, known_models())
        if key is not None:
            return known_shape(key, rank=rank)
        if not is_hub_id(model):
            raise _unknown(
                "model", model, known_models(), "a folder, a config.json, a Hub id (namespace/name)"
            )
        file, name = config_file(model), model
    else:
        # "config" names no model; in the root folder there is no other name.
        folder = file.parent.resolve().name if file.stem == "config" else ""
        name = folder or file.stem
    return read_shape(read_config(file), name=name, source=f"config.json of {name}", rank=rank)


@cache
def known_shape(key: str, rank: int | None = None) -> Shape:
    """The shape of a known model, with its published parameter count where there is one."""
    from dataclasses import replace

    row = known_models()[key]
    shape = read_shape(row["config"], name=row["title"], source=row["source"], rank=rank)
    inputs = {**shape.inputs, "published": row["total_parameters"] or 0}
    return replace(shape, inputs=inputs)


def find_hardware(name: str) -> str:
    """The key of a known machine; MLAError with the nearest names for an unknown one."""
    key = find(name, known_hardware())
    if key is None:
        raise _unknown("hardware", name, known_hardware(), "'this machine'")
    return key


def _unknown(what: str, name: str, table: Mapping[str, Mapping[str, Any]], also: str) -> MLAError:
    close = nearest(name, table)
    hint = f"nearest: {', '.join(close)}" if close else f"known: {', '.join(table)}"
    return MLAError(f"unknown {what} {name!r}; {hint}; or give {also}")
