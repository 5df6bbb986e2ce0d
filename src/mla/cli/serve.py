"""``mla serve``: an OpenAI-compatible server, on Transformers' or on vLLM's own."""

import importlib.metadata
import importlib.util
import json
import os
import socket
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer

from mla.cli import console
from mla.errors import MLAError
from mla.machine import free_memory, usable_cores
from mla.reading import expect_bytes

_ENGINES = ("auto", "transformers", "vllm")
#: Cores of which one is a large part.
_FEW_CORES = 4
_VLLM_FORMATS = ("auto", "fp32", "bf16", "int8")


def serve(
    model: console.MLAModel,
    engine: Annotated[
        str,
        typer.Option(help="transformers or vllm. auto takes vLLM where it is installed, else Transformers."),
    ] = "auto",
    host: Annotated[str, typer.Option(help="Address to listen on; the default is for this machine only.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.")] = 8000,
    max_model_len: Annotated[int | None, typer.Option(help="Limit on prompt plus answer, in tokens.")] = None,
    cache_format: console.CacheFormat = "auto",
    memory: Annotated[
        str | None,
        typer.Option(help="Memory for all caches: 8GiB, 500MB. By default half of what weights leave free."),
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(envvar="MLA_API_KEY", show_envvar=True, help="What clients must send as their API key."),
    ] = None,
    cache_dir: Annotated[
        Path | None,
        typer.Option(help="Keep the latents of prompts in this folder, beyond a restart."),
    ] = None,
    cache_dir_size: Annotated[
        str, typer.Option(help="Largest size of that folder; the prefix not used for longest goes first.")
    ] = "10GiB",
    served_model_name: Annotated[
        str | None, typer.Option(help="What clients call the model; by default MODEL as it is written here.")
    ] = None,
    dtype: console.Dtype = "auto",
    vllm_options: Annotated[
        list[str] | None,
        typer.Argument(help="After --: options for vLLM's server, such as -- --tensor-parallel-size 2."),
    ] = None,
) -> None:
    """Serve an MLA model over the OpenAI interface: chat completions, completions, models, streaming."""
    if engine not in _ENGINES:
        raise MLAError(f"--engine: expected one of {', '.join(_ENGINES)}, got {engine}")
    if not 0 <= port <= 65535:
        raise MLAError(f"--port: expected 0 to 65535, got {port}")
    if api_key == "":
        raise MLAError("--api-key: expected a key, got an empty one")
    budget = None if memory is None else expect_bytes("--memory", memory)
    folder_size = expect_bytes("--cache-dir-size", cache_dir_size)
    name = served_model_name or model
    with ExitStack() as stack:
        stack.enter_context(console.quiet_libraries())
        config = _config_for_vllm(engine, model, max_model_len, cache_format, vllm_options)
        if config is not None:
            _warn_of_strangers(host, api_key or os.environ.get("VLLM_API_KEY"))
            # Without "auto" vLLM ends where the model's full length does not fit, and takes nothing less.
            length = "auto" if max_model_len is None else str(max_model_len)
            options = ["--host", host, "--port", str(port), "--max-model-len", length]
            options += [] if served_model_name is None else ["--served-model-name", served_model_name]
            options += (
                [] if cache_dir is None else ["--kv-transfer-config", _connector(cache_dir, folder_size)]
            )
            _become_vllm(model, config, options, vllm_options or [], cache_format, budget, api_key, dtype)
        listener = stack.enter_context(_listen(host, port))
        app = _load(model, name, dtype, cache_format, max_model_len, budget, api_key, cache_dir, folder_size)
        _run(app, listener, name, host, api_key)


def _load(
    model: str,
    name: str,
    dtype: str,
    cache_format: str,
    max_model_len: int | None,
    budget: int | None,
    api_key: str | None,
    cache_dir: Path | None,
    folder_size: int,
) -> Any:
    """The application, its model loaded; says what fits."""
    missing = [name for name in ("fastapi", "uvicorn", "openai") if importlib.util.find_spec(name) is None]
    if missing:
        raise MLAError(f"serving needs more packages: pip install {' '.join(missing)}")
    from mla.integrations.serving.app import build_app
    from mla.integrations.serving.loading import load_engine

    served = load_engine(
        model,
        name=name,
        dtype=console.check_dtype(dtype),
        cache_format=cache_format,
        max_model_len=max_model_len,
        budget=budget,
        cache_dir=cache_dir,
        cache_dir_size=folder_size,
        note=_say,
    )
    _say(served.words())
    return build_app(served.engine, api_key)


def _listen(host: str, port: int) -> socket.socket:
    """The listening socket, before minutes go into loading a model: who asks meanwhile waits."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(1024)  # two servers may bind, only one of them may listen
    except OSError as error:
        raise MLAError(f"cannot listen on {host} port {port}: {error.strerror}") from error
    except UnicodeError as error:  # of names with empty or endless parts
        raise MLAError(f"--host: expected an address or a host's name, got {host}") from error
    return listener


def _run(app: Any, listener: socket.socket, model: str, host: str, api_key: str | None) -> None:
    import uvicorn

    _warn_of_strangers(host, api_key)
    place = f"[{host}]" if ":" in host else host
    config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=3)
    _say(f"serving {model} at http://{place}:{listener.getsockname()[1]}/v1")
    uvicorn.Server(config).run(sockets=[listener])


def _config_for_vllm(
    engine: str,
    model: str,
    max_model_len: int | None,
    cache_format: str,
    vllm_options: list[str] | None,
) -> Any | None:
    """The model's configuration if vLLM serves; what vLLM cannot do is refused, or left to Transformers."""
    has_vllm = importlib.util.find_spec("vllm") is not None
    if engine == "vllm" and not has_vllm:
        raise MLAError("--engine vllm: vLLM is not installed here; see docs/vllm.md")
    if engine == "transformers" or not has_vllm:
        if vllm_options:
            raise MLAError(f"{' '.join(vllm_options)}: options after -- are vLLM's; take --engine vllm")
        return None
    from mla.integrations.loading import load_mla_config

    config, _ = load_mla_config(model, max_model_len=max_model_len)
    reason = None
    if cache_format not in _VLLM_FORMATS:
        reason = f"--cache-format: vLLM takes {', '.join(_VLLM_FORMATS)}, got {cache_format}"
    elif getattr(config.get_text_config(decoder=True), "attention_bias", False):
        reason = f"{model} has biases in its attention, for which vLLM has no place"
    if reason is None:
        return config
    if engine == "vllm" or vllm_options:
        raise MLAError(f"{reason}; take --engine transformers")
    _say(f"{reason}; Transformers serves")
    return None


def _connector(folder: Path, size: int) -> str:
    """vLLM's setting that keeps prefixes in a folder."""
    return json.dumps(
        {
            "kv_connector": "LatentConnector",
            "kv_connector_module_path": "mla.integrations.vllm.connector",
            "kv_role": "kv_both",
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": {"folder": str(folder.absolute()), "size": size},
        }
    )


def _become_vllm(
    model: str,
    config: Any,
    options: list[str],
    further: list[str],
    cache_format: str,
    budget: int | None,
    api_key: str | None,
    dtype: str,
) -> None:
    """Replace this process by vLLM's server, which finds our plugin by itself."""
    from mla.integrations.loading import require_memory, settle_auto, weight_bytes

    environment = dict(os.environ)
    on_cpu = _is_for_cpus()
    settled = console.check_dtype(dtype)
    if settled == "auto" and on_cpu:
        settled, usual_format = settle_auto(model, config)
        if usual_format != "auto":
            environment.setdefault("MLA_CACHE_FORMAT", usual_format)
    options = [*options, "--dtype", settled]
    if cache_format != "auto":
        environment["MLA_CACHE_FORMAT"] = cache_format
    if budget is not None or (on_cpu and "VLLM_CPU_KVCACHE_SPACE" not in environment):
        # vLLM by itself asks for nine tenths of the machine, and ends where others use more than the rest, or
        # where the weights leave less than what it was told. The variable would win over the option.
        environment.pop("VLLM_CPU_KVCACHE_SPACE", None)
        if budget is None:
            weights, free = weight_bytes(model, config, settled), free_memory()
            require_memory(weights + 1, f"the weights of {model}")
            budget = (free - weights) // 2
        options += ["--kv-cache-memory-bytes", str(budget)]
    if on_cpu and usable_cores() <= _FEW_CORES:
        # vLLM would keep one for its scheduler, half of two: now the scheduler's process computes, on all.
        environment.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    if api_key is not None:  # not on the command line, where every user of the machine can read it
        environment["VLLM_API_KEY"] = api_key
    # The command line of vllm-cpu asks for the version of a package called vllm, and ends.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model]
    os.execve(command[0], [*command, *options, *further], environment)


def _is_for_cpus() -> bool:
    """Whether the vLLM that is installed computes on CPUs, as it tells itself; another one knows its GPU."""
    if os.environ.get("VLLM_TARGET_DEVICE") == "cpu" or sys.platform == "darwin":
        return True
    try:
        return "cpu" in importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:  # it is called vllm-cpu
        return True


def _warn_of_strangers(host: str, api_key: str | None) -> None:
    if not api_key and host not in ("127.0.0.1", "::1", "localhost"):
        _say(f"anybody who reaches {host} can use this server: --api-key asks for a key")


def _say(text: str) -> None:
    """One line for people."""
    print(f"mla: {text}", file=sys.stderr, flush=True)
