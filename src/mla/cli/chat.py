"""``mla chat``: a conversation that keeps its latents between turns."""

import json
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from typing import Annotated, Any

import typer

from mla.cli import console
from mla.errors import MLAError


def chat(
    model: console.MLAModel,
    system: Annotated[str | None, typer.Option(help="System message at the start.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Length of an answer at most.")] = 512,
    temperature: Annotated[float, typer.Option(help="0 takes the most likely token every time.")] = 0.7,
    top_p: Annotated[float, typer.Option(help="Draw from the most likely tokens of this total share.")] = 0.9,
    seed: Annotated[int, typer.Option(help="Seed of the draw.")] = 0,
    max_model_len: Annotated[int | None, typer.Option(help="Limit on the conversation, in tokens.")] = None,
    dtype: console.Dtype = "auto",
    cache_format: console.CacheFormat = "auto",
    device: console.Device = "cpu",
    load_cache: console.LoadCache = None,
    save_cache: console.SaveCache = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print each answer as one line of JSON.")] = False,
) -> None:
    """Talk with an MLA model. /reset starts anew, /exit or end of input ends, Ctrl-C stops an answer."""
    console.check_save_cache(save_cache)
    from mla.cli.session import Sampling, Session

    typed = sys.stdin.isatty()  # a script has to see what goes wrong
    sampling = Sampling(max_new_tokens, temperature, top_p, seed)
    start = []
    if system is not None:
        start.append({"role": "system", "content": console.expect_text("--system", system)})
    with console.quiet_libraries():
        session = Session(
            model,
            dtype=console.check_dtype(dtype),
            device=device,
            max_model_len=max_model_len,
            cache_format=cache_format,
            load_cache=load_cache,
            save_cache=save_cache,
        )
        if not session.has_template:
            if system is not None:
                raise MLAError(f"--system: expected a model with a chat template, got none with {model}")
            console.say(f"{model} has no chat template: what you type and what it writes is one text")
        try:
            _converse(session, start, sampling, typed=typed, as_json=as_json)
        except BaseException:
            # Ctrl-C at the prompt, or a mistake in a script: what was read until then is kept all the same.
            with suppress(MLAError):
                session.save()
            raise
    session.save()


def _converse(
    session: Any, start: list[dict[str, str]], sampling: Any, *, typed: bool, as_json: bool
) -> None:
    """Questions and answers, until the input ends."""
    messages = list(start)
    while True:
        try:
            line = console.people.input("> ").strip()
        except EOFError:
            break
        if line == "/exit":
            break
        if line == "/reset":
            messages = list(start)
            continue
        if not line:
            continue
        messages.append({"role": "user", "content": line})
        stream = None if as_json else lambda piece: print(piece, end="", flush=True)
        try:
            with _stopping(typed) as stopped, console.long_progress("reading") as advance:
                ids = session.encode(messages)
                answer = session.answer(ids, sampling, on_read=advance, on_text=stream, stopped=stopped)
        except MLAError as error:
            if not typed:
                raise
            console.people.print(f"mla: error: {error}; /reset starts anew")
            messages.pop()
            continue
        if answer.new_tokens == 0:  # stopped while the message was read
            messages.pop()
            continue
        messages.append({"role": "assistant", "content": answer.text})
        if as_json:
            print(json.dumps(asdict(answer), ensure_ascii=False), flush=True)
            continue
        print()
        console.people.print(
            f"{answer.prompt_tokens} tokens ({answer.reused_tokens} from the cache), "
            f"{answer.new_tokens} written at {answer.decode_speed:.1f}/s",
            style="dim",
        )


@contextmanager
def _stopping(active: bool) -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C was pressed while inside; pressed again it ends the program."""
    before, presses = signal.getsignal(signal.SIGINT), []

    def press(*_: Any) -> None:
        presses.append(True)
        signal.signal(signal.SIGINT, before)

    if active:
        signal.signal(signal.SIGINT, press)
    try:
        yield lambda: bool(presses)
    finally:
        signal.signal(signal.SIGINT, before)
