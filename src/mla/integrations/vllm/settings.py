"""How vLLM's cache is stored: as ``MLA_CACHE_FORMAT`` says, else ``--kv-cache-dtype``, else as the model."""

import os

import torch

from mla.errors import MLAError

#: Values of ``--kv-cache-dtype`` and our format for each; "auto" follows the model.
KV_CACHE_DTYPES = {"auto": None, "bfloat16": "bf16", "int8_per_token_head": "int8"}

# fp16 has no kernel, and bf16 would round it: such a model is computed and cached in fp32.
_MODEL_FORMATS = {torch.bfloat16: "bf16", torch.float16: "fp32", torch.float32: "fp32"}

_CHOICES = ("bf16", "int8", "fp32")


def _read() -> str | None:
    wanted = os.environ.get("MLA_CACHE_FORMAT")
    if wanted and wanted not in _CHOICES:
        raise MLAError(f"MLA_CACHE_FORMAT: expected one of {', '.join(_CHOICES)}, got {wanted!r}")
    return wanted or None


#: ``MLA_CACHE_FORMAT``, read once.
WANTED = _read()


def format_name(kv_cache_dtype: str, model_dtype: torch.dtype, wanted: str | None = WANTED) -> str:
    """Our format for vLLM's settings.

    Raises:
        MLAError: a setting that we have no format for, or two settings that contradict one another.
    """
    if kv_cache_dtype not in KV_CACHE_DTYPES:
        known = ", ".join(KV_CACHE_DTYPES)
        raise MLAError(f"--kv-cache-dtype: expected one of {known} for MLA on CPUs, got {kv_cache_dtype!r}")
    told = KV_CACHE_DTYPES[kv_cache_dtype]
    if told and wanted and told != wanted:
        raise MLAError(
            f"--kv-cache-dtype {kv_cache_dtype} means {told}, but MLA_CACHE_FORMAT is {wanted}: unset one"
        )
    return wanted or told or _MODEL_FORMATS[model_dtype]
