"""Keys and values of one layer through one latent, both measured as squared error of the block's output.

The student reads c = A z, keys U_h c, values Y_h c. With S_h the second moments of the queries that meet the
position-free keys and M_h = O_hᵀ O_h, the error is

    J = Σ_h tr[S_h (K_h − U_h A) C_h (K_h − U_h A)ᵀ] + Σ_h tr[M_h (V_h − Y_h A) B_h (V_h − Y_h A)ᵀ].

C_h and B_h differ: logits feel differences between tokens, values feel attention's averages. For one common
covariance the answer is a singular value decomposition; from there, alternate: for a given A the read-outs
have a closed form, for given read-outs A solves a linear system (conjugate gradients). Both terms have the
same unit, so nothing balances keys against values.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Conjugate gradient steps per alternation.
_STEPS = 6


@dataclass(frozen=True)
class Terms:
    """One quadratic form per row: targets [i, d, m], metric [i, d, d] over d, cov [i, m, m] over z. fp64."""

    targets: Tensor
    metric: Tensor
    cov: Tensor


@dataclass(frozen=True)
class Factors:
    """c = encoder · z, encoder [r, m]; targets_i ≈ decoders[i] · c, decoders [i, d, r]. fp64."""

    encoder: Tensor
    decoders: Tensor


def factorise(terms: Terms, rank: int, *, rounds: int = 2) -> Factors:
    """Best shared encoder of ``rank`` rows for all terms.

    Args:
        terms: what must come out of the latent, and in which metric.
        rank: rows of the encoder; what the targets do not need is padded with zeros.
        rounds: alternations after the decomposition.

    Returns:
        Encoder and decoders.
    """
    m = terms.cov.shape[1]
    span = _row_space(terms.targets)
    if span.shape[0] <= rank:  # nothing to lose: no covariance may blur an exact answer
        inner, encoder, decoders = span.shape[0], span, terms.targets @ span.T
    else:
        inner = rank
        encoder = _start(terms, inner)
        for _ in range(rounds):
            encoder = _improve(terms, encoder, _read_out(terms, encoder))
        decoders = _read_out(terms, encoder)
    if inner < rank:
        encoder = torch.cat([encoder, encoder.new_zeros(rank - inner, m)])
        decoders = torch.cat([decoders, decoders.new_zeros(*decoders.shape[:2], rank - inner)], dim=2)
    return Factors(encoder, decoders)


def _row_space(targets: Tensor) -> Tensor:
    """Orthonormal rows [n, m] that span all targets."""
    rows = targets.flatten(0, 1)
    values, vectors = torch.linalg.eigh(rows.T @ rows)
    # eigh squares the singular values: 1e-13 here is 3e-7 of the largest one.
    span: Tensor = vectors[:, values > values[-1].clamp(min=1e-300) * 1e-13].T.contiguous()
    return span


def spectrum(terms: Terms) -> Tensor:
    """How much of J each direction of the latent can carry, fp64 [m], largest first.

    The eigenvalues of the joint key and value energy under the average covariance, where :func:`factorise`
    starts: a latent of rank r leaves out about the sum of all but the first r.
    """
    seen, _ = _joint_energy(terms)
    values: Tensor = torch.linalg.eigvalsh(seen).flip(0).clamp(min=0)
    return values


def _start(terms: Terms, rank: int) -> Tensor:
    """Principal directions under the average covariance, rows whitened by it."""
    seen, whitener = _joint_energy(terms)
    directions = torch.linalg.eigh(seen).eigenvectors[:, -rank:].flip(1)
    encoder: Tensor = directions.T @ whitener
    return encoder


def _joint_energy(terms: Terms) -> tuple[Tensor, Tensor]:
    """Σ_i scale_i · KᵀSK as whitened inputs see it, and what whitens them; both [m, m]."""
    scale = torch.einsum("imm->i", terms.cov)
    common = torch.einsum("imk,i->mk", terms.cov, 1 / scale) / len(scale)
    values, vectors = torch.linalg.eigh(common)
    values = values.clamp(min=values[-1] * 1e-10)
    load = torch.einsum("i,idm,ide,iek->mk", scale, terms.targets, terms.metric, terms.targets)
    root = values.sqrt()
    seen = root[:, None] * (vectors.T @ load @ vectors) * root[None, :]
    return seen, values.rsqrt()[:, None] * vectors.T


def _read_out(terms: Terms, encoder: Tensor) -> Tensor:
    """Closed form of the decoders: targets · C Aᵀ (A C Aᵀ)⁻¹."""
    decoders = []
    for targets, cov in zip(terms.targets, terms.cov, strict=True):  # those of all heads are large
        through = cov @ encoder.T  # [m, r]
        gram = encoder @ through
        gram.diagonal().add_(1e-9 * gram.diagonal().mean())
        decoders.append(torch.linalg.solve(gram, (targets @ through).mT).mT)
    return torch.stack(decoders)


def _improve(terms: Terms, encoder: Tensor, decoders: Tensor) -> Tensor:
    """Conjugate gradients on the encoder, Σ_i UᵢᵀSᵢUᵢ A Cᵢ = Σ_i UᵢᵀSᵢ Kᵢ Cᵢ, starting from the present
    one."""
    weighted = decoders.mT @ terms.metric  # [i, r, d]

    def apply(x: Tensor) -> Tensor:
        total = torch.zeros_like(x)
        for outer, inner, cov in zip(weighted, decoders, terms.cov, strict=True):
            total += outer @ (inner @ (x @ cov))
        return total

    x = encoder
    residual = -apply(x)
    for outer, targets, cov in zip(weighted, terms.targets, terms.cov, strict=True):
        residual += outer @ (targets @ cov)
    # Diagonal preconditioner: rows see Σ left, columns Σ cov.
    rows = (weighted * decoders.mT).sum(-1)
    columns = terms.cov.diagonal(dim1=1, dim2=2)
    scale = torch.einsum("ir,im->rm", rows, columns)
    scale = scale.clamp(min=float(scale.max()) * 1e-12)
    z = residual / scale
    direction = z
    power = (residual * z).sum()
    for _ in range(_STEPS):
        image = apply(direction)
        curvature = (direction * image).sum()
        if not curvature > 0:
            break
        step = power / curvature
        x = x + step * direction
        residual = residual - step * image
        z = residual / scale
        new_power = (residual * z).sum()
        direction = z + (new_power / power) * direction
        power = new_power
    return x
