"""``mla generate``: one answer to one prompt."""

from pathlib import Path
from typing import Annotated

import typer

from mla.cli import console
from mla.errors import MLAError


def generate(
    model: console.MLAModel,
    prompt: Annotated[str, typer.Argument(help='The prompt; "-" reads it from standard input.')],
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 takes the most likely token every time.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Draw from the most likely tokens of this total share.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of the draw.")] = 0,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the prompt; no chat template.")] = False,
    max_model_len: Annotated[int | None, typer.Option(help="Limit on prompt plus answer, in tokens.")] = None,
    dtype: console.Dtype = "auto",
    cache_format: console.CacheFormat = "auto",
    device: console.Device = "cpu",
    load_cache: Annotated[
        Path | None,
        typer.Option(help="Use the latents in this file as far as PROMPT begins with their text."),
    ] = None,
    save_cache: Annotated[
        Path | None, typer.Option(help="Keep the latents of prompt and answer in this file.")
    ] = None,
    as_json: console.Json = False,
) -> None:
    """Write one answer to PROMPT with an MLA model, absorbed, on its latent cache."""
    text = console.read_text("-") if prompt == "-" else console.expect_text("PROMPT", prompt)
    if save_cache is not None and not save_cache.absolute().parent.is_dir():
        raise MLAError(f"--save-cache: expected a file in a folder that exists, got {save_cache}")
    from mla.cli.session import Sampling, Session
    from mla.integrations.prefixes import fingerprint, require_storable

    sampling = Sampling(max_new_tokens, temperature, top_p, seed)
    with console.quiet_libraries():
        session = Session(
            model,
            dtype=console.check_dtype(dtype),
            device=device,
            max_model_len=max_model_len,
            cache_format=cache_format,
        )
        if load_cache is not None or save_cache is not None:
            require_storable(session.model)
            identity = fingerprint(session.model, session.cache_format)
        if load_cache is not None:
            try:
                session.prefixes.load(load_cache, identity)
            except MLAError as error:
                console.say(f"{error}; the prefix is computed again")
        ids = session.encode([{"role": "user", "content": text}], raw=raw)
        stream = None if as_json else lambda piece: print(piece, end="", flush=True)
        with console.long_progress("reading") as advance:
            answer = session.answer(ids, sampling, on_read=advance, on_text=stream)
    if as_json:
        console.print_json(answer)
    else:
        print()
        reused = f" ({answer.reused_tokens} from the cache)" if answer.reused_tokens else ""
        console.people.print(
            f"{answer.prompt_tokens} tokens{reused} read at {answer.prefill_speed:.0f}/s, "
            f"{answer.new_tokens} written at {answer.decode_speed:.1f}/s, "
            f"{answer.cache_bytes_per_token:.0f} cache bytes per token",
            style="dim",
        )
    if save_cache is not None:  # after the answer, which a full disk does not take away
        session.prefixes.save(save_cache, identity)
