"""From a config.json to the numbers the formulas take: groups of like layers, and what lies beside them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mla.budget import Budget, choose_budget
from mla.config import MLAConfig
from mla.errors import MLAError
from mla.families import (
    ALIASES,
    FAMILIES,
    LAYER_KINDS,
    attention_of,
    find_family,
    text_part,
)
from mla.plan.layers import windows
from mla.plan.weight_format import stored_formats
from mla.plan.weights import linear_attention, parameters
from mla.reading import expect_int, integer, usual_names

Raw = Mapping[str, Any]
#: Key-value heads of the GQA column, where the model has no grouping of its own (Llama 3, Qwen 3, Mistral).
DEFAULT_GROUPS = 8
_LLAMA4 = {
    "head_dim": 128,
    "attention_chunk_size": 8192,
    "intermediate_size_mlp": 16384,
    "interleave_moe_layer_step": 1,
}
_GEMMA3 = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "vocab_size": 262208}
_GEMMA3 |= {"max_position_embeddings": 131072}
#: What the classes of models without latents take where a config.json is silent and people leave it so.
_CLASS_DEFAULTS: Mapping[str, Raw] = {
    "afmoe": {"sliding_window": 1024, "head_dim": 128},
    "cohere2": {"sliding_window": 4096},
    "ernie4_5": {"head_dim": 128},
    "ernie4_5_moe": {"moe_layer_interval": 1, "moe_layer_start_index": 1, "moe_num_shared_experts": 2},
    "exaone4": {"sliding_window": 4096},
    "falcon": {"max_position_embeddings": 2048},
    "gemma": {"head_dim": 256},
    "gemma2": {"sliding_window": 4096, "head_dim": 256},
    "gemma3": {"sliding_window": 4096, **_GEMMA3},
    "gemma3_text": {"sliding_window": 4096, **_GEMMA3},
    "glm": {"head_dim": 128},
    "glm4": {"head_dim": 128},
    "gpt_oss": {"sliding_window": 128, "head_dim": 64},
    "helium": {"head_dim": 128},
    "hunyuan_v1_moe": {"num_shared_expert": 1},
    "llama4": _LLAMA4,
    "llama4_text": _LLAMA4,
    "minimax_m2": {"head_dim": 128},
    "ministral": {"sliding_window": 4096},
    "ministral3": {"head_dim": 128},
    "mistral": {"sliding_window": 4096},
    "olmo3": {"sliding_window": 4096},
    "qwen2": {"sliding_window": 4096},
    "qwen3": {"sliding_window": 4096, "head_dim": 128},
    "qwen3_moe": {"sliding_window": 4096},
    "qwen3_5": {"head_dim": 256},
    "qwen3_5_moe": {"head_dim": 256},
    "qwen3_5_moe_text": {"head_dim": 256},
    "qwen3_5_text": {"head_dim": 256},
    "qwen3_next": {"head_dim": 256},
    "seed_oss": {"head_dim": 128},
    "vaultgemma": {"sliding_window": 4096, "head_dim": 256},
}


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What the planner knows about a model.

    ``kind``: "MLA", "MHA", "GQA" or "MQA", as published. ``groups``: one dictionary per group of like layers,
    the main one first; ``inputs``: numbers of the whole model (names: :mod:`mla.plan.storage`).
    ``max_context``: tokens that the model is made for, None where neither config.json nor class says.
    ``weight_format``: a name of ``WEIGHT_BYTES``, or else what the config.json says that is none of them;
    ``other_format``: that of everything beside the routed experts, where checkpoints quantise only these.
    ``notes``: what a reader must know to read the figures.
    """

    name: str
    kind: str
    groups: tuple[dict[str, float], ...]
    inputs: dict[str, float]
    max_context: int | None
    weight_format: str
    other_format: str
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
    if rank is not None:
        expect_int("--rank", rank, least=1)
    if _is_latent(text):
        config = MLAConfig.from_dict(raw)
        full = {**find_family(text).defaults, **text}
        groups, linear_layers = _latent_groups(config, full, notes)
        if rank is not None:
            # Groups with another rank keep their proportion to the main one, as on the page.
            scale = rank / groups[0]["r"]
            groups = [{**group, "r": max(1, int(group["r"] * scale + 0.5))} for group in groups]
        kind, hidden, layers = "MLA", config.hidden_size, config.num_hidden_layers
        latest = config.max_position_embeddings if "max_position_embeddings" in full else None
    else:
        full = usual_names({**_CLASS_DEFAULTS.get(str(text.get("model_type")), {}), **text})
        groups, linear_layers = _classic_groups(full, notes, rank)
        kind = attention_of(full).split(" ")[0]
        hidden, layers = full["hidden_size"], full["num_hidden_layers"]
        told = full.get("max_position_embeddings")
        latest = None if told is None else expect_int("max_position_embeddings", told, least=1)
    if any(group["window"] == 1 for group in groups):
        raise MLAError("sliding_window: expected at least 2 tokens, got 1: such a layer has no cache to plan")
    inputs = {
        "d": hidden,
        "latent": float(kind == "MLA"),
        **parameters(full, layers=layers, notes=notes),
        **linear_attention(full, layers=linear_layers, hidden=hidden),
        "mtp_layers": integer(full, "num_nextn_predict_layers", "num_mtp_layers", default=0),
    }
    _tell_layers(groups, inputs, notes)
    formats = stored_formats(raw, text, layers=layers, experts=inputs["experts"] > 0, notes=notes)
    return Shape(
        name=name,
        kind=kind,
        groups=tuple(groups),
        inputs=inputs,
        max_context=latest,
        weight_format=formats[0],
        other_format=formats[1],
        source=source,
        notes=tuple(notes),
    )


def _is_latent(text: Raw) -> bool:
    # DeepSeek-OCR's language model is a DeepSeek-V2 without latents.
    if text.get("use_mla") is False:
        return False
    return bool(text.get("kv_lora_rank")) or str(text.get("model_type")) in {*FAMILIES, *ALIASES}


def _latent_groups(
    config: MLAConfig, full: dict[str, Any], notes: list[str]
) -> tuple[list[dict[str, float]], int]:
    family = find_family(full)
    if family.attentions_per_block:
        full["num_hidden_layers"] = config.num_hidden_layers
    kinds = list(family.layer_types(full))[: config.num_hidden_layers]
    indexer = dict(family.indexer)
    if config.indexer_layers:
        indexer = {name: integer({**indexer, **full}, name, least=1) for name in indexer}
    found: dict[tuple[Any, ...], dict[str, float]] = {}
    for layer in (i for i, kind in enumerate(kinds) if LAYER_KINDS[kind]):
        own = config.at_layer(layer)
        sparse = indexer["index_topk"] if kinds[layer] == "indexed_attention" else 0
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
                "index_heads": indexer["index_n_heads"],
                "index_pool": indexer["index_kpool"],
                "index_dim": indexer["index_head_dim"],
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


def _classic_groups(
    full: dict[str, Any], notes: list[str], rank: int | None
) -> tuple[list[dict[str, float]], int]:
    seen = windows(full, notes)
    h, hidden = integer(full, "num_attention_heads", least=1), integer(full, "hidden_size", least=1)
    kv = integer(full, "num_key_value_heads", least=1)
    if h % kv:
        raise MLAError(f"num_key_value_heads: expected a divisor of {h} heads, got {kv}")
    width = expect_int("head_dim", integer(full, "head_dim", default=hidden // h), least=1)
    if integer(full, "v_head_dim", default=0) not in (0, width):
        raise MLAError(f"v_head_dim: expected the keys' width of {width}, got {full['v_head_dim']!r}")
    softmax = [window for window in seen if window is not None]
    if not softmax:
        raise MLAError("layer_types: expected at least one layer of softmax attention")
    half = converted(kv, width, hidden)
    sizes = half if rank is None else converted(kv, width, hidden, rank)
    groups: list[dict[str, float]] = [
        {
            "layers": count,
            "stores": count,
            "indexers": 0,
            "h": h,
            "n": width,
            "p": sizes.rope,
            "v": width,
            "r": sizes.rank,
            "r0": half.rank,
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
        for window, count in sorted(Counter(softmax).items())
    ]
    chosen = "at half its cache" if rank is None else "for the rank asked for"
    notes.append(
        f"Not an MLA model: the MLA column has the sizes that `mla convert` chooses {chosen} (rank "
        f"{sizes.rank}, rotary key {sizes.rope}); --rank chooses another. Which models `mla convert` "
        "converts, and what that costs in quality: docs/conversion.md."
    )
    return groups, len(seen) - len(softmax)


def converted(kv: int, width: int, hidden: int, rank: int | None = None) -> Budget:
    """What ``mla convert`` makes of ``kv`` key-value heads of ``width``: at half their cache, or at a rank.

    Raises:
        MLAError: a rank whose cache is larger than the model's own.
    """
    # The rotary base changes no size.
    return choose_budget(
        cache=0.5 if rank is None else None,
        rank=rank,
        rope=None,
        groups=kv,
        head_dim=width,
        hidden=hidden,
        theta=1e4,
    )


def _tell_layers(groups: list[dict[str, float]], inputs: Mapping[str, float], notes: list[str]) -> None:
    if linear := int(inputs["linear_layers"]):
        softmax = int(sum(group["layers"] for group in groups))
        notes.append(f"Hybrid: {softmax} attention layers have a cache, {linear} linear ones a fixed state.")
    for group in groups:
        if group["window"]:
            notes.append(f"{int(group['layers'])} layers see a window of {int(group['window']):,} tokens.")
        if group["topk"]:
            notes.append(
                f"Sparse: {int(group['layers'])} layers attend to {int(group['topk']):,} tokens that an "
                f"indexer picks; {int(group['indexers'])} of them cache {int(group['index_width'])} indexer "
                "numbers per token. Every column keeps windows and indexer."
            )
        if shared := int(group["layers"] - group["stores"]):
            notes.append(f"{shared} layers read another layer's cache and keep none.")
