"""The stock checkpoint: a dense ``DeepseekV3ForCausalLM`` that computes what the factors say.

Three constants of the target have no place in a Llama model and are folded away exactly.

The latent norm. DeepSeek norms the latent, a converted latent has no norm. The latent rows are written 2^-30
smaller, so that mean(c²) vanishes beside the norm's eps and the norm is the factor eps^-½; its gain undoes
both. A gain of sqrt(eps)·2^30 would be rounded in bf16 and tilt every key and value by 5e-4, so the gain is
the power of two beside it and the rows carry the rest. fp16 has no 2^-30.

The norms' eps. Transformers fixes the latent norm's eps at 1e-6, vLLM reads ``rms_norm_eps`` for it, so that
key must be 1e-6. Many Llama models have 1e-5 for their layer norms. A norm with eps e of a stream x equals
one with eps f of the stream sqrt(f/e)·x, so everything that writes to the residual stream (embedding,
attention output, MLP output) is scaled by sqrt(f/e), and nothing else changes.

Biases (Qwen2). The target's ``attention_bias`` gives one to ``kv_a_proj_with_mqa`` and to ``o_proj``: the
bias of keys fits the first, those of values and output together the second. The bias of queries has no
place until the query has a low-rank projection, whose first half has a bias too: it hands on the input and
a 1, scaled like the latent, and the second half is the query projection with the bias as one more column.
All of it is exact. Transformers loads it; vLLM has no biases in its DeepSeek and would leave them out.

llama.cpp. Its loader asks every DeepSeek of another depth than V2-Lite's for a low-rank query projection: a
split query is the same without the bias, its first half hands on the input. It also asks for more experts
than groups.

The scale. The target divides logits by sqrt(nope + rope), the teacher by sqrt(d): the ratio goes into q.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, PreTrainedModel

from mla.config import RopeConfig, rope_from_dict
from mla.convert.rope_split import ladder
from mla.convert.statistics import AttentionWeights
from mla.ops.rope import inverse_frequencies

LATENT_NORM_EPS = 1e-6
LATENT_GAIN = 2.0**20
LATENT_SCALE = math.sqrt(LATENT_NORM_EPS) / LATENT_GAIN  # 1.024 * 2^-30


@dataclass(frozen=True)
class LayerFactors:
    """The converted attention of one layer before any folding; real fp64, logits still over sqrt(d).

    Shapes: ``latent`` [r, D], ``key_rope`` [p, D] and ``query_rope`` [h, p, D] in interleaved pairs,
    ``query_nope`` [h, n, D], ``key_nope`` [h, n, r], ``value`` [h, d, r], ``output`` [h, D, d]. With biases
    the factors that read the input have one more column (:class:`AttentionWeights`).
    """

    latent: Tensor
    key_rope: Tensor
    query_nope: Tensor
    query_rope: Tensor
    key_nope: Tensor
    value: Tensor
    output: Tensor


def student_config(
    teacher: PreTrainedModel, *, rank: int, rope: int, nope: int, theta: float, split_query: bool = False
) -> DeepseekV3Config:
    """Config of the dense stock model with latent ``rank``, rotary width ``rope`` and base ``theta``."""
    config = teacher.config
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    biased = has_biases(teacher)
    student = DeepseekV3Config(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        hidden_act=config.hidden_act,
        max_position_embeddings=config.max_position_embeddings,
        initializer_range=config.initializer_range,
        rms_norm_eps=LATENT_NORM_EPS,
        kv_lora_rank=rank,
        q_lora_rank=config.hidden_size + biased if biased or split_query else None,
        qk_nope_head_dim=nope,
        qk_rope_head_dim=rope,
        v_head_dim=head_dim(config),
        rope_parameters={"rope_type": "default", "rope_theta": float(theta)},
        rope_interleave=True,
        attention_bias=biased,
        attention_dropout=config.attention_dropout,
        tie_word_embeddings=False,
        # Dense throughout: the expert fields only have to be integers that loaders can read.
        first_k_dense_replace=layers,
        n_routed_experts=2,
        n_shared_experts=1,
        num_experts_per_tok=1,
        n_group=1,
        topk_group=1,
        moe_intermediate_size=config.intermediate_size,
        num_nextn_predict_layers=0,
        pad_token_id=config.pad_token_id,
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        use_cache=True,
    )
    student.architectures = ["DeepseekV3ForCausalLM"]
    return student


def head_dim(config: object) -> int:
    """Width of one head; a null or absent ``head_dim`` means hidden_size / num_attention_heads."""
    width = getattr(config, "head_dim", None)
    if width is None:
        width = config.hidden_size // config.num_attention_heads  # type: ignore[attr-defined]
    return int(width)


def cached_numbers(config: object) -> int:
    """What the teacher caches per token and layer: keys and values of every key-value head, 2·G·d numbers."""
    groups = config.num_key_value_heads or config.num_attention_heads  # type: ignore[attr-defined]
    return int(2 * groups * head_dim(config))


def teacher_frequencies(config: Any) -> Tensor:
    """The teacher's rotary frequencies, fp64 [d/2], scaled where its config says so (Llama 3.1 and later)."""
    d, theta = head_dim(config), float(config.rope_parameters["rope_theta"])
    if config.rope_parameters.get("rope_type", "default") == "default":
        return ladder(d, theta)
    scaled = rope_from_dict(config.rope_parameters, layout="half", theta=theta, rope_dim=d)
    plain = RopeConfig(layout="half", theta=theta)
    # Both in fp32, so that the ratio of a pair that the scaling leaves alone is 1 exactly.
    slowed = inverse_frequencies(scaled, d) / inverse_frequencies(plain, d)
    found = ladder(d, theta)
    return found * slowed.to(found)


def has_biases(teacher: PreTrainedModel) -> bool:
    """Whether queries, keys and values have biases: all of them have, or none."""
    return teacher.model.layers[0].self_attn.q_proj.bias is not None


def attention_weights(teacher: PreTrainedModel, layer: int) -> AttentionWeights:
    """One teacher block as fp32 matrices (copies when the teacher is not fp32)."""
    config, block = teacher.config, teacher.model.layers[layer].self_attn
    d, width = head_dim(config), config.hidden_size

    def rows(linear: torch.nn.Linear, *, bias: bool) -> Tensor:
        found = linear.weight.detach().float()
        if has_biases(teacher):
            last = linear.bias.detach().float()[:, None] if bias else found.new_zeros(len(found), 1)
            found = torch.cat([found, last], dim=1)
        return found.view(-1, d, found.shape[1])

    constant = block.o_proj.weight.new_zeros(width, dtype=torch.float32)
    if block.v_proj.bias is not None:
        value = block.v_proj.bias.detach().float().view(-1, d)
        each = value.repeat_interleave(config.num_attention_heads // len(value), 0).flatten()
        constant += block.o_proj.weight.detach().float() @ each
    if block.o_proj.bias is not None:
        constant += block.o_proj.bias.detach().float()
    return AttentionWeights(
        q=rows(block.q_proj, bias=True),
        k=rows(block.k_proj, bias=True),
        v=rows(block.v_proj, bias=False),
        o=block.o_proj.weight.detach().float().view(width, -1, d).transpose(0, 1).contiguous(),
        inv_freq=teacher_frequencies(config),
        constant=constant,
    )


def empty_student(teacher: PreTrainedModel, config: DeepseekV3Config) -> DeepseekV3ForCausalLM:
    """A student (fp32, on the teacher's device) with everything of the teacher but the attention, which
    :func:`write_layer` fills.

    The residual stream is scaled for the change of the norms' eps (see the module's text), except for the
    part that the attention writes.
    """
    stream = stream_scale(teacher)
    with torch.device("meta"):
        student = DeepseekV3ForCausalLM(config)
    student = student.to_empty(device=teacher.device).float()
    _restore_buffers(student)
    source, target = teacher.model, student.model
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.fill_(math.nan)  # whatever is forgotten below shows at once
        target.embed_tokens.weight.copy_(source.embed_tokens.weight.float() * stream)
        target.norm.weight.copy_(source.norm.weight)
        student.lm_head.weight.copy_(teacher.get_output_embeddings().weight)
        for old, new in zip(source.layers, target.layers, strict=True):
            new.input_layernorm.weight.copy_(old.input_layernorm.weight)
            new.post_attention_layernorm.weight.copy_(old.post_attention_layernorm.weight)
            new.mlp.gate_proj.weight.copy_(old.mlp.gate_proj.weight)
            new.mlp.up_proj.weight.copy_(old.mlp.up_proj.weight)
            new.mlp.down_proj.weight.copy_(old.mlp.down_proj.weight.float() * stream)
    student.generation_config = copy.deepcopy(teacher.generation_config)
    return student.eval()


def stream_scale(teacher: PreTrainedModel) -> float:
    """Factor on the residual stream that turns the teacher's norm eps into the target's."""
    eps = float(teacher.config.rms_norm_eps)
    # 1e-6 that went through fp32 (GGUF) is 1e-6.
    return 1.0 if abs(eps / LATENT_NORM_EPS - 1) < 1e-5 else math.sqrt(LATENT_NORM_EPS / eps)


def write_layer(
    student: DeepseekV3ForCausalLM, layer: int, factors: LayerFactors, *, constant: Tensor, stream: float
) -> None:
    """Fold and store one layer's factors, and its constant output [D], in place."""
    block = student.model.layers[layer].self_attn
    H, n, _ = factors.query_nope.shape
    d, p = factors.value.shape[1], factors.key_rope.shape[0]
    scale = math.sqrt((n + p) / d)
    query = torch.cat([factors.query_nope, factors.query_rope], dim=1).flatten(0, 1) * scale
    latent = torch.cat([factors.latent * LATENT_SCALE, factors.key_rope])
    with torch.no_grad():
        # Powers of two in the half of a split query that bf16 rounds alike for all, the rest in the other.
        unit = 2.0**-30
        if student.config.q_lora_rank is None:
            block.q_proj.weight.copy_(query)
        else:
            block.q_a_proj.weight.zero_().fill_diagonal_(unit)
            block.q_a_layernorm.weight.fill_(LATENT_GAIN)
            block.q_b_proj.weight.copy_(query * (LATENT_SCALE / unit))
        if student.config.attention_bias:
            block.q_a_proj.bias.zero_()[-1] = unit
            latent, last = latent[:, :-1], latent[:, -1]
            block.kv_a_proj_with_mqa.bias.copy_(last)
            block.o_proj.bias.copy_(constant * stream)
        block.kv_a_proj_with_mqa.weight.copy_(latent)
        block.kv_a_layernorm.weight.fill_(LATENT_GAIN)
        block.kv_b_proj.weight.copy_(torch.cat([factors.key_nope, factors.value], dim=1).flatten(0, 1))
        block.o_proj.weight.copy_(factors.output.transpose(0, 1).reshape(-1, H * d) * stream)


def _restore_buffers(student: DeepseekV3ForCausalLM) -> None:
    """Recompute what ``to_empty`` left undefined: the rotary frequencies are no parameters."""
    student.model.rotary_emb = type(student.model.rotary_emb)(student.config).to(student.device)
