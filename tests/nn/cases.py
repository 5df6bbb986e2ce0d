"""Small modules and inputs that the tests of ``mla.nn`` share."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mla.config import MLAConfig, RopeConfig
from mla.nn import MultiheadLatentAttention

#: Pairwise different on purpose: a mix-up of two of them cannot pass.
SIZES: dict[str, int] = {
    "hidden_size": 52,
    "num_attention_heads": 3,
    "kv_lora_rank": 40,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 20,
}
YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "factor": 8.0,
    "original_max_position_embeddings": 16,
    "mscale": 1.0,
    "mscale_all_dim": 0.8,
}


def make_config(*, layout: str = "interleaved", rope: str = "default", **changes: Any) -> MLAConfig:
    rope_config = RopeConfig(layout=layout, **(YARN if rope == "yarn" else {}))
    return MLAConfig(**{**SIZES, "rope": rope_config, **changes})


def build(
    *,
    layer_idx: int = 0,
    context_size: int | None = None,
    recompute_kv: bool = False,
    attention_dropout: float = 0.0,
    **config: Any,
) -> MultiheadLatentAttention:
    """A module whose weights depend on its shapes only: the same call gives the same weights."""
    module = MultiheadLatentAttention(
        make_config(**config),
        layer_idx=layer_idx,
        context_size=context_size,
        recompute_kv=recompute_kv,
        attention_dropout=attention_dropout,
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            std = parameter.shape[-1] ** -0.5 if parameter.ndim == 2 else 0.3
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std + (parameter.ndim == 1))
    return module


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def poison_new_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on every buffer that ``Tensor.new_empty`` makes, a cache's for one, starts as NaN."""
    new_empty = torch.Tensor.new_empty

    def poisoned(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        buffer = new_empty(self, *args, **kwargs)
        return buffer.fill_(torch.nan) if buffer.is_floating_point() else buffer

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
