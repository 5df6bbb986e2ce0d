"""vLLM alone against vLLM with our plugin: time to the first token, and speed of decoding.

    build/vllm/bin/python -m benchmarks.serving

Both run in processes of their own, on the same prompts, and take turns case by case. First their answers are
compared: where these differ by more than rounding, no figure is printed. Runs in the environment that
``make vllm`` sets up.
"""

import argparse
import contextlib
import json
import os
import random
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from benchmarks import timing
from benchmarks.contender import Contender
from mla.integrations.loading import computes_in_half
from tests.vllm import engine as vllm

STOCK, OURS = "vLLM", "vLLM + mla"
VOCABULARY = 512
# Log-probabilities of two runs in bf16 that mean the same.
TOLERANCE = 0.25


@dataclass(frozen=True)
class Case:
    """Requests that arrive at once, each of ``context`` tokens, the first ``shared`` of which they share."""

    context: int
    requests: int
    shared: int

    @property
    def name(self) -> str:
        prefix = f", {self.shared} shared" if self.shared else ""
        return f"{self.context} tokens x {self.requests}{prefix}"


class Engine(Contender):
    """vLLM in a process of its own."""

    def __init__(self, name: str, options: dict[str, Any], env: dict[str, str]) -> None:
        settings = {
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # no second process to talk to: only the engine is timed
        }
        command = [sys.executable, "-m", "benchmarks.serving", "--worker", json.dumps(options)]
        super().__init__(name, command, {**settings, **env})

    def complete(self, prompts: list[list[int]], tokens: int, logprobs: int | None = None) -> Any:
        """One dict per prompt: tokens, the seconds at which each came, and the likeliest ones' logprobs."""
        return self.ask({"prompts": prompts, "tokens": tokens, "logprobs": logprobs})


def worker(options: dict[str, Any], answers: int) -> None:
    """The process of one engine."""
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

    engine = LLM(**options).llm_engine
    with os.fdopen(answers, "w") as out:
        for number, line in enumerate(sys.stdin):
            job = json.loads(line)
            sampling = SamplingParams(
                temperature=0,
                max_tokens=job["tokens"],
                ignore_eos=True,
                detokenize=False,
                logprobs=job["logprobs"],
            )
            started = time.perf_counter()
            for i, prompt in enumerate(job["prompts"]):
                engine.add_request(f"{number}.{i}", TokensPrompt(prompt_token_ids=prompt), sampling)
            found: dict[str, dict[str, Any]] = {}
            while engine.has_unfinished_requests():
                for each in engine.step():
                    now = time.perf_counter() - started
                    mine = found.setdefault(each.request_id, {"seconds": []})
                    got = each.outputs[0]
                    mine["seconds"] += [now] * (len(got.token_ids) - len(mine["seconds"]))
                    mine["tokens"] = list(got.token_ids)
                    mine["logprobs"] = [
                        {t: p.logprob for t, p in step.items()} for step in got.logprobs or []
                    ]
            ordered = [found[f"{number}.{i}"] for i in range(len(job["prompts"]))]
            print(json.dumps(ordered), file=out, flush=True)


def same_answers(engines: list[Engine], context: int) -> float:
    """The largest difference of log-probabilities, up to where a near tie sends the texts apart.

    Raises:
        SystemExit: a difference beyond rounding.
    """
    prompts = [prompt_of(seed, context, 0) for seed in "abc"]
    theirs, ours = (each.complete(prompts, 8, logprobs=5) for each in engines)
    worst = 0.0
    for a, b in zip(theirs, ours, strict=True):
        for i, (x, y) in enumerate(zip(a["tokens"], b["tokens"], strict=True)):
            steps = a["logprobs"][i], b["logprobs"][i]
            common = set(steps[0]) & set(steps[1])
            worst = max([worst, *(abs(steps[0][t] - steps[1][t]) for t in common)])
            if x != y:
                if not {str(x), str(y)} <= common:
                    raise SystemExit(f"the texts differ at token {i}: {STOCK} {x}, {OURS} {y}")
                break
    if worst > TOLERANCE:
        raise SystemExit(f"log-probabilities differ by {worst:.3f}, expected at most {TOLERANCE}")
    return worst


def prompt_of(seed: str, context: int, shared: int, prefix_seed: str = "") -> list[int]:
    first, rest = random.Random(f"prefix {prefix_seed}"), random.Random(f"prompt {seed}")
    return [
        *(first.randrange(3, VOCABULARY) for _ in range(shared)),
        *(rest.randrange(3, VOCABULARY) for _ in range(context - shared)),
    ]


def measure(engine: Engine, case: Case, tokens: int, turn: int) -> dict[str, float]:
    """Seconds to the first token (the mean over requests), and tokens per second from then on.

    With a shared prefix, ``first_alone_s`` is what the request that computes it waits.
    """
    row = {}
    # Every turn has prompts of its own: nothing but the shared prefix is found in the cache.
    seeds = [f"{case.name} {turn} {i}" for i in range(case.requests + 1)]
    prompts = [prompt_of(seed, case.context, case.shared, f"{case.name} {turn}") for seed in seeds]
    if case.shared:
        (alone,) = engine.complete(prompts[:1], 1)
        row["first_alone_s"] = alone["seconds"][0]
    answers = engine.complete(prompts[1:], tokens)
    firsts = [each["seconds"][0] for each in answers]
    started, ended = max(firsts), max(each["seconds"][-1] for each in answers)
    later = sum(second > started for each in answers for second in each["seconds"])
    return {**row, "first_s": statistics.fmean(firsts), "decode_tokens_per_s": later / (ended - started)}


def too_large(case: Case, heads: int) -> str | None:
    """Why vLLM alone cannot run a case here: it holds all scores of a prompt in fp32, about three times."""
    needed, free = 3 * 4 * heads * case.context**2, psutil.virtual_memory().available
    if needed < 0.8 * free:
        return None
    return f"needs about {needed / 2**30:.0f} GiB for the scores of a prompt, {free / 2**30:.0f} GiB are free"


def make_model(folder: Path, layers: int, hidden: int) -> str:
    """Random weights with the attention of DeepSeek-V2-Lite; the only widths that vLLM's own kernel has."""
    from tests.vllm import models

    size = {"hidden_size": hidden, "intermediate_size": 2 * hidden, "num_hidden_layers": layers}
    return models.write("deepseek-v2-lite", folder, **size, first_k_dense_replace=layers)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: to see that it runs")
    parser.add_argument("--model", help="a folder; random weights with DeepSeek-V2-Lite's attention if none")
    parser.add_argument("--layers", type=int, default=4, help="of the random model")
    parser.add_argument("--hidden", type=int, default=1024, help="width of the random model")
    parser.add_argument("--dtype", help="of weights and arithmetic, for both; what this CPU multiplies")
    parser.add_argument("--cache-format", help="bf16 or int8, for ours; as the model if none")
    parser.add_argument("--context", type=int, nargs="+", default=[1024, 4096, 16384])
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--shared", type=int, default=2048, help="tokens of the shared prefix")
    parser.add_argument("--tokens", type=int, default=32, help="to decode per request")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--space", type=int, default=2, help="GiB for each cache")
    parser.add_argument("--compile", action="store_true", help="let vLLM compile the model (both)")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--answers", type=int, help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.worker:
        worker(json.loads(chosen.worker), chosen.answers)
        return
    if chosen.tokens < 2:
        parser.error("--tokens: expected 2 or more: decoding is timed from the first one on")
    # vLLM's linear layers take seconds per token in bf16 on a CPU without such products.
    chosen.dtype = chosen.dtype or ("bfloat16" if computes_in_half("cpu") else "float32")
    if chosen.quick:
        chosen.context, chosen.requests, chosen.shared, chosen.tokens = [64, 256], [1, 2], 128, 4
        chosen.turns, chosen.layers, chosen.space, chosen.hidden = 1, 1, 1, 256
    cases = [
        Case(context, requests, shared)
        for context in chosen.context
        for requests in chosen.requests
        for shared in sorted({0, chosen.shared})
        if shared < context
    ]
    if chosen.shared:  # another question about the same document
        cases.append(Case(chosen.shared + chosen.shared // 16, 1, chosen.shared))
    with tempfile.TemporaryDirectory() as folder:
        path = chosen.model or make_model(Path(folder), chosen.layers, chosen.hidden)
        heads = json.loads((Path(path) / "config.json").read_text())["num_attention_heads"]
        options = {
            "model": path,
            "dtype": chosen.dtype,
            "max_model_len": max(case.context for case in cases) + chosen.tokens,
            "enforce_eager": not chosen.compile,
            "skip_tokenizer_init": True,
        }
        space = {"VLLM_CPU_KVCACHE_SPACE": str(chosen.space)}
        ours = {"MLA_CACHE_FORMAT": chosen.cache_format} if chosen.cache_format else {}
        with contextlib.ExitStack() as stack:
            engines = []
            for name, more, environment in (
                (STOCK, vllm.stock_options(chosen.dtype), {**space, **vllm.STOCK}),
                (OURS, {}, {**space, **ours}),
            ):
                engines.append(Engine(name, {**options, **more}, environment))
                stack.callback(engines[-1].close)
            difference = same_answers(engines, min(min(chosen.context), 300))
            rows = [run_case(case, engines, chosen, heads) for case in cases]
    if chosen.json:
        print(json.dumps({"machine": timing.machine(), "difference": difference, "rows": rows}))
    else:
        show(rows, difference, chosen)


def run_case(case: Case, engines: list[Engine], chosen: Any, heads: int) -> dict[str, Any]:
    row: dict[str, Any] = {"case": case.name, **asdict(case), "results": {}}
    reason = too_large(case, heads)
    taking_part = [each for each in engines if each.name == OURS or not reason]
    if reason:
        row["note"] = f"{STOCK} {reason}"
    samples: dict[str, list[dict[str, float]]] = {each.name: [] for each in taking_part}
    for turn in range(chosen.turns):
        for each in taking_part:
            samples[each.name].append(measure(each, case, chosen.tokens, turn))
    for name, found in samples.items():
        row["results"][name] = {key: statistics.median(each[key] for each in found) for key in found[0]}
    return row


def show(rows: list[dict[str, Any]], difference: float, chosen: Any) -> None:
    table = []
    for row in rows:
        stock, ours = (row["results"].get(name) for name in (STOCK, OURS))
        for key, unit in (("first_alone_s", "s"), ("first_s", "s"), ("decode_tokens_per_s", "tokens/s")):
            if key not in ours:
                continue
            quotient = None if stock is None else stock[key] / ours[key]
            better = quotient if quotient is None or unit == "s" else 1 / quotient
            words = {
                "first_alone_s": "first token, prefix new",
                "first_s": "first token",
                "decode_tokens_per_s": "decode",
            }
            table.append(
                (
                    row["case"],
                    words[key],
                    "-" if stock is None else f"{stock[key]:.3f} {unit}",
                    f"{ours[key]:.3f} {unit}",
                    "-" if better is None else f"{better:.1f}",
                )
            )
    timing.print_table(
        f"Medians of {chosen.turns} turns, {chosen.dtype}, cache {chosen.cache_format or 'as the model'}",
        ["case", "what", STOCK, OURS, "times better"],
        table,
        left=2,
    )
    for row in rows:
        if "note" in row:
            print(f"{row['case']}: {row['note']}")
    print(f"answers compared first: log-probabilities differ by at most {difference:.3f}")
    print(timing.describe(timing.machine()))


if __name__ == "__main__":
    main()
