"""Multi-head Latent Attention for Python, for the machines people own."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mla.cache import LatentCache
    from mla.config import MLAConfig, RopeConfig
    from mla.errors import MLAError
    from mla.integrations.transformers import absorb, is_absorbed, restore
    from mla.nn import MultiheadLatentAttention

__version__ = "0.1.0"
__all__ = [
    "LatentCache",
    "MLAConfig",
    "MLAError",
    "MultiheadLatentAttention",
    "RopeConfig",
    "absorb",
    "is_absorbed",
    "restore",
]

# Where each name lives. Loaded at first use: `import mla` must not cost the import of torch.
_HOMES = {
    "LatentCache": "mla.cache",
    "MLAConfig": "mla.config",
    "MLAError": "mla.errors",
    "MultiheadLatentAttention": "mla.nn",
    "RopeConfig": "mla.config",
    "absorb": "mla.integrations.transformers",
    "is_absorbed": "mla.integrations.transformers",
    "restore": "mla.integrations.transformers",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'mla' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
