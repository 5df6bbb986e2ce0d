"""Caches that hold latents and nothing else."""

from mla.cache.contiguous import LatentCache

__all__ = ["LatentCache"]
