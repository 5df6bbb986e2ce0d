"""Dimensions, softmax scale, RoPE and cache bytes of an MLA model. Level 0: no torch, no transformers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from mla.errors import MLAError
from mla.families import LAYER_KINDS, Family, find_family, text_part
from mla.formats import cache_format as format_of
from mla.reading import config_file, expect_int, expect_number, read_config

LAYOUTS = ("interleaved", "half", "none")
#: RoPE type -> the parameters it cannot do without.
ROPE_TYPES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "default": (),
        "linear": ("factor",),
        "dynamic": ("factor",),
        "yarn": ("original_max_position_embeddings",),
        "longrope": ("original_max_position_embeddings", "short_factor", "long_factor"),
        "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
        "proportional": (),
    }
)
#: Keys of a rope dictionary that hold nothing new: the type under its old name, the width of the rotary part
#: as a share of the head (MLA states it as qk_rope_head_dim; compared with it below), and Mistral's copy of
#: the model's own max_position_embeddings.
_ROPE_KEYS_READ_ELSEWHERE = {"type", "rope_type", "rope_theta", "partial_rotary_factor"}
_ROPE_KEYS_IGNORED = {"max_position_embeddings"}


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding of the shared key and of the queries' rotary part.

    ``layout`` says which numbers form a pair: "interleaved" (2i, 2i+1), "half" (i, i + p/2), or "none" (the
    part exists but is never rotated). The other fields carry the names of the ``rope_parameters`` of Hugging
    Face Transformers; None means "not given".

    ``llama_4_scaling_beta`` is a temperature of the queries by position (Llama 4): q is multiplied by
    1 + beta * ln(1 + floor(position / original_max_position_embeddings)). It changes neither cos nor sin.
    """

    layout: str
    theta: float = 10000.0
    rope_type: str = "default"
    factor: float | None = None
    original_max_position_embeddings: int | None = None
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    short_factor: tuple[float, ...] | None = None
    long_factor: tuple[float, ...] | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    llama_4_scaling_beta: float | None = None

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS:
            raise MLAError(f"RoPE layout: expected one of {', '.join(LAYOUTS)}, got {self.layout!r}")
        if self.rope_type not in ROPE_TYPES:
            raise MLAError(f"rope_type: expected one of {', '.join(ROPE_TYPES)}, got {self.rope_type!r}")
        for f in fields(self):
            if f.type in ("float", "float | None", "int | None") and getattr(self, f.name) is not None:
                above = {"theta": 1, "factor": 0}.get(f.name, -1e300)
                expect_number(f"RoPE {f.name}", getattr(self, f.name), above=above)
        missing = [name for name in ROPE_TYPES[self.rope_type] if getattr(self, name) is None]
        if missing:
            raise MLAError(f"rope_type {self.rope_type!r} needs {', '.join(missing)}")
        if self.llama_4_scaling_beta is not None and not self.original_max_position_embeddings:
            raise MLAError("llama_4_scaling_beta needs original_max_position_embeddings")

    def scaling_factor(self, max_position_embeddings: int | None = None) -> float:
        """The factor of context extension: given, or the new maximal length over the original one."""
        if self.factor is not None:
            return self.factor
        if self.original_max_position_embeddings is None:
            return 1.0
        if max_position_embeddings is None:
            raise MLAError(f"rope_type {self.rope_type!r} without factor needs max_position_embeddings")
        return max_position_embeddings / self.original_max_position_embeddings

    def attention_scaling(self, max_position_embeddings: int | None = None) -> float:
        """The number cos and sin are multiplied by (YaRN section 3.4; LongRoPE section 3.3)."""
        if self.rope_type not in ("yarn", "longrope"):
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        factor = self.scaling_factor(max_position_embeddings)
        if self.rope_type == "longrope":
            original = self.original_max_position_embeddings
            assert original is not None
            return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
        if self.mscale and self.mscale_all_dim:
            return yarn_mscale(factor, self.mscale) / yarn_mscale(factor, self.mscale_all_dim)
        return yarn_mscale(factor)

    def softmax_mscale(self, max_position_embeddings: int | None = None) -> float:
        """mscale(factor, mscale_all_dim): its square multiplies the softmax scale (DeepSeek-V2)."""
        if self.rope_type == "default" or not self.mscale_all_dim:
            return 1.0
        return yarn_mscale(self.scaling_factor(max_position_embeddings), self.mscale_all_dim)


def yarn_mscale(factor: float, mscale: float = 1.0) -> float:
    """0.1 * mscale * ln(factor) + 1, and 1 without extension (YaRN, arXiv:2309.00071, equation 22)."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


@dataclass(frozen=True, kw_only=True)
class LayerGroup:
    """Layers whose attention has other dimensions than the model's main one (see :meth:`MLAConfig.at_layer`).

    ``sliding_window`` counts the tokens a query sees, itself included; None sees all.
    """

    layers: tuple[int, ...]
    num_attention_heads: int
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    rope: RopeConfig
    sliding_window: int | None = None


@dataclass(frozen=True, kw_only=True)
class MLAConfig:
    """What a latent attention needs to know about itself; names as in Hugging Face configurations.

    ``mla_layers`` are the cache slots that hold a latent, by default all: linear-attention layers of hybrid
    models do not, nor do layers that read another layer's latents. ``indexer_layers`` are the slots that hold
    keys of a sparse indexer, ``indexer_width`` numbers per token. ``rms_norm_eps`` is the one of the latent
    norms, which in most families is not the model's. ``q_lora_rank`` None means no query compression.

    Errors: :class:`~mla.errors.MLAError` (a ``ValueError``) with the field, what was expected, what came.
    """

    hidden_size: int
    num_attention_heads: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    rope: RopeConfig
    q_lora_rank: int | None = None
    num_hidden_layers: int = 1
    mla_layers: tuple[int, ...] = ()
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-6
    attention_bias: bool = False
    model_type: str | None = None
    yarn_scales_softmax: bool = True
    sliding_window: int | None = None
    indexer_layers: tuple[int, ...] = ()
    indexer_width: int = 0
    groups: tuple[LayerGroup, ...] = ()

    def __post_init__(self) -> None:
        for name in ("hidden_size", "num_hidden_layers", "max_position_embeddings"):
            expect_int(name, getattr(self, name), least=1)
        _check_dimensions(self)
        for group in self.groups:
            _check_dimensions(group)
        expect_number("rms_norm_eps", self.rms_norm_eps, above=0)
        if not self.mla_layers:
            object.__setattr__(self, "mla_layers", tuple(range(self.num_hidden_layers)))
        for name, layers in (("mla_layers", self.mla_layers), ("indexer_layers", self.indexer_layers)):
            if any(not 0 <= layer < self.num_hidden_layers for layer in layers):
                raise MLAError(f"{name}: expected indices below {self.num_hidden_layers}, got {layers}")
        if self.indexer_layers:
            expect_int("indexer_width", self.indexer_width, least=1)

    @property
    def qk_head_dim(self) -> int:
        """Width n + p of a query and of an expanded key."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def latent_dim(self) -> int:
        """Numbers r + p cached per token and layer."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def softmax_scale(self) -> float:
        """1 / sqrt(n + p), times YaRN's mscale squared where the family applies it."""
        scale: float = self.qk_head_dim**-0.5
        if self.yarn_scales_softmax:
            scale *= self.rope.softmax_mscale(self.max_position_embeddings) ** 2
        return scale

    def at_layer(self, layer: int) -> MLAConfig:
        """This configuration with the dimensions of one layer's attention, and no groups."""
        expect_int("layer", layer, least=0)
        if layer >= self.num_hidden_layers:
            raise MLAError(f"layer: expected an index below {self.num_hidden_layers}, got {layer}")
        for group in self.groups:
            if layer in group.layers:
                own = {f.name: getattr(group, f.name) for f in fields(group) if f.name != "layers"}
                return replace(self, groups=(), **own)
        return replace(self, groups=())

    def latent_bytes_per_token(self, cache_format: str = "bf16") -> int:
        """Bytes of latents one more token costs, over all layers that hold latents."""
        return sum(self._row_bytes(layer, cache_format) for layer in self.mla_layers)

    def indexer_bytes_per_token(self, cache_format: str = "bf16") -> int:
        """Bytes of sparse-indexer keys one more token costs, over all layers that hold them."""
        return len(self.indexer_layers) * self._index_bytes(cache_format)

    def cache_bytes_per_token(self, cache_format: str = "bf16") -> int:
        """Bytes one more token costs in all layers: latents and indexer keys.

        ``cache_format`` is one of ``mla.formats.CACHE_FORMATS``. Layers with a sliding window stop growing
        once it is full: see :meth:`cache_bytes`.
        """
        return self.latent_bytes_per_token(cache_format) + self.indexer_bytes_per_token(cache_format)

    def cache_bytes_per_token_and_layer(self, cache_format: str = "bf16", layer: int | None = None) -> int:
        """Bytes one more token costs in one layer; by default in the first that holds latents."""
        if layer is None:
            layer = self.mla_layers[0]
        latents = self._row_bytes(layer, cache_format) if layer in self.mla_layers else 0
        return latents + (self._index_bytes(cache_format) if layer in self.indexer_layers else 0)

    def cache_bytes(self, tokens: int, cache_format: str = "bf16") -> int:
        """Bytes of the cache of one sequence of ``tokens`` tokens.

        A layer with a window of w tokens keeps the last w - 1: the next query brings its own.
        """
        size = tokens * self.indexer_bytes_per_token(cache_format)
        for layer in self.mla_layers:
            window = self.at_layer(layer).sliding_window
            kept = tokens if window is None else min(tokens, window - 1)
            size += kept * self._row_bytes(layer, cache_format)
        return size

    def _row_bytes(self, layer: int, cache_format: str) -> int:
        own = self.at_layer(layer)
        return format_of(cache_format).row_bytes(own.kv_lora_rank, own.qk_rope_head_dim)

    def _index_bytes(self, cache_format: str) -> int:
        return int(self.indexer_width * format_of(cache_format).index)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> MLAConfig:
        """From the contents of a config.json, old style (``rope_scaling``) or new (``rope_parameters``)."""
        text = text_part(config)
        return _parse(text, find_family(text))

    @classmethod
    def from_transformers(cls, config: Any) -> MLAConfig:
        """From a ``PreTrainedConfig``, of a language model or of a wrapper that holds one."""
        to_dict = getattr(config, "to_dict", None)
        if to_dict is None:
            raise MLAError(f"expected a Transformers configuration, got {type(config).__name__}")
        return cls.from_dict(to_dict())

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path) -> MLAConfig:
        """From a folder with a config.json, a config.json itself, or a Hub id (namespace/name)."""
        return cls.from_dict(read_config(config_file(str(name_or_path))))


def _check_dimensions(part: MLAConfig | LayerGroup) -> None:
    for name in ("num_attention_heads", "kv_lora_rank", "v_head_dim"):
        expect_int(name, getattr(part, name), least=1)
    for name in ("qk_nope_head_dim", "qk_rope_head_dim"):
        expect_int(name, getattr(part, name), least=0)
    for name in ("q_lora_rank", "sliding_window"):
        if getattr(part, name) is not None:
            expect_int(name, getattr(part, name), least=1)
    p = part.qk_rope_head_dim
    if p + part.qk_nope_head_dim == 0:
        raise MLAError("qk_nope_head_dim and qk_rope_head_dim are both 0: a key needs a width")
    if p % 2:
        raise MLAError(f"qk_rope_head_dim: expected an even number, got {p}")
    for name in ("short_factor", "long_factor"):
        factors = getattr(part.rope, name)
        if factors is not None and part.rope.layout != "none" and len(factors) != p // 2:
            raise MLAError(
                f"{name}: expected {p // 2} numbers (half of qk_rope_head_dim), got {len(factors)}"
            )


def _parse(text: dict[str, Any], family: Family) -> MLAConfig:
    raw = {**family.defaults, **text}
    for ours, theirs in family.renamed.items():
        if theirs in text:
            raw[ours] = text[theirs]
    if family.attentions_per_block and text.get("num_layers") is not None:
        blocks = expect_int("num_layers", text["num_layers"], least=1)
        raw["num_hidden_layers"] = family.attentions_per_block * blocks
    # None means something in these two: queries without compression, values as wide as a head.
    told = {n for n, value in family.defaults.items() if isinstance(value, int)} - {"v_head_dim"}
    counts = {"hidden_size", "num_hidden_layers", "num_attention_heads", "kv_lora_rank"}
    for name in sorted(told | counts | {"qk_nope_head_dim", "qk_rope_head_dim"}):
        if not name.endswith("q_lora_rank"):
            expect_int(name, raw.get(name), least=int(name in counts))
    if raw.get("v_head_dim") is None:
        raw["v_head_dim"] = raw["hidden_size"] // raw["num_attention_heads"]
    width = raw["qk_nope_head_dim"] + raw["qk_rope_head_dim"]
    if raw.get("qk_head_dim") not in (None, width):
        raise MLAError(
            f"qk_head_dim: expected qk_nope_head_dim + qk_rope_head_dim = {width}, got {raw['qk_head_dim']!r}"
        )

    kinds = list(family.layer_types(raw))
    layers = range(raw["num_hidden_layers"])
    if len(kinds) < len(layers):
        raise MLAError(f"layer_types: expected {len(layers)} entries, got {len(kinds)}")
    unknown = sorted({str(kind) for kind in kinds} - set(LAYER_KINDS))
    if unknown:
        raise MLAError(f"layer_types: expected {', '.join(LAYER_KINDS)}, got {', '.join(unknown)}")
    kinds = kinds[: len(layers)]  # of a model cut to fewer layers, or with entries for MTP layers
    sources = family.kv_source_layers(raw) if family.kv_source_layers else layers
    modes = family.indexer_types(raw) if family.indexer_types else ["shared" for _ in layers]
    indexer_layers = tuple(i for i in layers if kinds[i] == "indexed_attention" and modes[i] != "shared")
    mla_layers = tuple(i for i in layers if LAYER_KINDS[kinds[i]] and sources[i] == i)
    if not mla_layers:
        raise MLAError(f"layer_types: expected at least one layer with latents, got {', '.join(set(kinds))}")
    dims: dict[str, Any] = {name: raw.get(name) for name in _DIMENSIONS}
    rope = _parse_rope(raw, family, "indexed_attention" if "indexed_attention" in kinds else "full_attention")
    groups = family.groups(raw, kinds) if family.groups else []
    return MLAConfig(
        **dims,
        hidden_size=raw["hidden_size"],
        num_hidden_layers=len(layers),
        max_position_embeddings=raw.get("max_position_embeddings", 4096),
        rms_norm_eps=family.latent_norm_eps or raw.get("rms_norm_eps", 1e-6),
        attention_bias=bool(raw.get("attention_bias", False)),
        model_type=text.get("model_type"),
        yarn_scales_softmax=family.yarn_scales_softmax,
        rope=rope,
        mla_layers=mla_layers,
        indexer_layers=indexer_layers,
        indexer_width=family.indexer_width(raw) if indexer_layers else 0,
        groups=tuple(_parse_group(raw, family, dims, rope, *group) for group in groups),
    )


_DIMENSIONS = [f.name for f in fields(LayerGroup) if f.name not in ("layers", "rope", "sliding_window")]


def _parse_group(
    raw: dict[str, Any],
    family: Family,
    main: dict[str, Any],
    main_rope: RopeConfig,
    layers: tuple[int, ...],
    own: dict[str, Any],
) -> LayerGroup:
    own = dict(own)
    rope_key, theta = own.pop("rope_key", None), own.pop("rope_theta", None)
    rope = main_rope
    if own["qk_rope_head_dim"] == 0:
        # The layer rotates nothing, yet YaRN's mscale still enters its softmax scale.
        rope = replace(main_rope, layout="none")
    elif rope_key is not None:
        rope = _parse_rope({**raw, **own, "rope_theta": theta, "head_dim": None}, family, rope_key)
    return LayerGroup(**{**main, **own}, layers=layers, rope=rope)


def _parse_rope(raw: dict[str, Any], family: Family, layer_type: str) -> RopeConfig:
    layout = family.layout
    asked = raw.get("rope_interleave")
    if asked is not None and layout != "none":
        if family.reads_rope_interleave:
            layout = "interleaved" if asked else "half"
        elif bool(asked) != (layout == "interleaved"):
            raise MLAError(f"rope_interleave is {asked}, but {raw.get('model_type')} always uses {layout!r}")
    if layout is None:
        raise MLAError(
            f"model_type {raw.get('model_type')!r}: the RoPE layout cannot be known from this "
            "config.json; add rope_interleave (true: pairs (2i, 2i+1); false: halves)"
        )
    if layout == "none" or raw.get("qk_rope_head_dim") == 0:
        # Never rotated, so the json's rope keys (Kimi-Linear has some) have no effect in the model either.
        return RopeConfig(layout="none")

    given = raw.get("rope_scaling") or raw.get("rope_parameters") or family.rope_defaults
    if isinstance(given, Mapping) and any(key in LAYER_KINDS for key in given):
        if layer_type not in given:
            raise MLAError(f"rope_parameters: no entry for {layer_type!r}, only {', '.join(given)}")
        given = given[layer_type]
    if not isinstance(given, Mapping):
        raise MLAError(f"rope_scaling: expected an object, got {given!r}")
    return rope_from_dict(
        given,
        layout=layout,
        theta=raw["rope_theta"] if raw.get("rope_theta") is not None else family.default_theta,
        rope_dim=raw["qk_rope_head_dim"],
        head_dims=(raw["qk_nope_head_dim"] + raw["qk_rope_head_dim"], raw.get("head_dim")),
        original_length=raw.get("original_max_position_embeddings"),
        max_position_embeddings=raw.get("max_position_embeddings"),
    )


def rope_from_dict(
    given: Mapping[str, Any],
    *,
    layout: str,
    theta: float,
    rope_dim: int,
    head_dims: tuple[int | None, ...] = (),
    original_length: int | None = None,
    max_position_embeddings: int | None = None,
) -> RopeConfig:
    """A RopeConfig from a ``rope_scaling`` or ``rope_parameters`` object.

    ``theta`` is used if the object has none; ``original_length`` is the json's top-level
    ``original_max_position_embeddings``, which wins over the object's. An unknown key raises MLAError.
    """
    names = {f.name for f in fields(RopeConfig)} - {"layout", "theta", "rope_type"}
    unknown = sorted(set(given) - names - _ROPE_KEYS_READ_ELSEWHERE - _ROPE_KEYS_IGNORED)
    if unknown:
        raise MLAError(f"unknown RoPE parameter {', '.join(unknown)}; known: {', '.join(sorted(names))}")
    kinds = {str(given[key]) for key in ("rope_type", "type") if given.get(key) is not None}
    if len(kinds) > 1:
        raise MLAError(f"rope_type and type disagree: {', '.join(sorted(kinds))}")
    values = {name: given[name] for name in names if given.get(name) is not None}
    for name in ("short_factor", "long_factor"):
        if name in values:
            factors = values[name] if isinstance(values[name], list | tuple) else [values[name]]
            values[name] = tuple(expect_number(name, factor) for factor in factors)
    rope_type = kinds.pop() if kinds else "default"
    share = given.get("partial_rotary_factor")
    share = 1.0 if share is None else expect_number("partial_rotary_factor", share)
    widths = [w for w in (rope_dim, *head_dims) if isinstance(w, int) and 0 < w < 1 << 20]
    # Transformers rotates int(head_dim * share) numbers; what a family calls head_dim varies.
    if rope_dim not in [round(w * share) for w in widths]:
        raise MLAError(f"partial_rotary_factor {share} does not give qk_rope_head_dim = {rope_dim}")
    if rope_type in ("yarn", "longrope", "llama3"):
        original = original_length or values.get("original_max_position_embeddings")
        values["original_max_position_embeddings"] = original or max_position_embeddings
    theta = expect_number("rope_theta", theta if given.get("rope_theta") is None else given["rope_theta"])
    return RopeConfig(layout=layout, theta=theta, rope_type=rope_type, **values)
