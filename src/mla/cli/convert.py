"""``mla convert``: an MHA, GQA or MQA model becomes an MLA checkpoint that stock software loads."""

import math
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from mla.budget import Budget
from mla.cli import console
from mla.errors import MLAError
from mla.machine import free_memory


def convert(
    model: console.Model,
    out: Annotated[
        Path,
        typer.Argument(
            help="Folder to write; must not exist, or --overwrite. With --explore: the page, OUT.html."
        ),
    ],
    cache: Annotated[
        float | None,
        typer.Option(help="Cache of the result as a share of the original's, such as 0.5 (the default)."),
    ] = None,
    rank: Annotated[
        int | None, typer.Option(help="Latent rank r: instead of --cache, or beside --rope.")
    ] = None,
    rope: Annotated[int | None, typer.Option(help="Width p of the shared rotary key, even.")] = None,
    calibration: Annotated[
        list[str],
        typer.Option(
            help="A UTF-8 text like what the model will read, or 'self': the model writes its own. "
            "Given several times, they share the windows."
        ),
    ] = ["self"],  # noqa: B006  typer copies it
    heal: Annotated[
        float, typer.Option(help="Minutes of training against the original after the conversion.")
    ] = 0.0,
    explore: Annotated[
        bool,
        typer.Option(
            "--explore",
            help="Write no model: draw quality against cache size into the page OUT; fifteen conversions.",
        ),
    ] = False,
    max_kl: Annotated[
        float | None,
        typer.Option(
            help="Choose the smallest cache whose KL to the original, on held-out text and before any "
            "healing, is at most this, in nats per token; up to six conversions to search, one more to write."
        ),
    ] = None,
    max_ppl_increase: Annotated[
        float | None,
        typer.Option(help="Choose the smallest cache that raises perplexity by at most this share: 0.05."),
    ] = None,
    windows: Annotated[
        int | None,
        typer.Option(help="How many windows of calibration text: 24, or 64 and 128 for small caches."),
    ] = None,
    window: Annotated[
        int | None, typer.Option(help="Tokens per window: 1024, or the longest that the model takes.")
    ] = None,
    split_query: Annotated[
        bool,
        typer.Option(
            "--split-query", help="Store the query projection as two, as llama.cpp asks for: exact, larger."
        ),
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of the calibration text and the order of training.")] = 0,
    dtype: Annotated[
        str, typer.Option(help="Dtype of the written weights: float32 or bfloat16.")
    ] = "float32",
    device: Annotated[str, typer.Option(help="Where the work is done: cpu, or cuda for a GPU.")] = "cpu",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it exists.")] = False,
    as_json: console.Json = False,
) -> None:
    """Convert a Llama-type MODEL (MHA, GQA or MQA) to Multi-head Latent Attention and write it to OUT.

    OUT is a DeepseekV3ForCausalLM checkpoint: Transformers loads it without remote code, and so does vLLM
    unless MODEL's attention has biases. OUT appears once it is complete. A conversion that was interrupted
    goes on where it was when the same command runs again.
    """
    import torch

    from mla.cli.explore import check_page, choose_command, explore_command
    from mla.convert import (
        Request,
        budget_for,
        calibration_size,
        check_convertible,
        check_output,
        check_request,
        exclusive,
        holds_windows,
        read_texts,
        run,
        workspace,
    )
    from mla.convert.memory import least_memory
    from mla.convert.promise import Promise
    from mla.integrations.loading import load_config, load_model, load_tokenizer, require_memory

    # The report and the page name them.
    console.expect_text("MODEL", model)
    console.expect_text("OUT", str(out))
    for text in calibration:
        console.expect_text("--calibration", text)
    if dtype != "float16":  # known, and refused below with the reason
        console.check_dtype(dtype, "float32", "bfloat16")
    if device.partition(":")[0] == "mps":
        raise MLAError("--device mps: the conversion needs float64, which mps does not have; take cpu")
    promised = max_kl is not None or max_ppl_increase is not None
    sized = cache is not None or rank is not None or rope is not None
    if (explore or promised) and sized:
        raise MLAError(
            "--explore, --max-kl and --max-ppl-increase choose the cache: leave out --cache, --rank, --rope"
        )
    if explore and (promised or heal):
        raise MLAError(
            "--explore compares untrained conversions: leave out --max-kl, --max-ppl-increase, --heal"
        )
    if explore and (split_query or dtype != "float32"):
        raise MLAError("--explore writes no model: leave out --dtype, --split-query")
    if not (sized or explore or promised):
        cache, sized = 0.5, True
    with ExitStack() as stack:
        stack.enter_context(console.quiet_libraries())
        stack.enter_context(exclusive(out))
        # Everything that the configuration alone can refuse comes before the weights are read.
        if explore:
            check_page(out, overwrite=overwrite, source=model)
        else:
            check_output(out, dtype=getattr(torch, dtype), overwrite=overwrite, source=model)
        promise = Promise(max_kl, max_ppl_increase) if promised else None
        config = load_config(model)
        check_convertible(config)
        # Searches compare caches of all sizes on one text.
        asked = budget_for(config, cache=cache, rank=rank, rope=rope) if sized else None
        count, window = calibration_size(
            config, asked, texts=len(calibration), windows=windows, window=window
        )
        request = Request(
            cache=cache,
            rank=rank,
            rope=rope,
            calibration=tuple(calibration),
            windows=count,
            window=window,
            seed=seed,
            heal=heal,
            split_query=split_query,
            dtype=dtype,
        )
        check_request(request)
        texts = read_texts(request)

        def least(budget: Budget, windows: int) -> int:
            return least_memory(
                config, budget, windows=windows, window=window, split_query=split_query, heal=heal > 0
            )

        room = math.inf
        if device == "cpu":
            room = free_memory()
            # A promise may take all of the original's cache; an exploration starts at half of it.
            largest = asked or budget_for(config, cache=1.0 if promised else 0.5, rank=None, rope=None)
            require_memory(
                least(largest, count),
                f"converting {model}, both models in float32 and {count} windows of {window} tokens,",
            )
        tokenizer = load_tokenizer(model)
        teacher = load_model(model, dtype="float32", device=device)
        work = None
        if explore or promised:
            # The search does not heal, and calibrates on the same windows whatever the minutes.
            search = replace(request, heal=0.0)
            with console.progress("writing calibration text") as advance:
                work = stack.enter_context(
                    workspace(
                        teacher,
                        tokenizer,
                        out,
                        search,
                        "exploring",
                        texts=texts,
                        on_progress=console.teller(advance),
                        on_notice=console.people.print,
                    )
                )
            measured, state = (work.calibration, work.held_out), work.place / "points"
        if explore:
            explore_command(
                teacher,
                *measured,
                source=model,
                out=out,
                overwrite=overwrite,
                state=state,
                as_json=as_json,
            )
            return
        if promise is not None:
            point = choose_command(teacher, *measured, promise, state=state)
            # A small cache deserves more text than the search, which measures all sizes on the same.
            asked = budget_for(config, cache=None, rank=point.rank, rope=point.rope)
            count, _ = calibration_size(config, asked, texts=len(calibration), windows=windows, window=window)
            request = replace(request, rank=point.rank, rope=point.rope)
            longer = replace(request, windows=count)
            lacking = None
            if least(asked, count) > room:
                lacking = "there is too little memory"
            elif not holds_windows(teacher, tokenizer, longer, texts):
                lacking = "the calibration text is too short"
            if lacking is None:
                request = longer
            else:
                console.people.print(
                    f"{lacking} for {count} windows, which such a cache deserves: {request.windows} do"
                )
        with console.progress("converting") as advance:
            facts = run(
                model,
                teacher,
                tokenizer,
                out,
                request,
                overwrite=overwrite,
                texts=texts,
                promise=promise,
                search=work,
                on_progress=console.teller(advance),
                on_notice=console.people.print,
            )
    dims, quality = facts["dims"], facts["quality"]
    if promise is not None and not facts["promise"]["kept"]:
        increase = quality["perplexity"] / quality["teacher_perplexity"] - 1
        console.people.print(
            f"The search kept {promise}, the result does not on its held-out text: KL {quality['kl']:.4f}, "
            f"perplexity {increase:+.1%}. Ask for less of either, choose a larger --rank, or --heal it"
        )
    if as_json:
        console.print_json(facts)
        return
    console.people.print(
        f"{out}: latent rank {dims['rank']} + rotary key {dims['rope']} numbers per token and layer "
        f"({dims['cached_numbers_per_token_and_layer']} of {dims['original_numbers_per_token_and_layer']}), "
        f"in {facts['seconds']:.0f} s. On held-out text: perplexity {quality['teacher_perplexity']:.2f} -> "
        f"{quality['perplexity']:.2f}, KL {quality['kl']:.3f}. Report: {out / 'report.html'}. "
        f"Next: mla generate {out} 'Hello'"
    )
