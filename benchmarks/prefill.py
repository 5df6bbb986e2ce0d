"""Expanded prefill: time, GFLOP/s, and the share of what this machine can do.

    python -m benchmarks.prefill [--dims 512+64 88+32] [--new 128 512 1024 4096 512@4096] [--heads N]
                                 [--format bf16 int8 fp32] [--peers] [--json] [--isa NAME] [--quick]

``--new`` counts the new tokens; 512@4096 are 512 of them on a prefix of 4,096 that is cached already. Heads
are 16 (512/64/128/128) and 9 (88/32/64/64).

Every result is compared with ``ops.reference`` on the numbers that the cache holds; an error above 5e-3
(1e-2 over int8 latents) ends the program without figures. Then all formats, all peers and the ceiling take
turns. Operations are those of visible pairs and of the expansion, 2·h·(pairs·(n + p + v) + t·r·(n + v)).

``--peers`` adds torch's fused attention, which needs the keys and values of all heads at once: they are
rebuilt in every call, in the order of Transformers' models. It takes a slow path where keys and values differ
in width, so that values padded to the keys' width are the faster peer.
"""

import argparse
from collections.abc import Callable
from dataclasses import replace

import torch

from benchmarks import report, timing
from benchmarks.calls import DIMENSIONS, FORMATS, PrefillCall
from benchmarks.ceiling import Ceilings
from benchmarks.peers import prefill_peers

NEW = ("128", "512", "1024", "4096", "512@4096")


def tokens(text: str) -> tuple[int, int]:
    """(new, cached) of "512@4096" or "512"."""
    new, _, cached = text.partition("@")
    numbers = int(new), int(cached or 0)
    if numbers[0] < 1 or numbers[1] < 0:
        raise ValueError(text)
    return numbers


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.prefill", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--dims", nargs="+", choices=DIMENSIONS, default=list(DIMENSIONS))
    parser.add_argument("--new", nargs="+", type=tokens, metavar="N[@CACHED]")
    parser.add_argument("--heads", type=int, nargs="+", metavar="N")
    parser.add_argument("--format", nargs="+", choices=FORMATS, default=["bf16", "int8"])
    parser.add_argument("--quick", action="store_true", help="two lengths, a second each")
    timing.add_kernel_options(parser)
    timing.add_common_options(parser)
    options = parser.parse_args(arguments)
    options.new = options.new or [tokens(text) for text in (("128", "1024") if options.quick else NEW)]
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    isa = timing.choose_isa(options.isa)
    cases: list[tuple[str, Callable[[], PrefillCall]]] = []
    for name in options.dims:
        sizes = DIMENSIONS[name]
        for new, cached in options.new:
            for h in options.heads or [sizes.h]:
                case = replace(sizes, h=h, s=new, t=new + cached)
                prefix = f" on {cached}" if cached else ""
                label = f"{case.r}/{case.p}/{case.n}/{case.v} h{h} s{new}{prefix}"
                cases.append((label, lambda case=case: PrefillCall(case)))
    ceilings = Ceilings(isa, options.format)
    rows, peers = report.measure(
        cases,
        options.format,
        lambda call, fmt: call.ours(fmt, isa),
        prefill_peers if options.peers else None,
        ceilings,
        1.0 if options.quick else options.seconds,
    )
    if options.json:
        report.write_json(rows, peers, ceilings, isa=isa)
        return
    title = f"prefill, causal, {isa}, threads: {torch.get_num_threads()}"
    report.show(title, rows, peers, ceilings, report.summary(rows))


if __name__ == "__main__":
    main()
