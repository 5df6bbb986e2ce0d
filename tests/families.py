"""Tiny random models of every MLA family of the installed Transformers: the cases of all parity tests.

``FAMILIES`` is data: one row per family with the smallest configuration that still has every kind of layer
the family knows (dense, mixture of experts, linear attention, sliding window, sparse indexer, shared cache,
layers without RoPE, gates, sinks). ``build`` makes the model; ``VARIANTS`` lists further configurations that
differ in the options attention depends on. Dimensions are pairwise different on purpose: a mix-up of two of
them cannot pass.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

VOCAB = 200
MAX_POSITIONS = 512

#: Fields every family accepts. No end-of-text token: generation must not stop before the test says so.
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 28,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 20,
    "max_position_embeddings": MAX_POSITIONS,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}
MOE: dict[str, Any] = {
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
}
DENSE_THEN_SPARSE = ["dense", "sparse", "sparse"]
#: Eight of 20 and more tokens: sparsity bites. Eight heads, because the scores are sums of rectified terms
#: and with few heads many would be exactly zero, leaving the choice among them to the sort.
INDEXER: dict[str, Any] = {"index_topk": 8, "index_head_dim": 18, "index_n_heads": 8}
YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 0.707,
    "mscale_all_dim": 0.9,
}
#: Kimi Delta Attention needs one chunk size and a few heads of its own.
KDA: dict[str, Any] = {"linear_head_dim": 8, "linear_num_heads": 3, "linear_conv_kernel_dim": 3}


@dataclass(frozen=True)
class Family:
    """One row: the classes to take from ``transformers.models.<name>`` and the fields of the text config."""

    config: str
    model: str
    fields: dict[str, Any]
    wrapper: str | None = None
    wrapper_fields: dict[str, Any] = field(default_factory=dict)


def _family(stem: str, *groups: dict[str, Any], without: tuple[str, ...] = (), **fields: Any) -> Family:
    merged = {key: value for group in (COMMON, *groups, fields) for key, value in group.items()}
    for key in without:
        merged.pop(key)
    return Family(f"{stem}Config", f"{stem}ForCausalLM", merged)


_ALL: dict[str, Family] = {
    "deepseek_v2": _family("DeepseekV2", MOE, first_k_dense_replace=1, rope_parameters=YARN),
    "deepseek_v3": _family(
        "DeepseekV3", MOE, first_k_dense_replace=1, rope_parameters=YARN, num_mtp_layers=0
    ),
    "deepseek_v32": _family("DeepseekV32", MOE, INDEXER, mlp_layer_types=DENSE_THEN_SPARSE),
    "kimi_linear": _family(
        "KimiLinear",
        KDA,
        without=("max_position_embeddings",),
        num_hidden_layers=4,
        model_max_length=MAX_POSITIONS,
        layer_types=["linear_attention", "full_attention", "linear_attention", "full_attention"],
        mlp_layer_types=["dense", "sparse", "sparse", "sparse"],
        moe_intermediate_size=16,
        num_local_experts=4,
        num_experts_per_token=2,
        num_shared_experts=1,
        num_expert_group=1,
        topk_group=1,
        q_lora_rank=None,
    ),
    "longcat_flash": _family(
        "LongcatFlash",
        without=("intermediate_size", "num_hidden_layers"),
        num_layers=2,
        ffn_hidden_size=48,
        expert_ffn_hidden_size=16,
        n_routed_experts=4,
        zero_expert_num=2,
        moe_topk=2,
        head_dim=8,
    ),
    "minicpm3": _family("MiniCPM3"),
    "mistral4": _family(
        "Mistral4",
        MOE,
        first_k_dense_replace=1,
        # A short original length, so that the queries' temperature (Llama 4) already moves at a few tokens.
        rope_parameters={
            **YARN,
            "factor": 32.0,
            "original_max_position_embeddings": 16,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.1,
        },
    ),
    "mistral_large4": Family(
        "MistralLarge4TextConfig",
        "MistralLarge4ForConditionalGeneration",
        {
            **{key: value for key, value in COMMON.items() if key != "q_lora_rank"},
            **MOE,
            **INDEXER,
            "num_hidden_layers": 6,
            "first_k_dense_replace": 2,
            "no_rope_layers": [1, 0, 1, 0, 1, 0],
            "kv_source_layers": [0, 1, 0, 1, 4, 5],
            "indexer_types": ["full", "full", "shared", "full", "shared", "full"],
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 32.0,
                "original_max_position_embeddings": 16,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "attention_factor": 1.0,
            },
        },
        wrapper="MistralLarge4Config",
        wrapper_fields={
            "vision_config": {
                "model_type": "pixtral",
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "patch_size": 4,
                "image_size": 16,
            },
            "image_token_index": VOCAB - 1,
        },
    ),
    "youtu": _family("Youtu"),
    "glm4_moe_lite": _family("Glm4MoeLite", MOE, mlp_layer_types=DENSE_THEN_SPARSE),
    "glm_moe_dsa": _family(
        "GlmMoeDsa",
        MOE,
        INDEXER,
        num_hidden_layers=4,
        mlp_layer_types=["dense", "sparse", "sparse", "sparse"],
        indexer_types=["full", "shared", "full", "shared"],
    ),
    "glm5_next": Family(
        "Glm5NextTextConfig",
        "Glm5NextForConditionalGeneration",
        {
            **COMMON,
            **MOE,
            **INDEXER,
            **KDA,
            "qk_rope_head_dim": 0,
            "index_kpool": 4,
            "num_hidden_layers": 4,
            "layer_types": [
                "linear_attention",
                "indexed_attention",
                "indexed_attention",
                "linear_attention",
            ],
            "indexer_types": ["full", "full", "shared", "shared"],
            "mlp_layer_types": ["dense", "dense", "sparse", "sparse"],
            "hc_mult": 2,
            "hc_sinkhorn_iters": 4,
        },
        wrapper="Glm5NextConfig",
        wrapper_fields={
            "vision_config": {
                "depth": 1,
                "hidden_size": 16,
                "num_heads": 2,
                "patch_size": 4,
                "image_size": 16,
                "out_hidden_size": 64,
                "intermediate_size": 16,
                "projection_intermediate_size": 16,
            },
            "image_token_id": VOCAB - 1,
            "video_token_id": VOCAB - 2,
            "image_start_token_id": VOCAB - 3,
            "image_end_token_id": VOCAB - 4,
            "video_start_token_id": VOCAB - 5,
            "video_end_token_id": VOCAB - 6,
        },
    ),
    "axk1": _family("AXK1", MOE, mlp_layer_types=DENSE_THEN_SPARSE),
    "axk2": _family("AXK2", MOE, INDEXER, mlp_layer_types=DENSE_THEN_SPARSE, gated_norm_rank=6),
    "bailing_hybrid": _family(
        "BailingHybrid",
        MOE,
        without=("q_lora_rank", "n_routed_experts"),
        num_local_experts=4,
        num_hidden_layers=4,
        head_dim=8,
        layer_types=["linear_attention", "full_attention", "linear_attention", "full_attention"],
        first_k_dense_replace=1,
        num_mtp_layers=0,
    ),
    "dots3_note": Family(
        "Dots3NoteTextConfig",
        "Dots3NoteForCausalLM",
        {
            **COMMON,
            **MOE,
            **INDEXER,
            "num_hidden_layers": 4,
            # RoPE width over head width gives the rotated share of the head, so this is qk_head_dim.
            "head_dim": 24,
            "layer_types": [
                "indexed_attention",
                "sliding_attention",
                "indexed_attention",
                "sliding_attention",
            ],
            "first_k_dense_replace": 1,
            "shared_experts_intermediate_size": 16,
            "sliding_window": 6,
            "swa_num_attention_heads": 2,
            "swa_num_key_value_heads": 2,
            "swa_q_lora_rank": 20,
            "swa_kv_lora_rank": 40,
            "swa_head_dim": 22,
            "swa_qk_nope_head_dim": 10,
            "swa_qk_rope_head_dim": 12,
            "swa_v_head_dim": 14,
        },
    ),
    "hy_v4": _family(
        "HYV4",
        MOE,
        INDEXER,
        num_hidden_layers=4,
        mlp_layer_types=["dense", "sparse", "sparse", "sparse"],
        indexer_types=["full", "shared", "full", "shared"],
        hc_mult=2,
    ),
}


#: The families of the installed Transformers: 14 in 5.19, 17 in 5.23.
FAMILIES: dict[str, Family] = {
    name: row for name, row in _ALL.items() if importlib.util.find_spec(f"transformers.models.{name}")
}
FAMILY_NAMES: list[str] = list(FAMILIES)


@dataclass(frozen=True)
class Variant:
    """A family with other options; ``id`` names it in test output."""

    family: str
    label: str
    overrides: dict[str, Any]

    @property
    def id(self) -> str:
        return f"{self.family}-{self.label}"

    def build(self, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        return build(self.family, seed, dtype, **self.overrides)


_THETA = {"rope_theta": 10000.0}
_SHORT, _LONG = [1.0, 1.1, 1.3, 1.7], [1.0, 2.0, 4.0, 8.0]
#: RoPE scalings for a rotary width of 8. The original length is below the test lengths, so that they act.
ROPE_SCALINGS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", **_THETA},
    "linear": {"rope_type": "linear", "factor": 4.0, **_THETA},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0, **_THETA},
    "yarn": YARN,
    "yarn-plain": {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 32, **_THETA},
    "yarn-smooth": {**YARN, "truncate": False, "beta_fast": 16.0, "attention_factor": 1.25},
    "longrope": {
        "rope_type": "longrope",
        "factor": 8.0,
        "original_max_position_embeddings": 64,
        "short_factor": _SHORT,
        "long_factor": _LONG,
        **_THETA,
    },
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "original_max_position_embeddings": 64,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        **_THETA,
    },
}
_ODD_DIMS = {"kv_lora_rank": 24, "qk_nope_head_dim": 12, "v_head_dim": 22, "num_attention_heads": 2}
_ODD_DIMS["num_key_value_heads"] = 2


def _variants() -> list[Variant]:
    def each(label: str, names: str, **overrides: Any) -> list[Variant]:
        return [Variant(name, label, overrides) for name in names.split() if name in FAMILIES]

    rows: list[Variant] = []
    for name in ("deepseek_v2", "deepseek_v3", "minicpm3"):
        for label, scaling in ROPE_SCALINGS.items():
            # A dynamic scaling starts at max_position_embeddings, which must therefore be short here.
            short = {"max_position_embeddings": 32} if label == "dynamic" else {}
            rows += each(label, name, rope_parameters=scaling, **short)
    everyone_yarn = (
        "deepseek_v32 longcat_flash youtu glm4_moe_lite glm_moe_dsa axk1 axk2 bailing_hybrid hy_v4"
    )
    rows += each("yarn", everyone_yarn, rope_parameters=YARN)
    rows += each("yarn", "dots3_note mistral_large4", rope_parameters=YARN)
    rows += each(
        "no-q-rank", "deepseek_v2 deepseek_v3 minicpm3 mistral4 youtu glm4_moe_lite", q_lora_rank=None
    )
    rows += each("q-rank", "kimi_linear", q_lora_rank=28)
    rows += each("half", "deepseek_v3 mistral4 youtu glm4_moe_lite axk1", rope_interleave=False)
    rows += each("bias", " ".join(FAMILIES), attention_bias=True)
    rows += each("odd-dims", " ".join(set(FAMILIES) - {"dots3_note"}), **_ODD_DIMS)
    rows += each("one-head", "deepseek_v3 glm_moe_dsa", num_attention_heads=1, num_key_value_heads=1)
    rows += each("wide-rope", "deepseek_v3 youtu deepseek_v2", qk_rope_head_dim=24, qk_nope_head_dim=4)
    rows += each("full", "dots3_note", use_dsa=False)
    rows += each("no-sharing", "mistral_large4", kv_source_layers=None, indexer_types=["full"] * 6)
    rows += each("all-rope", "mistral_large4", no_rope_layers=[1] * 6, kv_source_layers=[0, 0, 0, 3, 3, 3])
    rows += each("no-tail", "glm5_next", index_kpool_always_select_tail=False)
    rows += each("pool-1", "glm5_next", index_kpool=1)
    rows += each("groups", "deepseek_v3 axk2", n_group=2, topk_group=1, num_experts_per_tok=1)
    return sorted(rows, key=lambda row: row.id)


#: Further configurations, each differing from the family's row in an option that attention depends on.
VARIANTS: list[Variant] = _variants()


def make_config(name: str, **overrides: Any) -> PreTrainedConfig:
    """The tiny configuration of a family; ``overrides`` are fields of its text configuration."""
    family = FAMILIES[name]
    # A deep copy, because the configuration classes write into the dictionaries they are given.
    fields = copy.deepcopy({**family.fields, **overrides})
    config = getattr(transformers, family.config)(**fields)
    if family.wrapper is None:
        return config
    extra = copy.deepcopy(family.wrapper_fields)
    return getattr(transformers, family.wrapper)(text_config=config.to_dict(), **extra)


def build(name: str, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any) -> PreTrainedModel:
    """A random model of the family that takes ``input_ids`` and has ``generate``, in eval mode."""
    config = make_config(name, **overrides)
    torch.manual_seed(seed)
    model: PreTrainedModel = getattr(transformers, FAMILIES[name].model)(config)
    randomise(model, seed)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.to(dtype).eval()


@torch.no_grad()
def randomise(model: nn.Module, seed: int = 0) -> None:
    """Gives every weight a size that makes attention uneven, and norms, biases, gates and sinks values.

    The stock initialisation (0.02, ones, zeros) leaves attention almost uniform at these widths and hides
    every sign and scale error behind it. Decay rates and step biases of linear attention keep their own
    initialisation: they live on a logarithmic scale.
    """
    generator = torch.Generator().manual_seed(seed)

    def noise(tensor: torch.Tensor) -> torch.Tensor:
        return torch.randn(tensor.shape, generator=generator, dtype=torch.float32)

    learned_buffers = ("alpha", "e_score_correction_bias")
    tensors = [*model.named_parameters()]
    tensors += [(name, b) for name, b in model.named_buffers() if name.endswith(learned_buffers)]
    for name, tensor in tensors:
        if name.endswith(("A_log", "dt_bias")):
            continue
        if "embed_tokens" in name:
            tensor.copy_(noise(tensor))
        elif tensor.ndim >= 2:
            gain = 1.5 if ".self_attn" in name or "indexer" in name else 1.0
            tensor.copy_(gain * noise(tensor) / tensor.shape[-1] ** 0.5)
        elif name.endswith("e_score_correction_bias"):
            tensor.copy_(0.05 * noise(tensor))
        elif name.endswith("sinks"):
            tensor.copy_(1.0 + noise(tensor))
        else:
            tensor.add_(0.2 * noise(tensor))


def token_ids(batch: int = 2, length: int = 24, seed: int = 1) -> torch.Tensor:
    """Random ids ``[b, s]`` without the padding id and without the image and video ids of the wrappers."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCAB - 8, (batch, length), generator=generator)
