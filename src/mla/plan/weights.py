"""Parameters outside of softmax attention, and the states of linear attention, read from a config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mla.errors import MLAError
from mla.families import ALIASES
from mla.reading import expect_int, expect_list, integer, section

Raw = Mapping[str, Any]
#: Activations whose MLP has two matrices, up and down, without a gate.
_UNGATED = {"relu2", "gelu_new", "gelu", "relu", "gelu_fast", "xielu"}
#: Families that gate although their activation stands above, and those that do not though it does not.
_GATED = ("gemma",)
_TWO_MATRICES = {"apertus", "bloom", "falcon", "gpt_bigcode", "mpt", "nanochat", "opt", "starcoder2"}
#: Families whose attention multiplies its output by a gate as wide (Qwen's is the other half of q_proj).
_OUTPUT_GATE = {"afmoe", "qwen3_next", "qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text"}
#: Keys that some families give as a list with one number for each layer.
_PER_LAYER = {"intermediate_size", "moe_intermediate_size", "moe_topk", "num_experts", "num_shared_expert"}
_PER_LAYER |= {"moe_num_experts", "moe_layer_start_index", "moe_layer_end_index"}
#: Experts that work in a width of their own, which the formulas do not have.
_OTHER_WIDTH = ("moe_latent_size", "routed_expert_hidden_size")
#: Dense layers at the start where a config.json of the family does not say.
_FIRST_DENSE = {"deepseek_v3": 3, "kimi_k2": 1, "deepseek_v32": 3, "glm_moe_dsa": 3, "glm5_next": 3}
_FIRST_DENSE |= {"kimi_linear": 1, "glm4_moe_lite": 1, "axk1": 1, "axk2": 1, "hy_v4": 1, "dots3_note": 1}
_FIRST_DENSE |= {"bailing_hybrid": 2, "mistral_large4": 1}


def parameters(config: Raw, *, layers: int, notes: list[str]) -> dict[str, float]:
    """Vocabulary, dense MLPs and experts; ``layers`` attentions in all. ``notes`` tell what is missing.

    Raises:
        MLAError: layers whose MLPs differ in more than dense and sparse.
    """
    full = _one_for_all(config, layers)
    experts = integer(
        full, "n_routed_experts", "num_experts", "num_local_experts", "moe_num_experts", default=0
    )
    dense_width = integer(full, "intermediate_size", "ffn_hidden_size", default=0)
    expert_width = integer(full, "moe_intermediate_size", "expert_ffn_hidden_size", default=dense_width)
    used: float = integer(
        full, "num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", default=0
    )
    if experts and not used:
        raise MLAError(f"config.json has {experts} experts but no num_experts_per_tok")
    if used > experts > 0:
        raise MLAError(f"num_experts_per_tok: expected at most the {experts} experts, got {used}")
    if idle := integer(full, "zero_expert_num", default=0):
        # LongCat routes to experts that do nothing, too: on average this many of the real ones.
        used = used * experts / (experts + idle)
        notes.append(f"{idle} of the experts do nothing: {used:g} real ones per token on average.")
    names = ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts", "num_shared_expert")
    shared = integer(full, *names, default=0) * expert_width
    shared = integer(
        full, "shared_expert_intermediate_size", "shared_experts_intermediate_size", default=shared
    )
    if "intermediate_size_mlp" in full:
        # Llama 4 calls the width of its experts, of which one is shared, intermediate_size.
        shared = expert_width = dense_width
        dense_width = integer(full, "intermediate_size_mlp", least=1)
    sparse = _sparse_layers(full, layers) if experts else 0
    dense = layers - sparse
    if full.get("model_type") == "longcat_flash":
        # A block holds two attentions, two dense MLPs and one mixture of experts.
        sparse, dense = layers // 2, layers
    vocab = integer(full, "vocab_size", default=0)
    missing = [n for n, value in (("vocab_size", vocab), ("intermediate_size", dense_width)) if not value]
    if missing:
        notes.append(f"config.json has no {' and no '.join(missing)}: the weights are counted without.")
    activation = str(full.get("hidden_act") or full.get("activation_function") or "silu")
    model_type = str(full.get("model_type"))
    two = activation in _UNGATED or model_type in _TWO_MATRICES
    return {
        "vocab": vocab,
        "tied": float(bool(full.get("tie_word_embeddings", model_type in TIED_BY_DEFAULT))),
        "output_gate": float(bool(full.get("attn_output_gate", model_type in _OUTPUT_GATE))),
        "dense_layers": dense,
        "mlp_matrices": 2 if two and not model_type.startswith(_GATED) else 3,
        "dense_width": dense_width,
        "moe_layers": sparse,
        "experts": experts,
        "experts_used": used,
        "expert_width": expert_width,
        "shared_width": shared,
        "published": 0,
    }


def _one_for_all(full: Raw, layers: int) -> dict[str, Any]:
    """The config.json with one number for a list that says the same of every layer."""
    one = dict(full)
    for name in sorted(_PER_LAYER):
        value = full.get(name)
        if isinstance(value, list | tuple):
            if len(value) != layers or any(number != value[0] for number in value):
                raise MLAError(
                    f"{name}: expected one number, or the same {layers} times, got {str(value)[:60]}; their "
                    "mean in a copy of config.json gives the right sum"
                )
            one[name] = value[0]
    for name in _OTHER_WIDTH:
        if full.get(name):
            raise MLAError(
                f"{name}: the planner cannot count experts of another width than hidden_size; without this "
                "key in a copy of config.json they are counted as wide as the model"
            )
    return one


#: Families whose class ties the output to the input embedding unless told otherwise.
TIED_BY_DEFAULT = {"minicpm3", "youtu", "bloom", "cohere", "cohere2", "ernie4_5", "ernie4_5_moe", "falcon"}
TIED_BY_DEFAULT |= {"gemma", "gemma2", "gemma3_text", "gpt2", "gpt_bigcode", "opt", "smollm3", "starcoder2"}
TIED_BY_DEFAULT |= {"vaultgemma"}


def _sparse_layers(full: Raw, layers: int) -> int:
    """Layers with experts, by the ways in which configurations say it."""
    if kinds := _list(full, "mlp_layer_types"):
        return sum(kind == "sparse" for kind in kinds[:layers])
    if (chosen := _list(full, "moe_layers")) is not None:
        return sum(expect_int("moe_layers", layer, least=0) < layers for layer in chosen)
    if "interleave_moe_layer_step" in full:
        return layers // integer(full, "interleave_moe_layer_step", least=1)
    if "decoder_sparse_step" in full:
        step, dense = integer(full, "decoder_sparse_step", least=1), _list(full, "mlp_only_layers") or []
        return sum(i not in dense and (i + 1) % step == 0 for i in range(layers))
    if "moe_layer_interval" in full:  # ERNIE 4.5
        start, step = integer(full, "moe_layer_start_index"), integer(full, "moe_layer_interval", least=1)
        open_end = full.get("moe_layer_end_index") in (None, -1)
        last = layers - 1 if open_end else integer(full, "moe_layer_end_index")
        return sum(start <= i <= last and (i + 1) % step == 0 for i in range(layers))
    if isinstance(full.get("moe_layer_freq"), list):
        return sum(bool(flag) for flag in full["moe_layer_freq"][:layers])
    name = str(full.get("model_type"))
    usual = _FIRST_DENSE.get(name, _FIRST_DENSE.get(ALIASES.get(name, ""), 0))
    step = integer(full, "moe_layer_freq", least=1, default=1)
    first = integer(full, "first_k_dense_replace", "num_dense_layers", default=usual)
    return sum(i >= first and i % step == 0 for i in range(layers))


def _list(full: Raw, key: str) -> list[Any] | None:
    return None if full.get(key) is None else expect_list(key, full[key])


def linear_attention(full: Raw, *, layers: int, hidden: int) -> dict[str, float]:
    """Numbers of recurrent and convolution state per linear layer, and its parameters.

    Raises:
        MLAError: linear layers of a kind whose state the config.json does not describe.
    """
    zero = {"state_numbers": 0, "conv_numbers": 0, "linear_parameters": 0}
    if not layers:
        return {"linear_layers": 0, **zero}
    if "linear_num_value_heads" in full:
        # Gated DeltaNet of Qwen3-Next: fewer key than value heads.
        heads, width = (
            integer(full, "linear_num_value_heads", least=1),
            integer(full, "linear_key_head_dim", least=1),
        )
        keys = integer(full, "linear_num_key_heads", least=1) * width
        values = heads * integer(full, "linear_value_head_dim", least=1)
        kernel = integer(full, "linear_conv_kernel_dim", least=1, default=4)
        convolved = 2 * keys + values
        return _linear(
            layers, values * width, convolved, kernel, hidden * (convolved + 2 * values + 2 * heads)
        )
    nested = section(full, "linear_attn_config")
    names = {"num_heads": "linear_num_heads", "head_dim": "linear_head_dim"}
    told = {**full, **{names.get(key, key): value for key, value in nested.items()}}
    bailing = full.get("model_type") == "bailing_hybrid"
    if bailing:
        # Released configurations name the linear layers' width head_dim; saved by Transformers, they have
        # linear_head_dim, and head_dim is the rotary width.
        usual = (integer(full, "num_attention_heads", least=1), integer(full, "head_dim", default=128))
    else:
        usual = _LINEAR_HEADS.get(str(full.get("model_type")), (0, 0))
    heads = integer(told, "linear_num_heads", default=usual[0])
    width = integer(told, "linear_head_dim", default=usual[1])
    kernel = integer(told, "short_conv_kernel_size", "linear_conv_kernel_dim", least=1, default=4)
    if not heads or not width:
        raise MLAError(
            f"model_type {full.get('model_type')!r} has {layers} linear-attention layers whose state its "
            "config.json does not describe (expected linear_num_heads and linear_head_dim)"
        )
    all_heads = heads * width
    # Queries, keys, values, output; decay and gate are whole matrices in Bailing, elsewhere they pass a
    # bottleneck of one head's width (Kimi Delta Attention).
    weights = 4 * hidden * all_heads + hidden * heads
    weights += 2 * (hidden * all_heads if bailing else width * (hidden + all_heads))
    return _linear(layers, all_heads * width, 3 * all_heads, kernel, weights)


#: Heads and width of linear layers where the config.json of a family does not say.
_LINEAR_HEADS = {"kimi_linear": (32, 128), "glm5_next": (64, 128), "glm5_next_text": (64, 128)}


def _linear(layers: int, state: int, convolved: int, kernel: int, weights: int) -> dict[str, float]:
    return {
        "linear_layers": layers,
        "state_numbers": state,
        # Transformers keeps as many inputs as the kernel is long, the newest included.
        "conv_numbers": convolved * kernel,
        "linear_parameters": weights + convolved * kernel,
    }
