"""Modules to build new models with."""

from mla.nn.attention import MultiheadLatentAttention, RMSNorm

__all__ = ["MultiheadLatentAttention", "RMSNorm"]
