"""Modules to build new models with."""

from mla.nn.attention import MultiheadLatentAttention
from mla.nn.layers import RMSNorm

__all__ = ["MultiheadLatentAttention", "RMSNorm"]
