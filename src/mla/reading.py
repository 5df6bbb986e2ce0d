"""A config.json: where it lies, and its values read with a clear refusal of what they cannot be. Level 0."""

from __future__ import annotations

import json
import re
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


def is_hub_id(name: str) -> bool:
    """Whether a name may be a model's on the Hub: namespace/name.

    A name alone is none: it is a mistyped folder or known model far more often than one of the few that the
    Hub still finds without a namespace (gpt2 is openai-community/gpt2). Nor is what ends like a file.
    """
    return bool(_HUB_ID.fullmatch(name)) and not name.lower().endswith((".json", ".gguf"))


_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)


def config_file(name: str) -> Path:
    """The config.json of a folder, the file itself, or a Hub id's, downloaded."""
    if (file := local_config(name)) is not None:
        return file
    if not is_hub_id(name):
        raise MLAError(
            f"{name} does not exist: expected a folder, a config.json or a Hub id (namespace/name)"
        )
    return _download(name)


def _download(repo: str) -> Path:
    from huggingface_hub import hf_hub_download

    # The base of what connections raise, from whichever library this version of the Hub's client uses.
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

    try:
        return Path(hf_hub_download(repo, "config.json"))
    except (HTTPError, OSError, ValueError, ImportError) as error:  # the last two of a proxy's address, too
        reason = (str(error).strip().splitlines() or [""])[0]
        if not reason or not isinstance(error, OSError):  # a proxy's "403 Forbidden" is not the Hub's
            reason = f"{type(error).__name__} {reason}".strip()
        raise MLAError(
            f"{repo} is neither a local folder nor a model the Hub gave us (gated ones need HF_TOKEN): "
            f"{reason}"
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


def expect_bytes(name: str, text: str) -> int:
    """Bytes of "80GB", "24 GiB", "512M" or a plain number of gigabytes.

    Args:
        name: the option, as it stands in the message. ``text``: what it was given.

    Raises:
        MLAError: anything else, or less than one byte.
    """
    units = {"": 1e9, "b": 1, "kb": 1e3, "k": 1e3, "mb": 1e6, "m": 1e6, "gb": 1e9, "g": 1e9, "tb": 1e12}
    units |= {"t": 1e12, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
    digits = text.strip().lower().replace(" ", "").replace("_", "")
    number = digits.rstrip("abcdefghijklmnopqrstuvwxyz")
    try:
        value = float(number) * units[digits[len(number) :]]
    except (ValueError, KeyError) as error:
        raise MLAError(f"{name}: expected something like 80GB or 24GiB, got {text!r}") from error
    if not 1 <= value < float("inf"):
        raise MLAError(f"{name}: expected at least one byte, got {text!r}")
    return int(value)


def expect_list(name: str, value: Any, *, least: int = 0) -> list[Any]:
    """A list with at least ``least`` entries; MLAError for anything else."""
    if not isinstance(value, list | tuple) or len(value) < least:
        few = f" of at least {least}" if least else ""
        raise MLAError(f"{name}: expected a list{few}, got {str(value)[:60]!r}")
    return list(value)


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


#: Names of GPT-2, Falcon and ChatGLM for what others call otherwise; they count where that is missing.
_USUAL_NAMES = {
    "n_head": "num_attention_heads",
    "n_head_kv": "num_kv_heads",
    "n_layer": "num_hidden_layers",
    "num_layers": "num_hidden_layers",
    "n_embd": "hidden_size",
    "kv_channels": "head_dim",
    "n_positions": "max_position_embeddings",
    "seq_length": "max_position_embeddings",
    "padded_vocab_size": "vocab_size",
}
#: Families with one key-value head for all queries unless told otherwise.
_MULTI_QUERY = {"falcon", "gpt_bigcode"}
#: Keys that speak of key-value heads: without a rule that reads them a model is not taken for MHA.
_GROUP_KEY = re.compile(r"kv_(n_)?heads|(kv|query|attention)_groups?(_|$)")


def usual_names(text: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json without latents in the names that most have; no ``num_key_value_heads`` is None.

    Raises:
        MLAError: key-value heads that are told in a way no rule reads.
    """
    full = dict(text)
    for name, usual in _USUAL_NAMES.items():
        if full.get(usual) is None and name in text:
            full[usual] = text[name]
    if full.get("num_key_value_heads") is None:
        full["num_key_value_heads"] = _key_value_heads(full)
    hidden = full.get("hidden_size")
    if isinstance(hidden, int) and ("n_embd" in text or full.get("model_type") == "falcon"):
        widths = (full.get(name) for name in ("intermediate_size", "ffn_hidden_size", "n_inner"))
        full["intermediate_size"] = next(filter(None, widths), 4 * hidden)
    return full


def _key_value_heads(full: Mapping[str, Any]) -> Any:
    """Key-value heads where there is no ``num_key_value_heads``: one for each head if nothing tells."""
    # ChatGLM has a number of groups even where this says that it is not used.
    grouped = full.get("multi_query_attention")
    if grouped is not None:
        return full.get("multi_query_group_num" if grouped else "num_attention_heads")
    one = full.get("multi_query", str(full.get("model_type")) in _MULTI_QUERY)
    groups = 1 if one and not full.get("new_decoder_architecture") else full.get("num_kv_heads")
    if groups is not None:
        return groups
    strange = [key for key, value in full.items() if value is not None and _GROUP_KEY.search(key)]
    if strange:
        raise MLAError(
            f"{strange[0]}: config.json has no num_key_value_heads, and how model_type "
            f"{full.get('model_type')!r} means this key is not known; add num_key_value_heads to a copy"
        )
    return full.get("num_attention_heads")
