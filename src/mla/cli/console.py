"""What the verbs share: options, progress bars, tables, text files, JSON."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mla import textfile
from mla.errors import MLAError

# People read standard error; standard output carries the answer, so that it can be piped. What they are told
# may be a path with brackets, or a command to copy.
people = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
answers = Console(highlight=False)

# Seconds in which steps tell the speed: it takes two, and a layer of a large model takes minutes.
_SPEED_PERIOD = 3600.0

Model = Annotated[str, typer.Argument(help="A model folder, a .gguf file, or a Hub id (namespace/name).")]
# Transformers reads no GGUF file of an MLA family.
MLAModel = Annotated[str, typer.Argument(help="An MLA model: its folder, or a Hub id (namespace/name).")]
Dtype = Annotated[
    str,
    typer.Option(
        help="auto, float32, bfloat16 or float16. auto keeps the checkpoint's, but float32 where the CPU "
        "has no bf16 arithmetic and the memory allows."
    ),
]
CacheFormat = Annotated[
    str,
    typer.Option(
        help="auto, fp32, fp16, bf16 or int8: how the cache stores latents. auto takes bf16 for a bf16 "
        "checkpoint, else what the model computes in."
    ),
]
Device = Annotated[str, typer.Option(help="Any torch device: cpu, cuda, mps ...")]
LoadCache = Annotated[
    Path | None,
    typer.Option(help="Use the latents in this file as far as the prompt begins with their text."),
]
SaveCache = Annotated[
    Path | None, typer.Option(help="Keep the latents of what was read and written in this file.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]


def say(text: str) -> None:
    """One line for people, on standard error."""
    print(f"mla: {text}", file=sys.stderr, flush=True)


def check_dtype(dtype: str, *known: str) -> Any:
    """The name as given, or a clear refusal; by default what ``load_model`` takes."""
    known = known or ("auto", "float32", "bfloat16", "float16")
    if dtype not in known:
        raise MLAError(f"--dtype: expected one of {', '.join(known)}, got {dtype}")
    return dtype


def check_save_cache(file: Path | None) -> None:
    """Refuse a file that could not be written, before a model is opened for it."""
    if file is not None and not file.absolute().parent.is_dir():
        raise MLAError(f"--save-cache: expected a file in a folder that exists, got {file}")


def read_text(path: str) -> str:
    """The text of a file, or of standard input for "-"."""
    if path != "-":
        return textfile.read_text(path)
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise MLAError(f"standard input is not readable as text: {error}") from error


def expect_text(name: str, text: str) -> str:
    """The text as given; raises MLAError for bytes on the command line that are no UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise MLAError(f"{name}: expected UTF-8 text, got other bytes at letter {error.start + 1}") from error
    return text


def print_json(value: Any) -> None:
    """One JSON object on standard output."""
    data = asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
    print(json.dumps(data, indent=2, ensure_ascii=False))


def teller(advance: Any) -> Callable[[str, float, float], None]:
    """What the library tells of its progress, (stage, done, total), in the order of a bar's ``advance``."""
    return lambda label, done, total: advance(done, total, label)


@contextmanager
def progress(label: str) -> Iterator[Any]:
    """A bar on standard error; yields ``advance(done, total)`` and ``advance(done, total, label)``."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=people, transient=True, speed_estimate_period=_SPEED_PERIOD) as bar:
        bar.add_task(label, total=None)
        (task,) = bar.tasks

        def advance(done: float, total: float, label: str | None = None) -> None:
            if done < task.completed:  # something else is counted now, at another speed
                bar.reset(task.id)
            task.total, task.finished_time = total, None  # an update with a new total would forget the speed
            bar.update(task.id, completed=done, description=label)

        yield advance


@contextmanager
def long_progress(label: str) -> Iterator[Callable[[float, float], None]]:
    """A bar from the first of several steps to the last one; yields ``advance(done, total)``."""
    with ExitStack() as stack:
        bars: list[Any] = []

        def advance(done: float, total: float) -> None:
            if done >= total:
                stack.close()
                return
            if not bars:
                bars.append(stack.enter_context(progress(label)))
            bars[0](done, total)

        yield advance


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keep the libraries' notices and bars off the screen, but for those of downloads; errors still come as
    exceptions."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, enable_progress_bars
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    downloads = not are_progress_bars_disabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()  # those of downloads, too
    if downloads:
        enable_progress_bars()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
