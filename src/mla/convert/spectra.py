"""How many directions the latent of every layer really needs, before any rank is chosen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mla.convert.checkpoint import attention_weights
from mla.convert.factorise import spectrum
from mla.convert.pipeline import embedded, hand_on, sample_inputs, terms_of
from mla.convert.rope_split import ladder, split_rope
from mla.convert.statistics import collect, teacher_block, teacher_starts

# Ranks at which what is left out is kept: a drawing needs no more.
_RANKS = 48


@dataclass(frozen=True)
class Spectrum:
    """The joint key and value energy of one layer, by directions of the latent, largest first.

    Attributes:
        directions_90, directions_99: how many directions hold 90% and 99% of it.
        ranks: at which ``left_out`` is given.
        left_out: share of the energy, 0 to 1, that a latent of that rank leaves out.
    """

    directions_90: int
    directions_99: int
    ranks: tuple[int, ...]
    left_out: tuple[float, ...]


def layer_spectra(
    teacher: PreTrainedModel,
    calibration: Tensor,
    *,
    rope: int,
    theta: float,
    on_progress: Callable[[str, float, float], None] | None = None,
) -> tuple[Spectrum, ...]:
    """Spectrum of every layer, front to back, of what the rotary key leaves to the latent.

    Args:
        teacher: a model that :func:`mla.convert.check_convertible` accepts.
        calibration: int64 token ids [w, t].
        rope: width p of the rotary key. ``theta``: its base.
        on_progress: called as (stage, layers done, layers in all).
    """
    found = []
    with torch.no_grad(), teacher.device:
        stream = embedded(teacher, calibration)
        layers = teacher.model.layers
        for layer, block in enumerate(layers):
            weights = attention_weights(teacher, layer)
            inputs = sample_inputs(weights, block, stream, range(len(calibration)))
            statistics = collect(weights, inputs)
            split = split_rope(statistics, weights.inv_freq, ladder(rope, theta))
            found.append(_summary(spectrum(terms_of(weights, statistics, split))))
            del statistics
            windows = (teacher_block(weights, x) for x in inputs.windows)
            hand_on(block, weights, stream, windows, teacher_starts(weights, inputs.starts))
            del inputs
            if on_progress is not None:
                on_progress("spectra", layer + 1, len(layers))
    return tuple(found)


def _summary(energy: Tensor) -> Spectrum:
    held = (energy.cumsum(0) / energy.sum().clamp(min=torch.finfo(energy.dtype).tiny)).clamp(max=1.0)
    count = len(energy)
    ranks = sorted({max(1, round(count * part / _RANKS)) for part in range(1, _RANKS + 1)})
    return Spectrum(
        directions_90=_first(held, 0.90),
        directions_99=_first(held, 0.99),
        ranks=tuple(ranks),
        left_out=tuple(float(1 - held[rank - 1]) for rank in ranks),
    )


def _first(held: Tensor, share: float) -> int:
    return min(int((held < share).sum()) + 1, len(held))
