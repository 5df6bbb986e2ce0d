"""From a config.json to the numbers the formulas take: groups of like layers, and what lies beside them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mla.config import MLAConfig
from mla.errors import MLAError
from mla.families import ALIASES, FAMILIES, LAYER_KINDS, attention_of, find_family, text_part
from mla.plan.weights import linear_attention, parameters

Raw = Mapping[str, Any]
#: Key-value heads of the GQA column, where the model has no grouping of its own (Llama 3, Qwen 3, Mistral).
DEFAULT_GROUPS = 8
#: What Transformers' classes take where a config.json names no indexer sizes.
_INDEXER = {"index_topk": 2048, "index_head_dim": 128, "index_n_heads": 64}
_INDEX_HEADS = {"glm_moe_dsa": 32, "mistral_large4": 32, "glm5_next": 32, "axk2": 16, "hy_v4": 16}
#: Tokens that share one key of the indexer, where a family pools them and its config.json does not say.
_INDEX_POOL = {"glm5_next": 16, "glm5_next_text": 16}


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What the planner knows about a model.

    ``kind``: "MLA", "MHA", "GQA" or "MQA", as published. ``groups``: one dictionary per group of like layers,
    the main one first; ``inputs``: numbers of the whole model (names: :mod:`mla.plan.storage`). ``notes``:
    what a reader must know to read the figures.
    """

    name: str
    kind: str
    groups: tuple[dict[str, float], ...]
    inputs: dict[str, float]
    max_context: int
    weight_format: str
    source: str
    notes: tuple[str, ...] = field(default=())


def read_shape(raw: Raw, *, name: str, source: str, rank: int | None = None) -> Shape:
    """The shape of a model, MLA or not, from the contents of its config.json.

    Args:
        raw: the config.json; a wrapper's ``text_config`` is found.
        name: shown to people. ``source``: where the config comes from.
        rank: latent rank of the MLA column, instead of the model's own or of the conversion rule.

    Raises:
        MLAError: no attention, or layers that the planner cannot count.
    """
    text = text_part(raw)
    notes: list[str] = []
    if _is_latent(text):
        config = MLAConfig.from_dict(raw)
        full = {**find_family(text).defaults, **text}
        groups, linear_layers = _latent_groups(config, full, notes)
        kind, hidden, latest = "MLA", config.hidden_size, config.max_position_embeddings
        layers = config.num_hidden_layers
    else:
        full = _usual_names(text)
        groups, linear_layers = _classic_groups(full, notes)
        kind = attention_of(full).split(" ")[0]
        hidden, layers = int(full["hidden_size"]), int(full["num_hidden_layers"])
        latest = int(full.get("max_position_embeddings") or 4096)
    if rank is not None:
        if rank < 1:
            raise MLAError(f"--rank: expected at least 1, got {rank}")
        groups = [{**group, "r": rank} for group in groups]
    inputs = {
        "d": hidden,
        "latent": float(kind == "MLA"),
        **parameters(full, layers=layers, notes=notes),
        **linear_attention(full, layers=linear_layers, hidden=hidden),
        "mtp_layers": int(full.get("num_nextn_predict_layers") or full.get("num_mtp_layers") or 0),
    }
    _tell_layers(groups, inputs, notes)
    return Shape(
        name=name,
        kind=kind,
        groups=tuple(groups),
        inputs=inputs,
        max_context=latest,
        weight_format=_weight_format(raw, text),
        source=source,
        notes=tuple(notes),
    )


def _is_latent(text: Raw) -> bool:
    return bool(text.get("kv_lora_rank")) or text.get("model_type") in {*FAMILIES, *ALIASES}


def _latent_groups(
    config: MLAConfig, full: dict[str, Any], notes: list[str]
) -> tuple[list[dict[str, float]], int]:
    family = find_family(full)
    if family.attentions_per_block and "num_layers" in full:
        full["num_hidden_layers"] = config.num_hidden_layers
    kinds = list(family.layer_types(full))[: config.num_hidden_layers]
    topk = int(full.get("index_topk", _INDEXER["index_topk"])) if config.indexer_layers else 0
    model_type = str(full.get("model_type"))
    heads = _INDEX_HEADS.get(ALIASES.get(model_type, model_type), _INDEXER["index_n_heads"])
    found: dict[tuple[Any, ...], dict[str, float]] = {}
    for layer in (i for i, kind in enumerate(kinds) if LAYER_KINDS[kind]):
        own = config.at_layer(layer)
        sparse = topk if kinds[layer] == "indexed_attention" else 0
        window = own.sliding_window or 0
        dims = (
            own.num_attention_heads,
            own.qk_nope_head_dim,
            own.qk_rope_head_dim,
            own.v_head_dim,
            own.kv_lora_rank,
            own.q_lora_rank or 0,
        )
        h, n, p, v, r, q = dims
        group = found.setdefault(
            (*dims, window, sparse),
            {
                "layers": 0,
                "stores": 0,
                "indexers": 0,
                "h": h,
                "n": n,
                "p": p,
                "v": v,
                "r": r,
                "r0": r,
                "q_rank": q,
                "w": n or p,
                "groups": min(DEFAULT_GROUPS, h),
                "own_groups": h,
                "window": window,
                "topk": sparse,
                "index_width": config.indexer_width,
                "index_heads": int(full.get("index_n_heads", heads)),
                "index_pool": int(full.get("index_kpool", _INDEX_POOL.get(model_type, 1))),
                "index_dim": int(full.get("index_head_dim") or _INDEXER["index_head_dim"]),
            },
        )
        group["layers"] += 1
        group["stores"] += layer in config.mla_layers
        group["indexers"] += layer in config.indexer_layers
    groups = sorted(found.values(), key=lambda g: (g["window"] > 0, -g["layers"]))
    if h_odd := [int(g["h"]) for g in groups if g["h"] % g["groups"]]:
        notes.append(
            f"GQA is shown with {DEFAULT_GROUPS} key-value heads, though {h_odd[0]} query heads do not "
            "divide into them evenly: a model built so would take another number."
        )
    return groups, sum(not LAYER_KINDS[kind] for kind in kinds)


def _classic_groups(full: dict[str, Any], notes: list[str]) -> tuple[list[dict[str, float]], int]:
    for key in ("num_attention_heads", "num_hidden_layers", "hidden_size"):
        if not isinstance(full.get(key), int) or full[key] < 1:
            raise MLAError(f"{key}: expected an integer of at least 1 in config.json, got {full.get(key)!r}")
    h, layers = full["num_attention_heads"], full["num_hidden_layers"]
    kv = full.get("num_key_value_heads") or h
    if h % kv:
        raise MLAError(f"num_key_value_heads: expected a divisor of {h} heads, got {kv}")
    width = full.get("head_dim") or full["hidden_size"] // h
    rank, rope = conversion_rule(kv, width, full["hidden_size"])
    kinds = _classic_kinds(full, layers)
    windows = [int(full.get("sliding_window") or 0) if kind == "sliding_attention" else 0 for kind in kinds]
    softmax = [i for i, kind in enumerate(kinds) if kind != "linear_attention"]
    if not softmax:
        raise MLAError("layer_types: expected at least one layer of softmax attention")
    groups: list[dict[str, float]] = [
        {
            "layers": count,
            "stores": count,
            "indexers": 0,
            "h": h,
            "n": width,
            "p": rope,
            "v": width,
            "r": rank,
            "r0": rank,
            "q_rank": 0,
            "w": width,
            "own_groups": kv,
            "groups": kv if 1 < kv < h else min(DEFAULT_GROUPS, h),
            "window": window,
            "topk": 0,
            "index_width": 0,
            "index_heads": 0,
            "index_dim": 0,
            "index_pool": 1,
        }
        for window in sorted({windows[i] for i in softmax})
        if (count := sum(windows[i] == window for i in softmax))
    ]
    notes.append(
        f"Not an MLA model: the MLA column is what `mla convert` makes of it at half its cache (rank {rank}, "
        f"rotary key {rope}); --rank chooses another. What that costs in quality: docs/conversion.md."
    )
    return groups, layers - len(softmax)


def _classic_kinds(full: dict[str, Any], layers: int) -> list[str]:
    known = {"full_attention", "sliding_attention", "linear_attention"}
    kinds = full.get("layer_types")
    if kinds is None:
        windowed = full.get("sliding_window") and full.get("use_sliding_window", True) is not False
        kinds = ["sliding_attention" if windowed else "full_attention"] * layers
        if windowed and full.get("max_window_layers"):
            first = int(full["max_window_layers"])
            kinds = ["full_attention"] * min(first, layers) + kinds[first:]
    unknown = sorted(set(kinds) - known)
    if unknown or len(kinds) < layers:
        raise MLAError(
            f"layer_types: expected {layers} of {', '.join(sorted(known))}, got {len(kinds)}"
            + (f" with {', '.join(unknown)}" if unknown else "")
        )
    return list(kinds[:layers])


def conversion_rule(kv: int, width: int, hidden: int) -> tuple[int, int]:
    """Latent rank and rotary width that ``mla convert`` takes at half the cache of ``kv`` heads of ``width``.

    Source: docs/conversion.md; a test compares it with the converter.
    """
    half = kv * width
    rope = max(2, min(int(0.75 * width), half // 2) // 2 * 2)
    return min(half - rope, hidden), rope


def _usual_names(text: Raw) -> dict[str, Any]:
    """GPT-2's names for heads, layers and width, brought to those of everybody else."""
    renamed = {"n_head": "num_attention_heads", "n_layer": "num_hidden_layers", "n_embd": "hidden_size"}
    renamed["n_positions"] = "max_position_embeddings"
    full = {renamed.get(key, key): value for key, value in text.items()}
    if "n_embd" in text and not full.get("intermediate_size"):
        full["intermediate_size"] = text.get("n_inner") or 4 * text["n_embd"]
    if text.get("multi_query") is True:
        full.setdefault("num_key_value_heads", 1)
    return full


def _weight_format(raw: Raw, text: Raw) -> str:
    quantised = raw.get("quantization_config") or text.get("quantization_config")
    if isinstance(quantised, Mapping):
        method, bits = str(quantised.get("quant_method")), quantised.get("bits")
        if method == "fp8":
            return "fp8"
        if bits in (4, 8):
            return "int4" if bits == 4 else "int8"
    stored = str(text.get("torch_dtype") or text.get("dtype") or raw.get("torch_dtype") or "bfloat16")
    names = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
    return names.get(stored.removeprefix("torch."), "bf16")


def _tell_layers(groups: list[dict[str, float]], inputs: Mapping[str, float], notes: list[str]) -> None:
    if linear := int(inputs["linear_layers"]):
        softmax = int(sum(group["layers"] for group in groups))
        notes.append(f"Hybrid: {softmax} attention layers have a cache, {linear} linear ones a fixed state.")
    for group in groups:
        if group["window"]:
            notes.append(f"{int(group['layers'])} layers see a window of {int(group['window'])} tokens.")
        if group["topk"]:
            notes.append(
                f"Sparse: {int(group['layers'])} layers attend to {int(group['topk'])} tokens an indexer "
                f"picks; {int(group['indexers'])} of them cache {int(group['index_width'])} indexer numbers "
                "per token. Every column keeps windows and indexer."
            )
        if shared := int(group["layers"] - group["stores"]):
            notes.append(f"{shared} layers read another layer's cache and keep none.")
    if mtp := int(inputs["mtp_layers"]):
        notes.append(f"{mtp} multi-token-prediction layer(s): counted apart, only a drafter runs them.")
