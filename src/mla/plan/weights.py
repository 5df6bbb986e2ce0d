"""Parameters outside of softmax attention, and the states of linear attention, read from a config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mla.errors import MLAError

Raw = Mapping[str, Any]
#: Activations whose MLP has two matrices, up and down, without a gate.
_UNGATED = {"relu2", "gelu_new", "gelu", "relu", "gelu_fast", "gelu_pytorch_tanh_ungated"}
#: Families that gate although their activation stands above.
_GATED = ("gemma",)
#: Dense layers at the start where a config.json of the family does not say.
_FIRST_DENSE = {"deepseek_v3": 3, "kimi_k2": 1, "deepseek_v32": 3, "glm_moe_dsa": 3, "glm5_next": 3}
_FIRST_DENSE |= {"kimi_linear": 1, "glm4_moe_lite": 1, "axk1": 1, "axk2": 1, "hy_v4": 1, "dots3_note": 1}
_FIRST_DENSE |= {"bailing_hybrid": 2, "mistral_large4": 1}


def _first(full: Raw, *names: str) -> Any:
    """The first of several names that the config.json gives a value."""
    return next((full[name] for name in names if full.get(name) is not None), None)


def parameters(full: Raw, *, layers: int, notes: list[str]) -> dict[str, float]:
    """Vocabulary, dense MLPs and experts; ``layers`` attentions in all. ``notes`` tell what is missing."""
    experts = int(_first(full, "n_routed_experts", "num_experts", "num_local_experts") or 0)
    dense_width = int(_first(full, "intermediate_size", "ffn_hidden_size") or 0)
    expert_width = int(_first(full, "moe_intermediate_size", "expert_ffn_hidden_size") or dense_width)
    used = float(_first(full, "num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k") or 0)
    if experts and not used:
        raise MLAError("config.json has experts but no num_experts_per_tok")
    if idle := int(full.get("zero_expert_num") or 0):
        # LongCat routes to experts that do nothing, too: on average this many of the real ones.
        used = used * experts / (experts + idle)
        notes.append(f"{idle} of the experts do nothing: {used:g} real ones per token on average.")
    shared = int(_first(full, "n_shared_experts", "num_shared_experts") or 0) * expert_width
    own_width = _first(full, "shared_expert_intermediate_size", "shared_experts_intermediate_size")
    shared = int(own_width) if own_width is not None else shared
    sparse = _sparse_layers(full, layers) if experts else 0
    dense = layers - sparse
    if full.get("model_type") == "longcat_flash":
        # A block holds two attentions, two dense MLPs and one mixture of experts.
        sparse, dense = layers // 2, layers
    missing = [
        n
        for n, value in (("vocab_size", full.get("vocab_size")), ("intermediate_size", dense_width))
        if not value
    ]
    if missing:
        notes.append(f"config.json has no {' and no '.join(missing)}: the weights are counted without.")
    activation = str(_first(full, "hidden_act", "activation_function") or "silu")
    model_type = str(full.get("model_type"))
    gated = activation not in _UNGATED or model_type.startswith(_GATED)
    return {
        "vocab": int(full.get("vocab_size") or 0),
        "tied": float(bool(full.get("tie_word_embeddings", model_type in _TIED_BY_DEFAULT))),
        "dense_layers": dense,
        "mlp_matrices": 3 if gated else 2,
        "dense_width": dense_width,
        "moe_layers": sparse,
        "experts": experts,
        "experts_used": used,
        "expert_width": expert_width,
        "shared_width": shared,
        "published": 0,
    }


#: Families whose class ties the output to the input embedding unless told otherwise.
_TIED_BY_DEFAULT = {"minicpm3", "youtu", "gemma", "gemma2", "gemma3_text", "gpt2"}


def _sparse_layers(full: Raw, layers: int) -> int:
    """Layers with experts, by the three ways in which configurations say it."""
    kinds = full.get("mlp_layer_types")
    if kinds:
        return sum(kind == "sparse" for kind in list(kinds)[:layers])
    if "decoder_sparse_step" in full:
        step, dense = int(full["decoder_sparse_step"]), set(full.get("mlp_only_layers") or ())
        return sum(i not in dense and (i + 1) % step == 0 for i in range(layers))
    first = full.get("first_k_dense_replace")
    if first is None:
        first = _FIRST_DENSE.get(str(full.get("model_type")), 0)
    every = full.get("moe_layer_freq") or 1
    if isinstance(every, list):
        return sum(bool(flag) for flag in every[:layers])
    return sum(i >= first and i % int(every) == 0 for i in range(layers))


def linear_attention(full: Raw, *, layers: int, hidden: int) -> dict[str, float]:
    """Numbers of recurrent and convolution state per linear layer, and its parameters.

    Raises:
        MLAError: linear layers of a kind whose state the config.json does not describe.
    """
    zero = {"state_numbers": 0, "conv_numbers": 0, "linear_parameters": 0}
    if not layers:
        return {"linear_layers": 0, **zero}
    nested = full.get("linear_attn_config") or {}
    if "linear_num_value_heads" in full:
        # Gated DeltaNet of Qwen3-Next: fewer key than value heads.
        keys = int(full["linear_num_key_heads"]) * int(full["linear_key_head_dim"])
        values = int(full["linear_num_value_heads"]) * int(full["linear_value_head_dim"])
        kernel = int(full.get("linear_conv_kernel_dim") or 4)
        state = values * int(full["linear_key_head_dim"])
        convolved = 2 * keys + values
        weights = hidden * (convolved + 2 * values + 2 * int(full["linear_num_value_heads"]))
        return _linear(layers, state, convolved, kernel, weights)
    bailing = full.get("model_type") == "bailing_hybrid"
    heads = nested.get("num_heads") or full.get("linear_num_heads")
    width = nested.get("head_dim") or full.get("linear_head_dim")
    kernel = nested.get("short_conv_kernel_size") or _first(
        full, "linear_conv_kernel_dim", "short_conv_kernel_size"
    )
    if bailing:
        # Released configurations name the linear layers' width head_dim; saved by Transformers, they have
        # linear_head_dim, and head_dim is the rotary width.
        heads, width = heads or full["num_attention_heads"], width or full.get("head_dim") or 128
    elif full.get("model_type") == "kimi_linear":
        heads, width = heads or 32, width or 128
    elif full.get("model_type") in ("glm5_next", "glm5_next_text"):
        heads, width = heads or 64, width or 128
    if not heads or not width:
        raise MLAError(
            f"model_type {full.get('model_type')!r} has {layers} linear-attention layers whose state its "
            "config.json does not describe (expected linear_num_heads and linear_head_dim)"
        )
    all_heads = int(heads) * int(width)
    # Queries, keys, values, output; decay and gate are whole matrices in Bailing, elsewhere they pass a
    # bottleneck of one head's width (Kimi Delta Attention).
    weights = 4 * hidden * all_heads + hidden * int(heads)
    weights += 2 * (hidden * all_heads if bailing else int(width) * (hidden + all_heads))
    return _linear(layers, all_heads * int(width), 3 * all_heads, int(kernel or 4), weights)


def _linear(layers: int, state: int, convolved: int, kernel: int, weights: int) -> dict[str, float]:
    return {
        "linear_layers": layers,
        "state_numbers": state,
        # Transformers keeps as many inputs as the kernel is long, the newest included.
        "conv_numbers": convolved * kernel,
        "linear_parameters": weights + convolved * kernel,
    }
