"""The loop and the report that decode and prefill share: check, take turns, compare with bounds and peers."""

import json
import sys
from collections.abc import Callable, Iterable
from typing import Any

from rich.console import Console
from rich.progress import Progress

from benchmarks import timing
from benchmarks.calls import DecodeCall, PrefillCall, check
from benchmarks.ceiling import Ceilings
from benchmarks.peers import Peer, Peers

Call = DecodeCall | PrefillCall
Row = dict[str, Any]


def measure(
    cases: Iterable[tuple[str, Callable[[], Call]]],
    formats: list[str],
    run_of: Callable[[Call, str], Callable[[], Any]],
    peers_of: Callable[[Call], dict[str, Peer | str]] | None,
    ceilings: Ceilings,
    seconds: float,
) -> tuple[list[Row], Peers]:
    """One row per case and format. An interrupt keeps the rows that are finished."""
    rows: list[Row] = []
    peers = Peers()
    cases = list(cases)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=len(cases))
        try:
            for name, make in cases:
                progress.update(task, description=name)
                call = make()
                checked = {fmt: check(f"{name} {fmt}", run_of(call, fmt), call, fmt) for fmt in formats}
                runs: dict[str, Callable[[], object]] = {fmt: each.run for fmt, each in checked.items()}
                slow: dict[str, timing.Times] = {}
                errors: dict[str, float] = {}
                if peers_of is not None:
                    ours = min(timing.sample(run, 1) for run in runs.values())
                    admitted, slow, errors = peers.admit(peers_of(call), name, call.operations, ours)
                    runs |= admitted
                before = ceilings.count()
                times = timing.take_turns(runs, seconds, between=ceilings.sample)
                ceilings.sample_all()
                against = {who: times.get(who) or slow[who] for who in errors}
                theirs = {who: each.as_json() | {"error": errors[who]} for who, each in against.items()}
                rows += [
                    {
                        "case": name,
                        **{key: getattr(call.case, key) for key in "bsthnrpv"},
                        "format": fmt,
                        "error": checked[fmt].error,
                        "moved": checked[fmt].moved,
                        "operations": call.operations,
                        "cache_bytes": call.cache_bytes(fmt),
                        **times[fmt].as_json(),
                        "ceiling_meanwhile": ceilings.of(fmt).since(before),
                        "peers": theirs,
                    }
                    for fmt in formats
                ]
                progress.advance(task)
        except KeyboardInterrupt:
            print("interrupted: what follows is what was finished", file=sys.stderr)
    for row in rows:  # the best ceiling of the run is known only now
        _complete(row, ceilings)
    return rows, peers


def _complete(row: Row, ceilings: Ceilings) -> None:
    ceiling = ceilings.of(row["format"]).best
    for which in ("median", "best"):
        seconds = row[f"{which}_s"]
        row[f"{which}_flops"] = row["operations"] / seconds
        row[f"{which}_share"] = row["operations"] / seconds / ceiling
        row[f"{which}_cache_bytes_per_s"] = row["cache_bytes"] / seconds
        if row["peers"]:
            rival = min(row["peers"], key=lambda peer: row["peers"][peer][f"{which}_s"])
            row[f"{which}_peer"] = rival
            row[f"{which}_times_faster"] = row["peers"][rival][f"{which}_s"] / seconds


def speedups(rows: list[Row]) -> dict[str, dict[str, float | str]]:
    """Per format and over all: geometric mean and worst of (time of the best peer) / (our time)."""
    groups = {
        fmt: [row for row in rows if row["format"] == fmt] for fmt in dict.fromkeys(r["format"] for r in rows)
    }
    if len(groups) > 1:
        groups["all"] = rows
    found: dict[str, dict[str, float | str]] = {}
    for fmt, group in groups.items():
        compared = [row for row in group if row["peers"]]
        if not compared:
            continue
        found[fmt] = {}
        for which in ("median", "best"):
            worst = min(compared, key=lambda row: row[f"{which}_times_faster"])
            found[fmt] |= {
                f"{which}_geometric_mean": timing.geometric_mean(
                    r[f"{which}_times_faster"] for r in compared
                ),
                f"{which}_worst": worst[f"{which}_times_faster"],
                f"{which}_worst_case": f"{worst['case']} {worst['format']}, {worst[f'{which}_peer']}",
            }
    return found


def int8_over_bf16(rows: list[Row]) -> list[tuple[str, float, float]]:
    """(case, times faster by medians, how far int8 moves the output) where both formats were timed."""
    bf16 = {row["case"]: row for row in rows if row["format"] == "bf16"}
    return [
        (row["case"], bf16[row["case"]]["median_s"] / row["median_s"], row["moved"])
        for row in rows
        if row["format"] == "int8" and row["case"] in bf16
    ]


def show(title: str, rows: list[Row], peers: Peers, ceilings: Ceilings, lines: Iterable[str]) -> None:
    """The tables; ``lines`` come below them."""
    timing.print_table(
        title,
        ["case", "cache", "ms median", "best", "GFLOP/s", "best", "of ceiling", "best", "GB/s", "error"],
        (
            (
                row["case"],
                row["format"],
                timing.milliseconds(row["median_s"]),
                timing.milliseconds(row["best_s"]),
                f"{row['median_flops'] / 1e9:.0f}",
                f"{row['best_flops'] / 1e9:.0f}",
                f"{row['median_share']:.0%}",
                f"{row['best_share']:.0%}",
                f"{row['median_cache_bytes_per_s'] / 1e9:.2f}",
                f"{row['error']:.0e}",
            )
            for row in rows
        ),
        left=2,
    )
    if any(row["peers"] for row in rows):
        _show_peers(rows)
    for note, cases in peers.notes.items():
        everywhere = len(cases) == len({row["case"] for row in rows})
        print(f"{note}" if everywhere else f"{note} ({len(cases)} cases, first {cases[0]})")
    for line in lines:
        print(line)
    for fmt, each in speedups(rows).items():
        print(
            f"{fmt} against the best peer: {each['median_geometric_mean']:.2f} times faster in the geometric "
            f"mean of medians, worst {each['median_worst']:.2f} ({each['median_worst_case']}); by best times "
            f"{each['best_geometric_mean']:.2f}, worst {each['best_worst']:.2f} ({each['best_worst_case']})"
        )
    print(ceilings.describe())
    print(timing.describe(timing.machine()))


def _show_peers(rows: list[Row]) -> None:
    """Milliseconds of every peer (medians, best), once per case."""
    cases = {row["case"]: row for row in rows}
    table = []
    for name, row in cases.items():
        ours = {f"mla {r['format']}": r for r in rows if r["case"] == name}
        for who, each in sorted((ours | row["peers"]).items(), key=lambda item: item[1]["median_s"]):
            once = "" if each["samples"] > 1 else "timed once"
            times = timing.milliseconds(each["median_s"]), timing.milliseconds(each["best_s"])
            flops = each.get("operations", row["operations"]) / each["median_s"]
            table.append((name, who, *times, f"{flops / 1e9:.0f}", f"{each['error']:.0e}", once))
    columns = ["case", "who", "ms median", "best", "GFLOP/s", "error", ""]
    timing.print_table("In the same turns, the fastest first", columns, table, left=2)


def write_json(rows: list[Row], peers: Peers, ceilings: Ceilings, **more: Any) -> None:
    print(
        json.dumps(
            {
                "machine": timing.machine(),
                "ceiling": ceilings.as_json(),
                "rows": rows,
                "speedups": speedups(rows),
                "int8_over_bf16": int8_over_bf16(rows),
                "notes": peers.notes,
                **more,
            }
        )
    )


def summary(rows: list[Row]) -> list[str]:
    """What int8 brings and costs, in one line."""
    found = int8_over_bf16(rows)
    if not found:
        return []
    mean = timing.geometric_mean(faster for _, faster, _ in found)
    case, worst, _ = min(found, key=lambda each: each[1])
    moved = max(moved for _, _, moved in found)
    return [
        f"int8 against our own bf16: {mean:.2f} times faster in the geometric mean of medians, worst "
        f"{worst:.2f} ({case}); it moves the output by at most {moved:.1e}"
    ]
