"""What differs between the MLA families of Hugging Face Transformers, as data. Level 0: no torch.

One row per family. A row says what a ``config.json`` may leave out (the defaults of the family's class),
which conventions its code fixes (RoPE layout, epsilon of the latent norms, whether YaRN's mscale enters the
softmax scale) and which layers hold what in the cache. Source: ``configuration_*.py`` and ``modeling_*.py``
of Transformers 5.19 to 5.23.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from mla.errors import MLAError
from mla.reading import expect_int, expect_list, integer, section, usual_names

Raw = Mapping[str, Any]

#: Layer kinds of Transformers' ``layer_types`` and whether their cache slot holds a latent.
LAYER_KINDS: Mapping[str, bool] = MappingProxyType(
    {"full_attention": True, "indexed_attention": True, "sliding_attention": True, "linear_attention": False}
)


@dataclass(frozen=True, kw_only=True)
class Family:
    """One row of :data:`FAMILIES`.

    The callables receive the text part of the config.json with the class defaults filled in.
    """

    #: RoPE layout of the main attention; None where only the json's ``rope_interleave`` can tell.
    layout: str | None = "interleaved"
    #: Whether the code honours ``rope_interleave``; elsewhere a contradicting value is an error.
    reads_rope_interleave: bool = False
    defaults: Raw = field(default_factory=dict)
    default_theta: float = 10000.0
    #: RoPE parameters of a config.json that has none.
    rope_defaults: Raw = field(default_factory=dict)
    #: Epsilon of ``q_a_layernorm`` and ``kv_a_layernorm``. Most families build these norms without passing
    #: ``rms_norm_eps``, so they keep 1e-6 whatever the config says; None where it is passed.
    latent_norm_eps: float | None = 1e-6
    #: Whether ``scaling`` is multiplied by mscale(factor, mscale_all_dim) squared.
    yarn_scales_softmax: bool = True
    #: Our name -> the json's name, where they differ.
    renamed: Mapping[str, str] = field(default_factory=dict)
    #: Set where a block holds several attentions: the json's ``num_layers`` times this is the layer count.
    attentions_per_block: int | None = None
    #: Kind of every layer, one of :data:`LAYER_KINDS`.
    layer_types: Callable[[Raw], Sequence[str]]
    #: "full" (runs an indexer and caches its keys) or "shared" for every layer; None: no sparse indexer.
    indexer_types: Callable[[Raw], Sequence[str]] | None = None
    #: The indexer's sizes where a config.json does not say: :func:`_indexer`.
    indexer: Raw = field(default_factory=lambda: _indexer())
    #: Numbers an indexer caches per token.
    indexer_width: Callable[[Raw], int] = lambda raw: int(raw["index_head_dim"])
    #: For every layer, the layer whose latents it reads.
    kv_source_layers: Callable[[Raw], Sequence[int]] | None = None
    #: Layers whose attention has other dimensions: (layers, fields that differ) pairs.
    groups: Callable[[Raw, Sequence[str]], list[tuple[tuple[int, ...], dict[str, Any]]]] | None = None


def _layers(raw: Raw) -> range:
    return range(int(raw["num_hidden_layers"]))


def _for_each_layer(raw: Raw, key: str) -> list[Any] | None:
    """A list that says something of every layer, None where there is none; MLAError for anything else."""
    told = raw.get(key)
    return None if told is None or told == [] else expect_list(key, told, least=len(_layers(raw)))


def _every(kind: str) -> Callable[[Raw], Sequence[str]]:
    def rule(raw: Raw) -> Sequence[str]:
        return raw.get("layer_types") or [kind for _ in _layers(raw)]

    return rule


def _kimi_layer_types(raw: Raw) -> Sequence[str]:
    if raw.get("layer_types"):
        return list(raw["layer_types"])
    lists = section(raw, "linear_attn_config")
    if "full_attn_layers" in lists and "kda_layers" in lists:
        # The released checkpoints count layers from one here.
        told = expect_list("full_attn_layers", lists["full_attn_layers"], least=1)
        full = {expect_int("full_attn_layers", index, least=1) - 1 for index in told}
        return ["full_attention" if i in full else "linear_attention" for i in _layers(raw)]
    return ["full_attention" if i and i % 4 == 0 else "linear_attention" for i in _layers(raw)]


def _bailing_layer_types(raw: Raw) -> Sequence[str]:
    group = expect_int("layer_group_size", raw["layer_group_size"], least=1)
    return raw.get("layer_types") or [
        "full_attention" if (i + 1) % group == 0 else "linear_attention" for i in _layers(raw)
    ]


def _glm5_layer_types(raw: Raw) -> Sequence[str]:
    kinds = raw.get("layer_types") or [
        "indexed_attention" if i % 4 == 3 else "linear_attention" for i in _layers(raw)
    ]
    return ["indexed_attention" if kind == "full_attention" else kind for kind in kinds]


def _dots3_layer_types(raw: Raw) -> Sequence[str]:
    # Released checkpoints call the sparse layers "full_attention"; configurations saved by Transformers carry
    # per_layer_config and mean what they say.
    sparse = raw.get("use_dsa", None if "per_layer_config" in raw else True)
    kinds = raw.get("layer_types")
    if not kinds:
        main = "full_attention" if sparse is False else "indexed_attention"
        windows = raw.get("use_sliding_window", True)
        kinds = [main if not windows or i < 2 or i % 4 == 1 else "sliding_attention" for i in _layers(raw)]
    if sparse is None:
        return list(kinds)
    old, new = ("full_attention", "indexed_attention") if sparse else ("indexed_attention", "full_attention")
    return [new if kind == old else kind for kind in kinds]


def _dots3_groups(raw: Raw, kinds: Sequence[str]) -> list[tuple[tuple[int, ...], dict[str, Any]]]:
    layers = tuple(i for i, kind in enumerate(kinds) if kind == "sliding_attention")
    if not layers:
        return []
    names = ("num_attention_heads", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "v_head_dim")
    per_layer = section(raw, "per_layer_config")
    own = section({str(layer): own for layer, own in per_layer.items()}, str(layers[0]))
    head_dim = own.get("head_dim", raw["swa_head_dim"])
    fields = {name: own.get(name, raw["swa_" + name]) for name in names}
    rope_dim = own.get("qk_rope_head_dim", raw.get("swa_qk_rope_head_dim"))
    if rope_dim is None:
        head_dim = expect_int("swa_head_dim", head_dim, least=1)
        rope_dim = head_dim - expect_int("swa_qk_nope_head_dim", fields["qk_nope_head_dim"], least=0)
    fields["qk_rope_head_dim"] = expect_int("swa_qk_rope_head_dim", rope_dim, least=0)
    window = raw.get("sliding_window")
    fields["sliding_window"] = raw.get("sliding_window_size", 512) if window is None else window
    fields["rope_key"] = "sliding_attention"
    fields["rope_theta"] = raw.get("swa_rope_theta", 50000.0)
    return [(layers, fields)]


def _mistral_large4_groups(raw: Raw, kinds: Sequence[str]) -> list[tuple[tuple[int, ...], dict[str, Any]]]:
    interval = integer(raw, "no_rope_layer_interval", least=1, default=4)
    uses_rope = _for_each_layer(raw, "no_rope_layers") or [(i + 1) % interval for i in _layers(raw)]
    layers = tuple(i for i in _layers(raw) if not uses_rope[i])
    if not layers:
        return []
    # The layer keeps its head width and gives the rotary share to the part without position.
    nope = raw["qk_nope_head_dim"] + raw["qk_rope_head_dim"]
    return [(layers, {"qk_nope_head_dim": nope, "qk_rope_head_dim": 0})]


def _mistral_large4_sources(raw: Raw) -> Sequence[int]:
    sources = _for_each_layer(raw, "kv_source_layers") or list(_layers(raw))
    for layer in _layers(raw):
        source = expect_int("kv_source_layers", sources[layer], least=0)
        if source > layer or sources[source] != source:
            raise MLAError(
                f"kv_source_layers: layer {layer} has to read its own cache or that of an earlier layer that "
                f"keeps one, got {source}"
            )
    return sources


def _all_full(raw: Raw) -> Sequence[str]:
    return ["full" for _ in _layers(raw)]


def _told_indexer_types(raw: Raw, key: str) -> list[str] | None:
    told = _for_each_layer(raw, key)
    if told is None:
        return None
    modes = {"F": "full", "S": "shared", "full": "full", "shared": "shared"}
    if strange := [mark for mark in told if not isinstance(mark, str) or mark not in modes]:
        raise MLAError(f"{key}: expected full (F) or shared (S) for each layer, got {str(strange[0])[:60]!r}")
    return [modes[mark] for mark in told]


def _glm_indexer_types(raw: Raw) -> Sequence[str]:
    pattern = raw.get("index_topk_pattern")
    spelt = {**raw, "index_topk_pattern": list(pattern) if isinstance(pattern, str) else pattern}
    told = _told_indexer_types(raw, "indexer_types") or _told_indexer_types(spelt, "index_topk_pattern")
    if told:
        return told
    every = max(integer(raw, "index_topk_freq", default=1), 1)
    offset = integer(raw, "index_skip_topk_offset", default=2)
    return ["full" if max(i - offset + 1, 0) % every == 0 else "shared" for i in _layers(raw)]


def _hy_v4_indexer_types(raw: Raw) -> Sequence[str]:
    return _told_indexer_types(raw, "indexer_types") or [
        "full" if i == 0 or (i - 1) % 4 == 0 else "shared" for i in _layers(raw)
    ]


def _dims(
    hidden: int, layers: int, heads: int, q: int | None, r: int, n: int, p: int, v: int | None, length: int
) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "q_lora_rank": q,
        "kv_lora_rank": r,
        "qk_nope_head_dim": n,
        "qk_rope_head_dim": p,
        "v_head_dim": v,
        "max_position_embeddings": length,
    }


def _indexer(*, heads: int = 64, pool: int = 1) -> dict[str, int]:
    """Sizes that Transformers' classes take; ``pool``: how many tokens share one key of the indexer."""
    return {"index_topk": 2048, "index_head_dim": 128, "index_n_heads": heads, "index_kpool": pool}


_FULL = _every("full_attention")
_INDEXED = _every("indexed_attention")

FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "deepseek_v2": Family(
            layer_types=_FULL,
            defaults=_dims(4096, 32, 32, 1536, 512, 128, 64, 128, 2048),
        ),
        "deepseek_v3": Family(
            layer_types=_FULL,
            reads_rope_interleave=True,
            defaults=_dims(7168, 61, 128, 1536, 512, 128, 64, 128, 4096),
        ),
        "deepseek_v32": Family(
            layer_types=_INDEXED,
            indexer_types=_all_full,
            defaults={**_dims(7168, 61, 128, 1536, 512, 128, 64, 128, 163840), "index_head_dim": 128},
        ),
        "kimi_linear": Family(
            # The "rope" part of the key exists and is shared, but the code never rotates it.
            layout="none",
            yarn_scales_softmax=False,
            layer_types=_kimi_layer_types,
            renamed={"max_position_embeddings": "model_max_length"},
            defaults=_dims(2304, 27, 32, None, 512, 128, 64, 128, 1048576),
        ),
        "longcat_flash": Family(
            layer_types=_FULL,
            default_theta=10_000_000.0,
            attentions_per_block=2,
            defaults=_dims(6144, 56, 64, 1536, 512, 128, 64, 128, 131072),
        ),
        "minicpm3": Family(
            layout="half",
            layer_types=_FULL,
            defaults=_dims(2560, 62, 40, 768, 256, 64, 32, None, 32768),
        ),
        "mistral4": Family(
            layer_types=_FULL,
            reads_rope_interleave=True,
            rope_defaults={
                "rope_type": "yarn",
                "factor": 128.0,
                "original_max_position_embeddings": 8192,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "mscale_all_dim": 1.0,
                "mscale": 1.0,
                "llama_4_scaling_beta": 0.1,
            },
            defaults=_dims(4096, 36, 32, 1024, 256, 64, 64, 128, 1048576),
        ),
        "mistral_large4": Family(
            layer_types=_INDEXED,
            indexer_types=_glm_indexer_types,
            indexer=_indexer(heads=32),
            kv_source_layers=_mistral_large4_sources,
            groups=_mistral_large4_groups,
            latent_norm_eps=None,
            rope_defaults={
                "rope_type": "yarn",
                "factor": 2048.0,
                "original_max_position_embeddings": 512,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "attention_factor": 1.0,
            },
            defaults={
                **_dims(6144, 72, 64, None, 512, 64, 64, 128, 1048576),
                "rms_norm_eps": 1e-5,
                "index_head_dim": 128,
            },
        ),
        "youtu": Family(
            layer_types=_FULL,
            reads_rope_interleave=True,
            defaults=_dims(2048, 32, 16, 1536, 512, 128, 64, 128, 131072),
        ),
        "glm4_moe_lite": Family(
            layer_types=_FULL,
            reads_rope_interleave=True,
            defaults=_dims(2048, 47, 20, 768, 512, 192, 64, 256, 202752),
        ),
        "glm_moe_dsa": Family(
            layer_types=_INDEXED,
            indexer_types=_glm_indexer_types,
            indexer=_indexer(heads=32),
            defaults={**_dims(6144, 78, 64, 2048, 512, 192, 64, 256, 202752), "index_head_dim": 128},
        ),
        "glm5_next": Family(
            layout="none",
            yarn_scales_softmax=False,
            latent_norm_eps=None,
            layer_types=_glm5_layer_types,
            indexer_types=_glm_indexer_types,
            indexer=_indexer(heads=32, pool=16),
            # Pools are rebuilt from the cache: the key, its gate and one flag for "not padding".
            indexer_width=lambda raw: 2 * int(raw["index_head_dim"]) + 1,
            defaults={
                **_dims(4096, 45, 64, 1536, 512, 256, 0, 256, 1048576),
                "rms_norm_eps": 1e-5,
                "index_head_dim": 128,
            },
        ),
        "axk1": Family(
            layer_types=_FULL,
            reads_rope_interleave=True,
            defaults=_dims(7168, 61, 64, 1536, 512, 128, 64, 128, 32768),
        ),
        "axk2": Family(
            layer_types=_INDEXED,
            indexer_types=_all_full,
            indexer=_indexer(heads=16),
            defaults={**_dims(2048, 48, 32, 384, 128, 64, 32, 64, 131072), "index_head_dim": 128},
        ),
        "bailing_hybrid": Family(
            layer_types=_bailing_layer_types,
            default_theta=6_000_000.0,
            renamed={"max_position_embeddings": "model_max_length"},
            defaults={**_dims(2560, 42, 32, None, 512, 128, 64, 128, 262144), "layer_group_size": 6},
        ),
        "dots3_note": Family(
            layer_types=_dots3_layer_types,
            indexer_types=_all_full,
            groups=_dots3_groups,
            default_theta=80_000_000.0,
            yarn_scales_softmax=False,
            latent_norm_eps=None,
            defaults={
                **_dims(5120, 46, 128, 1024, 512, 128, 64, 128, 524288),
                "rms_norm_eps": 1e-5,
                "index_head_dim": 128,
                "head_dim": 256,
                "swa_num_attention_heads": 64,
                "swa_q_lora_rank": 1024,
                "swa_kv_lora_rank": 1024,
                "swa_head_dim": 256,
                "swa_qk_nope_head_dim": 192,
                "swa_v_head_dim": 128,
            },
        ),
        "hy_v4": Family(
            layout="half",
            layer_types=_INDEXED,
            indexer_types=_hy_v4_indexer_types,
            indexer=_indexer(heads=16),
            defaults={**_dims(2816, 34, 32, 1536, 512, 192, 64, 256, 262144), "index_head_dim": 128},
        ),
        # Not in Transformers: the model's own code follows DeepSeek-V2, pairs side by side, no query rank.
        "plm": Family(layer_types=_FULL, defaults={"q_lora_rank": None}),
    }
)

#: Other ``model_type`` strings with the attention of a family above.
ALIASES: Mapping[str, str] = MappingProxyType(
    {
        "mistral_large4_text": "mistral_large4",
        "glm5_next_text": "glm5_next",
        "dots3_note_text": "dots3_note",
        "kimi_k2": "deepseek_v3",
    }
)

_UNKNOWN = Family(layout=None, reads_rope_interleave=True, latent_norm_eps=None, layer_types=_FULL)
#: Keys that say that layers differ, each in a way of its own; refused where no rule reads them.
LAYER_PATTERNS = (
    "attention_chunk_size",
    "attention_other_setting",
    "attn_layer_period",
    "attn_type_list",
    "block_configs",
    "compress_ratios",
    "full_attention_interval",
    "global_attn_every_n_layers",
    "hybrid_layer_pattern",
    "hybrid_override_pattern",
    "layers_block_type",
    "num_kv_shared_layers",
    "sliding_window_pattern",
)
#: An unknown model with one of these caches more than latents, in a way nobody told us.
_NEEDS_A_ROW = (
    "index_head_dim",
    "kv_source_layers",
    "no_rope_layers",
    "linear_attn_config",
    "per_layer_config",
    *LAYER_PATTERNS,
)
#: Names of layer kinds in older config.json files.
_OLD_KINDS = {"deepseek_sparse_attention": "indexed_attention", "attention": "full_attention"}


def text_part(raw: Raw) -> dict[str, Any]:
    """The part of a config.json that describes the language model; ``raw`` itself if it is not a wrapper."""
    text = dict(raw)
    for key in ("text_config", "language_config", "llm_config"):
        inner = raw.get(key)
        if isinstance(inner, Mapping) and not raw.get("kv_lora_rank"):
            outer = {key: raw[key] for key in ("model_type", "tie_word_embeddings") if key in raw}
            text = {**outer, **inner}
            break
    kinds = text.get("layer_types")
    if kinds is not None:
        if not isinstance(kinds, list | tuple) or not all(isinstance(kind, str) for kind in kinds):
            raise MLAError(f"layer_types: expected a list of names, one for each layer, got {kinds!r}")
        text["layer_types"] = [_OLD_KINDS.get(kind, kind) for kind in kinds]
    return text


def find_family(text: Raw) -> Family:
    """The row for a text configuration.

    Raises :class:`~mla.errors.MLAError` if it does not describe MLA, or describes an unknown kind of it.
    Whether a model is MLA is read off its keys; the name only selects conventions.
    """
    name = text.get("model_type")
    family = FAMILIES.get(ALIASES.get(str(name), str(name)))
    rank = text.get("kv_lora_rank", family.defaults.get("kv_lora_rank") if family else None)
    if not rank or text.get("use_mla") is False or (family is None and "qk_rope_head_dim" not in text):
        raise MLAError(
            f"model_type {name!r} is not an MLA model: it has {attention_of(text)} and no kv_lora_rank; "
            "convert it first: mla convert MODEL OUT"
        )
    if family is not None:
        return family
    strange = [key for key in _NEEDS_A_ROW if text.get(key)]
    if strange:
        raise MLAError(
            f"model_type {name!r} is an unknown MLA family whose layers differ ({', '.join(strange)}); known "
            f"families: {', '.join(sorted(FAMILIES))}"
        )
    return _UNKNOWN


def attention_of(text: Raw) -> str:
    """The usual name of a non-latent attention, from its head counts."""
    full = usual_names(text)
    heads, groups = full.get("num_attention_heads"), full["num_key_value_heads"]
    if not isinstance(heads, int) or not isinstance(groups, int):
        return "no attention heads in its config"
    kind = "MHA" if groups == heads else "MQA" if groups == 1 else "GQA"
    return f"{kind} ({heads} query heads, {groups} key-value heads)"
