"""``mla serve`` on vLLM: whether it can serve a model, and what its own server is started with."""

import importlib.metadata
import importlib.util
import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mla.cli import console
from mla.errors import MLAError
from mla.machine import allowed_cores, free_memory, is_local, usable_cores
from mla.reading import local_path

#: Cores of which one is a large part.
_FEW_CORES = 4
_FORMATS = ("auto", "fp32", "bf16", "int8")
_MIDDLEWARE = "mla.integrations.vllm.middleware.Gate"
_CACHE_DTYPE = ("--kv-cache-dtype",)
_REPLICAS = ("--data-parallel-size", "-dp")
_PARTS = (("--tensor-parallel-size", "-tp"), ("--pipeline-parallel-size", "-pp"))


def config_if_it_serves(
    engine: str,
    model: str,
    max_model_len: int | None,
    cache_format: str,
    further: list[str] | None,
) -> Any | None:
    """The model's configuration if vLLM serves; what vLLM cannot do is refused, or left to Transformers."""
    has_vllm = importlib.util.find_spec("vllm") is not None
    if engine == "vllm" and not has_vllm:
        raise MLAError("--engine vllm: vLLM is not installed here; see docs/vllm.md")
    if engine == "transformers" or not has_vllm:
        if further:
            raise MLAError(f"{' '.join(further)}: options after -- are vLLM's; take --engine vllm")
        return None
    from mla.integrations.loading import load_mla_config
    from mla.integrations.vllm.unfit import why_unfit

    config, dimensions = load_mla_config(model, max_model_len=max_model_len)
    text = config.get_text_config(decoder=True)
    if cache_format not in _FORMATS:
        reason = f"--cache-format: vLLM takes {', '.join(_FORMATS)}, got {cache_format}"
    elif _is_for_cpus() and getattr(text, "index_topk", None) is not None:
        reason = f"{model} has sparse attention (index_topk), which vLLM does not have on CPUs"
    elif (unfit := why_unfit(config, max_model_len or dimensions.max_position_embeddings)) is not None:
        reason = f"{model} {unfit}"
    else:
        return config
    if engine == "vllm" or further:
        raise MLAError(f"{reason}; take --engine transformers")
    console.say(f"{reason}; Transformers serves")
    return None


def become(
    model: str,
    config: Any,
    options: list[str],
    further: list[str],
    *,
    cache_format: str,
    budget: int | None,
    api_key: str | None,
    dtype: str,
    cache_dir: Path | None,
    folder_size: int,
) -> None:
    """Replace this process by vLLM's server, which finds our plugin by itself.

    ``budget`` is of all ranks together, None half of what the weights leave; ``further`` are options for
    vLLM, as they are.

    Raises:
        MLAError: the weights do not fit into memory; prefixes cannot be kept in ``cache_dir``; the cache's
            format is named twice; ``further`` has a key or a file of options.
    """
    from mla.integrations.loading import require_memory, settle_auto, weight_bytes

    _check_further(further)
    environment = dict(os.environ)
    on_cpu = _is_for_cpus()
    replicas = _number(further, *_REPLICAS)
    ranks = math.prod(_number(further, *names) for names in _PARTS) * replicas
    own_format = _value(further, *_CACHE_DTYPE)
    if cache_format != "auto" and own_format is not None:
        both = f"--cache-format {cache_format} and --kv-cache-dtype {own_format}"
        raise MLAError(f"{both}: expected one of them")
    settled = console.check_dtype(dtype)
    if settled == "auto" and on_cpu:
        settled, usual_format = settle_auto(model, config)
        if usual_format != "auto" and own_format is None:
            environment.setdefault("MLA_CACHE_FORMAT", usual_format)
    options = [*_guards(api_key, [*options, *further]), *options, "--dtype", settled]
    if cache_format != "auto":
        environment["MLA_CACHE_FORMAT"] = cache_format
    if cache_dir is not None:
        if not on_cpu:
            raise MLAError("--cache-dir: expected a vLLM for CPUs, got one for GPUs; leave the option out")
        folder = local_path(model)
        if folder is not None and not any(folder.glob("*.safetensors")):
            raise MLAError(f"--cache-dir: expected safetensors in {model}, by which latents know their model")
        options += ["--kv-transfer-config", keep_prefixes(cache_dir, folder_size)]
        # vLLM keeps two cores per rank free beside a connector, of which ours needs none.
        environment.setdefault("VLLM_CPU_NUM_OF_RESERVED_CPU", str(ranks))
    if budget is not None or (on_cpu and "VLLM_CPU_KVCACHE_SPACE" not in environment):
        # vLLM by itself asks for nine tenths of the machine, and ends where others use more than the rest, or
        # where the weights leave less than what it was told. The variable would win over the option.
        environment.pop("VLLM_CPU_KVCACHE_SPACE", None)
        if budget is None:
            weights, free = replicas * weight_bytes(model, config, settled), free_memory()
            require_memory(weights + 1, f"the weights of {model}")
            budget = (free - weights) // 2
        # Every rank has a cache of its own: for all latents, or with pipelines for those of its layers.
        options += ["--kv-cache-memory-bytes", str(budget // ranks)]
    if on_cpu and usable_cores() <= _FEW_CORES:
        # vLLM would keep one for its scheduler, half of two: now the scheduler's process computes, on all.
        environment.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    if on_cpu and usable_cores() < allowed_cores():
        # vLLM would start a thread on every core that it sees, and a container stop them all at its quota.
        environment.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    if api_key is not None:  # not on the command line, where every user of the machine can read it
        environment["VLLM_API_KEY"] = api_key
    # The command line of vllm-cpu asks for the version of a package called vllm, and ends.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model]
    os.execve(command[0], [*command, *options, *further], environment)


def _check_further(further: Sequence[str]) -> None:
    if _value(further, "--api-key") is not None:
        wanted = "expected before --, or in MLA_API_KEY, so that it is asked for on every path"
        raise MLAError(f"--api-key: {wanted}, got it after --")
    if any(option.partition("=")[0] == "--config" for option in further):
        wanted = "expected vLLM's options themselves after --, got a file of them"
        raise MLAError(f"--config: {wanted}, whose values would give way to those of `mla serve`")


def _guards(api_key: str | None, options: Sequence[str]) -> list[str]:
    """Options that keep out whom the other engine keeps out, too."""
    if api_key or os.environ.get("VLLM_API_KEY"):
        return ["--middleware", _MIDDLEWARE]
    if is_local(_value(options, "--host") or ""):
        # Any page may ask by default, under the machine's own name, and read the answer.
        return ["--middleware", _MIDDLEWARE, "--allowed-origins", "[]"]
    return []


def keep_prefixes(folder: Path, size: int) -> str:
    """vLLM's setting that keeps prefixes in a folder of ``size`` bytes."""
    return json.dumps(
        {
            "kv_connector": "LatentConnector",
            "kv_connector_module_path": "mla.integrations.vllm.connector",
            "kv_role": "kv_both",
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": {"folder": str(folder.absolute()), "size": size},
        }
    )


def _is_for_cpus() -> bool:
    """Whether the vLLM that is installed computes on CPUs, as it tells itself; another one knows its GPU."""
    if os.environ.get("VLLM_TARGET_DEVICE") == "cpu" or sys.platform == "darwin":
        return True
    try:
        return "cpu" in importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:  # it is called vllm-cpu
        return True


def _value(options: Sequence[str], *names: str) -> str | None:
    """What one of ``names`` is set to among options as they stand on a command line; the last one counts."""
    found = None
    for place, option in enumerate(options):
        name, equals, value = option.partition("=")
        if name in names or any(_is_short_for(name, each) for each in names):
            found = value if equals else next(iter(options[place + 1 :]), None)
    return found


def _is_short_for(name: str, option: str) -> bool:
    """Whether vLLM's parser takes one for the other: it knows beginnings of long options, and underscores in
    them for dashes. A beginning of several options it refuses."""
    return name.startswith("--") and len(name) > 2 and option.startswith(name.replace("_", "-"))


def _number(options: Sequence[str], *names: str) -> int:
    value = _value(options, *names)
    return int(value) if value is not None and value.isdigit() and int(value) else 1  # vLLM refuses others
