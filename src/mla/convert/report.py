"""What a conversion did and what it cost: the page report.html and the model card, from the same facts.

The facts are those of report.json (saving.py writes all three). Parts that were not measured are null or
absent there and are left out here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mla.convert import drawing
from mla.convert.drawing import Chart, Series
from mla.convert.promise import Promise


def page(facts: Mapping[str, Any]) -> str:
    """One self-contained HTML page: what was done, what it cost in quality, how to load the result.

    Args:
        facts: as in report.json; "source", "dims", "dtype" and "versions" must be there.
    """
    source = facts["source"]
    parts = [
        f"<h1>{drawing.text(_short(source))}, converted to Multi-head Latent Attention</h1>",
        f"<p>{drawing.text(summary(facts))}</p>",
        drawing.cards(_cards(facts)),
        '<div class="charts">',
        drawing.figure("The figures", drawing.table([], figures(facts)), _measured_on(facts), across=True),
        *_charts(facts),
        drawing.figure("Dimensions", drawing.table([], _dimensions(facts))),
        *([] if facts.get("command") is None else [_how(facts["command"])]),
        '<section class="across"><h2>How to load it</h2>' + _loading() + "</section>",
        "</div>",
        f"<footer>{drawing.text(_footer(facts))}</footer>",
    ]
    return drawing.frame(f"{_short(source)}: converted to MLA", "\n".join(parts))


def card(name: str, facts: Mapping[str, Any]) -> str:
    """The model card README.md of the folder ``name``, in Markdown."""
    rows = "\n".join(f"| {label} | {value} |" for label, value in figures(facts))
    measured = _measured_on(facts)
    return f"""---
library_name: transformers
pipeline_tag: text-generation
{_origin(facts)}tags: [mla, multi-head-latent-attention, converted]
---

# {name}

{summary(facts)}
{_made(facts)}
Everything but the attention is the original model's, with its constants rescaled to the stock
`DeepseekV3ForCausalLM` layout: `AutoModelForCausalLM.from_pretrained` loads it, no remote code is needed.
{_biases(facts)}
| | |
|---|---|
{rows}

{measured}

`report.html` shows the same with drawings, `report.json` has every figure.

Unless the original has one key-value head and kept all of its rotary dimensions, the conversion is an
approximation: answers differ from the original's, and more so on text unlike the calibration text. Measure
before you rely on it. Run it in bfloat16 or float32; float16 cannot hold the folded latent norm. The original
model's licence applies.
"""


def _origin(facts: Mapping[str, Any]) -> str:
    """Lines of the card's front matter: the original where the Hub has it, its licence where known."""
    names = ("base_model", "license")
    return "".join(f"{name}: {facts[name]}\n" for name in names if facts.get(name) is not None)


def _made(facts: Mapping[str, Any]) -> str:
    """The command for the card; nothing where it is not known."""
    command = facts.get("command")
    return "" if command is None else f"\n```\n{command}\n```\n"


def _biases(facts: Mapping[str, Any]) -> str:
    """A paragraph for the card where the original has biases; nothing elsewhere."""
    if not facts["dims"].get("biases"):
        return ""
    return """
The original has biases, and so has the result (`attention_bias`). Transformers holds them; vLLM has no place
for them in its DeepSeek and would leave them out: do not serve this model with it.
"""


def summary(facts: Mapping[str, Any]) -> str:
    """What was done, in one sentence of plain text."""
    dims = facts["dims"]
    cached = dims["cached_numbers_per_token_and_layer"]
    original = dims.get("original_numbers_per_token_and_layer")
    instead = "" if original is None else f" instead of {original:,} ({cached / original - 1:+.1%})"
    said = (
        f"The attention of {facts['source']} was converted to Multi-head Latent Attention: per token and "
        f"layer it caches {cached:,} numbers{instead}, a latent of rank {dims['rank']:,} and one rotary key "
        f"of {dims['rope']:,} dimensions that all heads share"
    )
    calibration = facts.get("calibration")
    if calibration is not None:
        which = " and ".join(
            "that the model wrote itself" if text == "self" else f"of {text}" for text in calibration["texts"]
        )
        said += (
            f"; calibrated on {calibration['windows']:,} windows of {calibration['window']:,} tokens {which} "
            f"(seed {calibration['seed']})"
        )
    heal = facts.get("heal")
    if heal is None:
        return f"{said}; each block was fitted to the original's, the model as a whole was not trained."
    return (
        f"{said}; then healed for {_duration(heal['seconds'])} against the original "
        f"({heal['tokens']:,} tokens)."
    )


def figures(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The figures that people ask for first, as (what, value) in plain text."""
    rows: list[tuple[str, str]] = []
    size = facts.get("cache_bytes_per_token")
    if size is not None:
        share = size["converted"] / size["original"]
        rows.append(("cache per token, original", f"{size['original']:,} bytes"))
        rows.append(("cache per token, converted", f"{size['converted']:,} bytes ({share:.1%})"))
    quality = facts.get("quality")
    if quality is not None:
        teacher, student = quality["teacher_perplexity"], quality["perplexity"]
        rows += [
            ("perplexity, original", f"{teacher:.3f}"),
            ("perplexity, converted", f"{student:.3f} ({student / teacher - 1:+.1%})"),
            ("KL(original ‖ converted)", f"{quality['kl']:.4f} nats per token"),
            ("same most likely token", f"{quality['top1']:.1%}"),
        ]
    promise = facts.get("promise")
    if promise is not None:
        asked = Promise(promise["max_kl"], promise["max_ppl_increase"])
        kept = "kept" if promise["kept"] else "not kept"
        rows.append((f"promised: {asked}", f"{kept} on {_promised_on(promise['seen_windows'], quality)}"))
    decoded = facts.get("decoding")
    if decoded is not None:
        count = decoded["prompts"] * decoded["tokens"]
        told = f"{decoded['agreement']:.1%} of {count}"
        rows.append(("tokens decoded on the cache that the full pass finds, too", told))
    heal = facts.get("heal")
    if heal is not None:
        change = f"{heal['kl_before']:.4f} to {heal['kl_after']:.4f} nats per token"
        rows.append(("KL while healing, on the windows that also chose the weights", change))
    errors = facts.get("layer_errors")
    if errors:
        worst = max(range(len(errors)), key=lambda layer: errors[layer])
        rows.append(("output error of an attention block, mean", f"{sum(errors) / len(errors):.2%}"))
        rows.append(("output error of the worst block", f"{errors[worst]:.2%} (layer {worst})"))
    rows.append(("weights", str(facts["dtype"])))
    if facts.get("seconds") is not None:
        rows.append(("time of the run that finished", _duration(facts["seconds"])))
    return rows


def _promised_on(seen: int, quality: Mapping[str, Any] | None) -> str:
    """In words, on what a promise was tried: ``seen`` of the held-out windows hold text of the search."""
    if not seen:
        return "text that the search did not see"
    if quality is None or seen == quality["windows"]:
        return "text that the search has seen"
    return f"{quality['windows']} windows, {seen} of them with text that the search has seen"


def _cards(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    dims, quality = facts["dims"], facts.get("quality")
    cached = dims["cached_numbers_per_token_and_layer"]
    original = dims.get("original_numbers_per_token_and_layer")
    beside = "" if original is None else f" (original: {original:,})"
    found = [(f"{cached:,}", f"cached numbers per token and layer{beside}")]
    if quality is not None:
        teacher = quality["teacher_perplexity"]
        found += [
            (f"{quality['perplexity']:.2f}", f"perplexity (original: {teacher:.2f})"),
            (f"{quality['kl']:.3f}", "KL to the original, nats per token"),
            (f"{quality['top1']:.1%}", "of tokens: the same most likely next one"),
        ]
    return found


def _charts(facts: Mapping[str, Any]) -> list[str]:
    found = []
    quality = facts.get("quality")
    if quality is not None:
        found.append(
            drawing.figure(
                "Loss along the window",
                drawing.lines(_positions(quality)),
                "Mean of each equal part of the window. Where the lines draw apart towards the right, the "
                "result loses the thread of long texts.",
            )
        )
    errors = facts.get("layer_errors")
    if errors:
        found.append(
            drawing.figure(
                "Output error of every attention block",
                drawing.bars(
                    "Relative output error by layer", "layer", "share of the output's energy", errors
                ),
                "Squared difference from the original block's output over the original's own energy, on "
                "held-out text; each model on its own stream, so errors of earlier layers count.",
            )
        )
    heal = facts.get("heal")
    if heal is not None and heal["curve"]:
        curve = [(seconds / 60, kl) for seconds, kl in heal["curve"]]
        chart = Chart(
            "KL on held-out text while healing",
            "minutes",
            "KL, nats per token",
            [Series("KL", "mla", curve)],
            0.0,
        )
        found.append(
            drawing.figure(
                "Healing",
                drawing.lines(chart),
                "Measured on held-out text while the attention learns from the original; the best is kept.",
            )
        )
    return found


def _positions(quality: Mapping[str, Any]) -> Chart:
    def spread(values: list[float]) -> list[tuple[float, float]]:
        return [(quality["window"] * (part + 0.5) / len(values), value) for part, value in enumerate(values)]

    return Chart(
        label="Loss against position in the window, original and converted",
        x_label="position in the window, tokens",
        y_label="nats per token",
        series=[
            Series("original", "mha", spread(quality["teacher_nll_by_position"])),
            Series("converted", "mla", spread(quality["nll_by_position"])),
        ],
    )


def _dimensions(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    dims = facts["dims"]
    names = {
        "layers": "layers",
        "hidden": "hidden width d",
        "heads": "heads h",
        "rank": "latent rank r",
        "rope": "rotary key p",
        "nope": "query and key without position n, per head",
        "value": "value v, per head",
        "rope_theta": "rotary base θ",
        "cached_numbers_per_token_and_layer": "cached numbers per token and layer, r + p",
        "original_numbers_per_token_and_layer": "the original's",
    }
    return [(names[key], drawing.number(dims[key])) for key in names if dims.get(key) is not None]


def _measured_on(facts: Mapping[str, Any]) -> str:
    quality = facts.get("quality")
    if quality is None:
        return "Its quality was not measured: mla eval OUT --against ORIGINAL --text FILE does it."
    chosen = "" if facts.get("heal") is None else " Healing chose its weights on the same windows."
    return (
        f"Measured on {quality['tokens']:,} held-out tokens ({quality['text']}), {quality['windows']:,} "
        f"windows of {quality['window']:,}, both models in float32.{chosen}"
    )


def _how(command: str) -> str:
    return f'<section class="across"><h2>How it was made</h2><pre>{drawing.text(command)}</pre></section>'


def _loading() -> str:
    """OUT is the folder that holds the page: the page does not know what it will be called tomorrow."""
    stock = (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model = AutoModelForCausalLM.from_pretrained("OUT")\n'
        'tokenizer = AutoTokenizer.from_pretrained("OUT")'
    )
    absorbed = (
        f"{stock}\n\nfrom mla import absorb\n\nabsorb(model)  # decodes on the latents as they are cached"
    )
    shell = "mla generate OUT 'Hello'\nmla serve OUT"
    return (
        "<p>OUT is the folder that this page lies in. Stock software loads it, without remote code. In "
        f"Python, absorbed:</p><pre>{drawing.text(absorbed)}</pre>"
        f"<p>On the command line:</p><pre>{drawing.text(shell)}</pre>"
        "<p>bfloat16 and float32 both do; float16 cannot hold the folded latent norm.</p>"
    )


def _footer(facts: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    return f"Original: {facts['source']}. {versions}. Every figure: report.json beside this page."


def _short(source: str) -> str:
    """The last part of a path or a Hub id."""
    return source.rstrip("/\\").replace("\\", "/").rsplit("/", 1)[-1] or source


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
