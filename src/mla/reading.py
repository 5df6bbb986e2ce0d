"""A config.json: where it lies, and its values read with a clear refusal of what they cannot be. Level 0."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mla.errors import MLAError

#: More than this is no number of anything in a model or a question.
LARGEST = 10**12


def read_config(file: Path) -> dict[str, Any]:
    """The contents of a config.json; weights are refused by their name or size before they are read."""
    weights = {".gguf", ".safetensors", ".bin", ".pt", ".pth", ".onnx"}
    if file.suffix.lower() in weights or file.stat().st_size > 16 << 20:
        raise MLAError(f"{file} is no config.json: give the folder or Hub id of the model it comes from")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise MLAError(f"{file} is not readable JSON: {error}") from error
    if not isinstance(config, dict):
        raise MLAError(f"{file}: expected a JSON object, got {type(config).__name__}")
    return config


def local_path(name: str) -> Path | None:
    """The folder or file of this name, None where there is none."""
    try:
        path = Path(name).expanduser()
        return path if path.exists() else None
    except (RuntimeError, OSError) as error:  # ~nobody, a name too long, a folder that may not be looked into
        raise MLAError(f"{name[:80]!r}: {error.args[-1]}; expected a folder, a file or a Hub id") from error


def local_config(name: str) -> Path | None:
    """The config.json of a folder, or the file itself; None where nothing has this name."""
    path = local_path(name)
    if path is None:
        return None
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise MLAError(f"{path} has no config.json: expected the folder of a saved model")
    return file


def config_file(name: str) -> Path:
    """The config.json of a folder, the file itself, or a Hub id's, downloaded."""
    if (file := local_config(name)) is not None:
        return file
    if name.startswith((".", "~", "/")) or name.count("/") > 1 or name.endswith(".json"):
        raise MLAError(f"{name} does not exist: expected a folder, a config.json or a Hub id")
    return _download(name)


def _download(repo: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    try:
        return Path(hf_hub_download(repo, "config.json"))
    except (HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, OSError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise MLAError(
            f"{repo} is neither a local folder nor a model the Hub gave us (gated ones need HF_TOKEN): "
            f"{reason[0]}"
        ) from error


def expect_int(name: str, value: Any, *, least: int) -> int:
    """An integer from ``least`` to :data:`LARGEST`; MLAError for anything else."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise MLAError(f"{name}: expected an integer of at least {least}, got {value!r}")
    if value > LARGEST:
        raise MLAError(f"{name}: expected an integer up to {LARGEST:,}, got one of {len(str(value))} digits")
    return int(value)


def expect_number(name: str, value: Any, *, above: float = -1e300) -> float:
    """A number as a float; MLAError for anything else, or one that is not larger than ``above``."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not above < value < 1e300:
        raise MLAError(
            f"{name}: expected a number{f' above {above}' if above > -1e300 else ''}, got {value!r}"
        )
    return float(value)


def integer(raw: Mapping[str, Any], *names: str, least: int = 0, default: int | None = None) -> int:
    """The first of several keys that a config.json gives a value; ``default`` if it gives none.

    Raises:
        MLAError: a value that is no integer of at least ``least``; no value where there is no default.
    """
    name = next((name for name in names if raw.get(name) is not None), names[0])
    value = raw.get(name)
    if value is None and default is not None:
        return default
    return expect_int(name, value, least=least)


def section(raw: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """An object inside a config.json, empty where it has none; MLAError for anything else."""
    inner = raw.get(key) or {}
    if not isinstance(inner, Mapping):
        raise MLAError(f"{key}: expected an object, got {inner!r}")
    return inner
