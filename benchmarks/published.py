"""The published initialisations of MLA from MHA and GQA, re-implemented from their papers for comparison.

- TransMLA (arXiv 2502.07864): RoRoPE concentrates the keys' RoPE in few components by a principal component
  analysis over the key-value heads, FreqFold f does it over f neighbouring frequencies at once, the balance
  scales what lost RoPE down to the values' norm, and a joint principal component analysis cuts the rank.
- CARE (arXiv 2603.17946) at one rank for all layers, on TransMLA's RoPE: the decomposition of W C^½ with the
  covariance C of the activations.
- MHA2MLA (arXiv 2502.14837): every key-value head keeps RoPE on the pairs of largest 2-norm contribution, and
  the rest of the key weights and the value weights share one singular value decomposition.

Notation: b windows, t tokens, h heads, g key-value heads (G of them), d head width, D model width, r latent
rank, p rotary width. A rotary pair (j, j + d/2) is one complex number: its two parts are "real" and
"imaginary" below.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import DeepseekV3ForCausalLM, PreTrainedModel

from mla.convert.checkpoint import (
    LayerFactors,
    attention_weights,
    empty_student,
    head_dim,
    stream_scale,
    student_config,
    write_layer,
)
from mla.convert.statistics import AttentionWeights

# ------------------------------------------------------------------------------------------ calibration


@torch.no_grad()
def input_moments(model: PreTrainedModel, calibration: Tensor, *, batch: int = 8) -> Tensor:
    """Second moments E x xᵀ of what every attention block reads.

    Keys and values are linear in x, so every principal component analysis of their outputs follows from
    these. A block with biases reads one more number, 1 (:class:`AttentionWeights`).

    Args:
        model: Llama-type, or a student made here.
        calibration: int64 [b, t].
        batch: windows per forward pass.

    Returns:
        fp64 [layers, D, D].
    """
    layers = model.model.layers
    biased = any(name.endswith(".bias") for name, _ in layers[0].self_attn.named_parameters())
    width = model.config.hidden_size + biased
    sums = torch.zeros(len(layers), width, width, dtype=torch.float64)

    def watch(index: int) -> Any:
        def add(_: nn.Module, arguments: tuple[Tensor, ...], named: dict[str, Any]) -> None:
            x = (arguments[0] if arguments else named["hidden_states"]).flatten(0, 1).float()
            x = nn.functional.pad(x, (0, int(biased)), value=1.0)
            sums[index] += (x.T @ x).double()

        return add

    hooks = [
        layer.self_attn.register_forward_pre_hook(watch(index), with_kwargs=True)
        for index, layer in enumerate(layers)
    ]
    _run(model, calibration, batch, hooks)
    return sums / calibration.numel()


def _run(model: PreTrainedModel, calibration: Tensor, batch: int, hooks: list[RemovableHandle]) -> None:
    """One pass over the calibration windows, after which the hooks are gone."""
    try:
        for ids in calibration.split(batch):
            model.model(ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()


# --------------------------------------------------------------------------------------------- TransMLA


@dataclass(frozen=True)
class RopeSplit:
    """One layer's keys, split into rotary slots and a rest that is not rotated (fp64).

    Shapes: ``key_rope`` [p, D] and ``query_rope`` [h, p, D] in interleaved pairs; ``key_nope`` [G·d − p, D];
    ``read_out`` [g, d, G·d − p]: what a query of group g multiplies by, so that q · read_out · key_nope is
    the rest of its logit.
    """

    key_rope: Tensor
    query_rope: Tensor
    key_nope: Tensor
    read_out: Tensor


def rorope(weights: AttentionWeights, moments: Tensor, *, rope: int, fold: int) -> RopeSplit:
    """RoRoPE with FreqFold (TransMLA, arXiv 2502.07864).

    RoPE commutes with a real rotation across heads that both parts of a pair share. At each frequency this
    is the eigenbasis of the keys' second moments summed over both parts. With ``fold`` f, blocks of f
    neighbouring frequencies count as one frequency with f·G heads, of which the first f·p/d components keep
    RoPE. The p/2 slots turn at every (d/p)-th frequency of the teacher, which is the ladder of the same base.

    Args:
        weights: the block.
        moments: fp64 [D, D], of :func:`input_moments`.
        rope: p, even, at most d.
        fold: f; f·p/d must be whole and f must divide d/2. 1 is plain RoRoPE.

    Raises:
        ValueError: p and f do not fit.
    """
    d, G = weights.head_dim, weights.groups
    pairs = d // 2
    if rope % 2 or not 0 < rope <= d or fold < 1 or pairs % fold or (fold * rope) % d:
        raise ValueError(
            f"rope {rope} and fold {fold} do not fit a head width of {d}: "
            "expected a fold that divides d/2 and leaves fold·rope/d whole"
        )
    blocks, kept = pairs // fold, fold * rope // d
    # [part, block, member of the block, head, D]
    keys = weights.k.double().view(G, 2, blocks, fold, -1).permute(1, 2, 3, 0, 4)
    queries = weights.q.double().view(-1, 2, blocks, fold, weights.q.shape[-1])
    flat = keys.flatten(2, 3)
    basis = torch.linalg.eigh((flat @ moments @ flat.mT).sum(0)).eigenvectors.flip(-1)
    keys = basis.mT @ flat  # [part, block, component, D]
    by_group = basis.view(blocks, fold, G, fold * G).permute(2, 0, 1, 3)  # [g, block, member, component]
    group = weights.group
    query_rope = torch.einsum("hblc,hpblD->hbcpD", by_group[group][..., :kept], queries)
    rest = fold * G - kept
    read_out = torch.zeros(G, 2, blocks, fold, 2, blocks, rest, dtype=torch.float64)
    for part in range(2):
        for block in range(blocks):
            read_out[:, part, block, :, part, block] = by_group[:, block, :, kept:]
    return RopeSplit(
        key_rope=keys[:, :, :kept].permute(1, 2, 0, 3).reshape(rope, -1),
        query_rope=query_rope.reshape(weights.heads, rope, -1),
        key_nope=keys[:, :, kept:].reshape(2 * blocks * rest, weights.k.shape[-1]),
        read_out=read_out.view(G, d, 2 * blocks * rest),
    )


def joint_pca(
    key_nope: Tensor, value: Tensor, moments: Tensor, rank: int, *, balance: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Low rank of keys and values together, from outputs on calibration text (TransMLA, arXiv 2502.07864).

    The left singular vectors of W C^½ are the eigenvectors of W C Wᵀ, so without the balance this is also
    CARE's decomposition of C^½ Wᵀ.

    Args:
        key_nope: [n, D]. ``value``: [m, D]. ``moments``: C, fp64 [D, D].
        rank: at most n + m.
        balance: first scale the keys to the values' norm over this; None leaves them as they are.

    Returns:
        The latent's rows [r, D], and the maps from it to keys [n, r] and values [m, r].
    """
    if rank > len(key_nope) + len(value):
        raise ValueError(f"rank {rank} is more than the {len(key_nope) + len(value)} rows of keys and values")

    def energy(rows: Tensor) -> float:
        return float(((rows @ moments) * rows).sum())

    scale = 1.0 if balance is None else balance * (energy(key_nope) / energy(value)) ** 0.5
    scale = scale or 1.0  # where RoPE kept all of the keys
    stack = torch.cat([key_nope / scale, value])
    up = torch.linalg.eigh(stack @ moments @ stack.T).eigenvectors.flip(-1)[:, :rank]
    return up.T @ stack, up[: len(key_nope)] * scale, up[len(key_nope) :]


def transmla(
    teacher: PreTrainedModel,
    moments: Tensor,
    *,
    rope: int,
    fold: int,
    rank: int | None = None,
    balance: float | None = 1.0,
    cut_moments: Tensor | None = None,
) -> DeepseekV3ForCausalLM:
    """A stock student by TransMLA, or by CARE with ``balance`` None.

    Args:
        teacher: Llama-type, not changed.
        moments: fp64 [layers, D, D], of :func:`input_moments` of the teacher.
        rope: p. ``fold``: FreqFold. See :func:`rorope`.
        rank: r; None keeps it whole, which leaves partial RoPE alone.
        balance: see :func:`joint_pca`.
        cut_moments: like ``moments``, for the rank: those of the model with partial RoPE.
    """
    config = teacher.config
    d = head_dim(config)
    groups = config.num_key_value_heads
    if rank is None:
        rank = 2 * groups * d - rope
    student = empty_student(
        teacher,
        student_config(teacher, rank=rank, rope=rope, nope=d, theta=config.rope_parameters["rope_theta"]),
    )
    for layer in range(config.num_hidden_layers):
        weights = attention_weights(teacher, layer)
        split = rorope(weights, moments[layer], rope=rope, fold=fold)
        latent, to_key, to_value = joint_pca(
            split.key_nope,
            weights.v.double().flatten(0, 1),
            (moments if cut_moments is None else cut_moments)[layer],
            rank,
            balance=balance,
        )
        group = weights.group
        factors = LayerFactors(
            latent=latent,
            key_rope=split.key_rope,
            query_nope=weights.q.double(),
            query_rope=split.query_rope,
            key_nope=(split.read_out @ to_key)[group],
            value=to_value.view(groups, d, rank)[group],
            output=weights.o.double(),
        )
        write_layer(student, layer, factors, constant=weights.constant, stream=stream_scale(teacher))
    return student


# ---------------------------------------------------------------------------------------------- MHA2MLA


@torch.no_grad()
def pair_contributions(teacher: PreTrainedModel, calibration: Tensor, *, batch: int = 8) -> Tensor:
    """mean‖q_j‖ · mean‖k_j‖ of every rotary pair (MHA2MLA, arXiv 2502.14837, "2-norm contribution").

    The bound that Cauchy and Schwarz give for what a pair adds to the logits. The query heads of a group are
    averaged.

    Args:
        teacher: Llama-type.
        calibration: int64 [b, t].
        batch: windows per forward pass.

    Returns:
        fp64 [layers, g, d/2].
    """
    blocks = [layer.self_attn for layer in teacher.model.layers]
    d = head_dim(teacher.config)
    sums: dict[nn.Module, Tensor] = {}

    def add(module: nn.Module, _: Any, output: Tensor) -> None:
        pairs = output.double().view(-1, output.shape[-1] // d, 2, d // 2)
        sums[module] = sums.get(module, 0) + pairs.square().sum(2).sqrt().sum(0)

    watched = [linear for block in blocks for linear in (block.q_proj, block.k_proj)]
    hooks = [linear.register_forward_hook(add) for linear in watched]
    _run(teacher, calibration, batch, hooks)
    groups = teacher.config.num_key_value_heads
    queries = torch.stack([sums[block.q_proj].view(groups, -1, d // 2).mean(1) for block in blocks])
    keys = torch.stack([sums[block.k_proj] for block in blocks])
    return queries * keys / calibration.numel() ** 2


class PartialRopeAttention(nn.Module):
    """Attention over one latent and a rotary key per key-value head, each with frequencies of its own.

    Per token it would cache the latent [r] and G rotary keys [p']; it keeps no cache, as evaluations read
    whole windows. Arguments are those of Llama's attention.

    Args:
        weights: the block.
        kept: int64 [g, p'/2], the pairs that stay rotated.
        rank: r, of the joint decomposition of keys without RoPE and values.
        output: the block's output projection.
    """

    def __init__(self, weights: AttentionWeights, kept: Tensor, rank: int, output: nn.Module) -> None:
        super().__init__()
        G, d = weights.groups, weights.head_dim
        half = d // 2
        rotated = torch.zeros(G, half, dtype=torch.bool).scatter_(1, kept, True)
        order = torch.arange(half).expand(G, half)
        kept = order[rotated].view(G, -1)  # in ascending order, like the rest
        left = order[~rotated].view(G, -1)
        rope = torch.cat([kept, kept + half], dim=1)  # [g, p'], halves as in Llama
        nope = torch.cat([left, left + half], dim=1)
        group = weights.group

        def pick(rows: Tensor, index: Tensor) -> Tensor:
            return rows.gather(1, index[:, :, None].expand(-1, -1, rows.shape[-1]))

        stack = torch.cat([pick(weights.k, nope).flatten(0, 1), weights.v.flatten(0, 1)]).double()
        left_vectors, values, right = torch.linalg.svd(stack, full_matrices=False)
        if rank > len(values):
            raise ValueError(f"rank {rank} is more than the {len(values)} that the weights have")
        up = left_vectors[:, :rank] * values[:rank]
        self.kept = kept
        self.group = group
        self.query_rope = nn.Parameter(pick(weights.q, rope[group]))
        self.query_nope = nn.Parameter(pick(weights.q, nope[group]))
        self.key_rope = nn.Parameter(pick(weights.k, rope))
        self.latent = nn.Parameter(right[:rank].float())
        self.key_nope = nn.Parameter(up[: nope.numel()].float().view(G, -1, rank))
        self.value = nn.Parameter(up[nope.numel() :].float().view(G, d, rank))
        self.o_proj = output
        self.inputs, self.constant = weights.inputs, weights.constant

    @property
    def cached(self) -> int:
        """Numbers that a cache would hold per token: the latent and G rotary keys."""
        return len(self.latent) + self.key_rope.shape[0] * self.key_rope.shape[1]

    def forward(
        self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], **_: Any
    ) -> tuple[Tensor, None]:
        cos, sin = (
            table[:, :, self.kept].transpose(1, 2) for table in position_embeddings
        )  # [b, g, t, p'/2]

        def project(rows: Tensor, x: Tensor) -> Tensor:
            return torch.einsum("bti,hni->bhtn", x, rows)

        def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
            first, second = x.chunk(2, dim=-1)
            return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

        group = self.group
        hidden_states = self.inputs(hidden_states)
        latent = hidden_states @ self.latent.T
        query = torch.cat(
            [
                rotate(project(self.query_rope, hidden_states), cos[:, group], sin[:, group]),
                project(self.query_nope, hidden_states),
            ],
            dim=-1,
        )
        key = torch.cat(
            [rotate(project(self.key_rope, hidden_states), cos, sin), project(self.key_nope, latent)], dim=-1
        )
        mixed = nn.functional.scaled_dot_product_attention(
            query, key[:, group], project(self.value, latent)[:, group], is_causal=True
        )
        # The constant holds the output's own bias, if there is one.
        return mixed.transpose(1, 2).flatten(2) @ self.o_proj.weight.T + self.constant, None


def mha2mla(
    teacher: PreTrainedModel, contributions: Tensor, *, rope: int, rank: int | None = None
) -> PreTrainedModel:
    """A copy of the teacher with MHA2MLA's attention before any training.

    Args:
        teacher: Llama-type, not changed.
        contributions: fp64 [layers, g, d/2], of :func:`pair_contributions`.
        rope: p', even, per key-value head: G·p' + r numbers are cached.
        rank: r; None keeps it whole, which leaves partial RoPE alone.
    """
    model = copy.deepcopy(teacher)
    d, groups = head_dim(teacher.config), teacher.config.num_key_value_heads
    if rope % 2 or not 0 <= rope <= d:
        raise ValueError(f"rope must be even and between 0 and {d}, got {rope}")
    for index, layer in enumerate(model.model.layers):
        kept = contributions[index].topk(rope // 2, dim=-1).indices
        weights = attention_weights(teacher, index)
        most = min(groups * (2 * d - rope), weights.k.shape[-1])
        layer.self_attn = PartialRopeAttention(
            weights, kept, most if rank is None else rank, layer.self_attn.o_proj
        )
    return model.eval()
