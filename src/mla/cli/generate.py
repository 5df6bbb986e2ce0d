"""``mla generate``: one answer to one prompt."""

from typing import Annotated

import typer

from mla.cli import console


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
    load_cache: console.LoadCache = None,
    save_cache: console.SaveCache = None,
    as_json: console.Json = False,
) -> None:
    """Write one answer to PROMPT with an MLA model, absorbed, on its latent cache."""
    text = console.read_text("-") if prompt == "-" else console.expect_text("PROMPT", prompt)
    console.check_save_cache(save_cache)
    from mla.cli.session import Sampling, Session

    sampling = Sampling(max_new_tokens, temperature, top_p, seed)
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
    session.save()  # after the answer, which a full disk does not take away
