"""``mla serve``: an OpenAI-compatible server, on Transformers' or on vLLM's own."""

import importlib.util
import os
import socket
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer

from mla.cli import console, vllm
from mla.errors import MLAError
from mla.machine import is_local
from mla.reading import expect_bytes

_ENGINES = ("auto", "transformers", "vllm")


def serve(
    model: console.MLAModel,
    engine: Annotated[
        str,
        typer.Option(
            help="transformers or vllm. auto takes vLLM where it is installed and can do what is asked, "
            "else Transformers."
        ),
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
        config = vllm.config_if_it_serves(engine, model, max_model_len, cache_format, vllm_options)
        if config is not None:
            _warn_of_strangers(host, api_key or os.environ.get("VLLM_API_KEY"))
            # Without "auto" vLLM ends where the model's full length does not fit, and takes nothing less.
            length = "auto" if max_model_len is None else str(max_model_len)
            options = ["--host", host, "--port", str(port), "--max-model-len", length]
            options += [] if served_model_name is None else ["--served-model-name", served_model_name]
            vllm.become(
                model,
                config,
                options,
                vllm_options or [],
                cache_format=cache_format,
                budget=budget,
                api_key=api_key,
                dtype=dtype,
                cache_dir=cache_dir,
                folder_size=folder_size,
            )
        listener = stack.enter_context(_listen(host, port))
        limits = (max_model_len, budget)
        app = _load(model, name, dtype, cache_format, *limits, api_key, cache_dir, folder_size, host)
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
    host: str,
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
        note=console.say,
    )
    console.say(served.words())
    return build_app(served.engine, api_key, host=host)


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
    console.say(f"serving {model} at http://{place}:{listener.getsockname()[1]}/v1")
    uvicorn.Server(config).run(sockets=[listener])


def _warn_of_strangers(host: str, api_key: str | None) -> None:
    if not api_key and not is_local(host):
        console.say(f"anybody who reaches {host} can use this server: --api-key asks for a key")
