"""An absorbed model beside the same weights in llama.cpp: seconds of a prompt, milliseconds of a token.

    make llama           # sets up build/llama, which has llama.cpp as a wheel, and runs this

Random weights in bf16, caches in bf16, two forms of llama.cpp's attention (flash and not), all in turns. The
first token's log-probabilities are compared first: where they differ by more than rounding, no figure is
printed.
"""

import argparse
import contextlib
import json
import random
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import timing
from benchmarks.contender import Contender
from benchmarks.model import build
from examples.demo import find_model
from mla import LatentCache, absorb
from mla.integrations.loading import load_tokenizer

PYTHON = Path("build/llama/bin/python")
WORKER = Path(__file__).with_name("llama_worker.py")
FLASH, PLAIN, OURS = "llama.cpp, flash", "llama.cpp", "absorbed"
# Log-probabilities of two runs in bf16 that mean the same.
TOLERANCE = 0.15
# A form that needs longer for a prompt than the others for all theirs is not asked about longer ones.
PATIENCE = 60.0


def write_model(folder: Path, python: Path, context: int, layers: int, hidden: int) -> tuple[Any, Path]:
    """A random model and its GGUF file."""
    tokenizer = load_tokenizer(str(find_model()))
    # llama.cpp asks every DeepSeek but V2-Lite for a query of low rank.
    sizes = {"vocab_size": len(tokenizer), "hidden_size": hidden, "intermediate_size": 2 * hidden}
    # All layers are dense; llama.cpp looks at the fields of experts all the same.
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 1, "n_group": 1, "topk_group": 1}
    model = build(layers, 16, context, torch.bfloat16, q_lora_rank=512, **experts, **sizes)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    file = folder / "model.gguf"
    command = [python, WORKER, "convert", folder, "--outfile", file, "--outtype", "bf16"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode or not file.exists():
        raise SystemExit(f"llama.cpp's converter failed:\n{(done.stderr or done.stdout)[-4000:]}")
    return absorb(model), file


@torch.no_grad()
def ours(model: Any, prompt: list[int], tokens: int) -> dict[str, Any]:
    """The same figures as ``llama_worker.serve``."""
    cache = LatentCache(model.config, capacity=len(prompt) + tokens)
    started = time.perf_counter()
    logits = model(torch.tensor([prompt]), past_key_values=cache, logits_to_keep=1).logits[0, -1]
    prefilled = time.perf_counter()
    best = logits.float().log_softmax(-1).topk(50)
    token, steps = best.indices[:1], []
    for _ in range(tokens - 1):
        at = time.perf_counter()
        token = model(token[None], past_key_values=cache).logits[0, -1].argmax(-1, keepdim=True)
        steps.append(time.perf_counter() - at)
    return {
        "prefill_s": prefilled - started,
        "decode_s": statistics.fmean(steps),  # as llama.cpp counts
        "logprobs": dict(zip(best.indices.tolist(), best.values.tolist(), strict=True)),
    }


def difference(theirs: dict[str, float], mine: dict[int, float]) -> float:
    """The largest difference of log-probabilities of llama.cpp's five likeliest tokens.

    Raises:
        SystemExit: a difference beyond rounding.
    """
    lost = [token for token in theirs if int(token) not in mine]
    worst = max(abs(value - mine.get(int(token), float("-inf"))) for token, value in theirs.items())
    if lost or worst > TOLERANCE:
        raise SystemExit(f"log-probabilities differ by {worst:.3f}, expected at most {TOLERANCE}: no figures")
    return worst


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.llama_cpp", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--context", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=32, help="to decode")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--python", type=Path, default=PYTHON, help="an interpreter that has xllamacpp")
    timing.add_common_options(parser)
    chosen = parser.parse_args(arguments)
    if not chosen.python.exists():
        parser.error(f"--python: expected an interpreter that has xllamacpp, got {chosen.python}; make llama")
    if chosen.threads:
        torch.set_num_threads(chosen.threads)
    longest = max(chosen.context) + chosen.tokens
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        model, file = write_model(Path(folder), chosen.python, longest, chosen.layers, chosen.hidden)
        peers = {}
        for name, more in ((FLASH, ["--flash"]), (PLAIN, [])):
            command = [str(chosen.python), str(WORKER), "serve", str(file), "--context", str(longest + 64)]
            command += ["--threads", str(torch.get_num_threads()), *more]
            peers[name] = Contender(name, command, {})
            stack.callback(peers[name].close)
        rows, worst = {}, 0.0
        for context in sorted(chosen.context):
            rows[context], off = measure(model, peers, context, chosen.tokens, chosen.turns)
            worst = max(worst, off)
            for name in [name for name in peers if rows[context][name]["prefill_s"] > PATIENCE]:
                del peers[name]
    if chosen.json:
        print(json.dumps({"machine": timing.machine(), "difference": worst, "contexts": rows}))
        return
    show(rows)
    print(f"answers compared first: log-probabilities differ by at most {worst:.3f}")
    print(timing.describe(timing.machine()))


def measure(
    model: Any, peers: dict[str, Contender], context: int, tokens: int, turns: int
) -> tuple[dict[str, dict[str, float]], float]:
    """Medians of each contender, and how far the log-probabilities lie apart."""
    rng = random.Random(context)
    prompt = [rng.randrange(100, 40_000) for _ in range(context)]
    mine = ours(model, prompt, 2)["logprobs"]
    samples: dict[str, list[dict[str, Any]]] = {name: [] for name in (*peers, OURS)}
    worst = 0.0
    for _ in range(turns):
        for name, peer in peers.items():
            samples[name].append(peer.ask({"prompt": prompt, "tokens": tokens}))
            worst = max(worst, difference(samples[name][-1]["logprobs"], mine))
        samples[OURS].append(ours(model, prompt, tokens))
    return {
        name: {key: statistics.median(each[key] for each in found) for key in ("prefill_s", "decode_s")}
        for name, found in samples.items()
    }, worst


def show(rows: dict[int, dict[str, dict[str, float]]]) -> None:
    table = []
    for context, row in rows.items():
        cells = [str(context)]
        for key, scale, unit in (("prefill_s", 1.0, "s"), ("decode_s", 1e3, "ms")):
            found = {name: row[name][key] if name in row else None for name in (FLASH, PLAIN, OURS)}
            cells += ["-" if each is None else f"{each * scale:.2f} {unit}" for each in found.values()]
            theirs = [each for name, each in found.items() if name != OURS and each is not None]
            cells.append(f"{min(theirs) / row[OURS][key]:.1f}" if theirs else "-")
        table.append(cells)
    timing.print_table(
        "prefill of one prompt, then decoding per token; times: of llama.cpp's faster form",
        [
            "context",
            *(
                f"{what} {how}"
                for what in ("prefill", "decode")
                for how in ("flash", "plain", "ours", "times")
            ),
        ],
        table,
        left=0,
    )


if __name__ == "__main__":
    main()
