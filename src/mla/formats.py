"""How a latent cache stores its numbers: the formats by name, and their bytes. Level 0: no torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from mla.errors import MLAError


@dataclass(frozen=True)
class CacheFormat:
    """Bytes of a number of the latent, of one of the rotary key, of one of an indexer's key, and of a scale;
    ``block`` numbers of a latent share one, by default all."""

    number: float
    rope: float
    index: float
    scale: float
    block: int | None = None

    @property
    def row_multiple(self) -> int:
        """Rows with a scale start at multiples of its size in bytes; those without lie as they come."""
        return 4 if self.scale else 1

    def row_bytes(self, r: int, p: int) -> int:
        """Bytes of one token in one layer, a latent of r numbers and a rotary key of p."""
        scales = 1 if self.block is None else -(-r // self.block)
        size = int(r * self.number + p * self.rope + scales * self.scale)
        return -(-size // self.row_multiple) * self.row_multiple


def _plain(size: int) -> CacheFormat:
    return CacheFormat(size, size, size, 0)


#: The formats that :class:`mla.LatentCache` holds; docs/cache-format.md describes int8.
CACHE_FORMATS: Mapping[str, CacheFormat] = MappingProxyType(
    {"fp32": _plain(4), "fp16": _plain(2), "bf16": _plain(2), "int8": CacheFormat(1, 2, 2, 4)}
)


def cache_format(name: str) -> CacheFormat:
    """A format by name; raises MLAError with the known ones."""
    if name not in CACHE_FORMATS:
        raise MLAError(f"cache format: expected one of {', '.join(CACHE_FORMATS)}, got {name!r}")
    return CACHE_FORMATS[name]
