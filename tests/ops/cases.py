"""Random inputs of MLA attention that tests and benchmarks share."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mla.ops import native, portable


@dataclass(frozen=True)
class Case:
    """Sizes of one attention call, in the alphabet of ``mla.ops.reference``."""

    b: int = 1
    s: int = 1
    t: int = 33
    h: int = 3
    n: int = 8
    r: int = 24
    p: int = 6
    v: int = 10

    def inputs(
        self, dtype: torch.dtype = torch.float32, seed: int = 0, requires_grad: bool = False
    ) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)

        def random(*shape: int, std: float = 1.0) -> Tensor:
            x = torch.randn(shape, generator=generator, dtype=torch.float64) * std
            return x.to(dtype).requires_grad_(requires_grad)

        return {
            "q_nope": random(self.b, self.s, self.h, self.n),
            "q_rope": random(self.b, self.s, self.h, self.p),
            "c_kv": random(self.b, self.t, self.r),
            "k_rope": random(self.b, self.t, self.p),
            "w_uk": random(self.h, self.n, self.r, std=self.r**-0.5),
            "w_uv": random(self.h, self.v, self.r, std=self.r**-0.5),
        }

    @property
    def scale(self) -> float:
        return (self.n + self.p) ** -0.5


CASES = {
    "one token": Case(),
    "one key": Case(t=1),
    "several tokens, ragged sizes": Case(b=2, s=5, t=37),
    "prefill": Case(b=2, s=40, t=40),
    "chunk on a prefix": Case(b=1, s=300, t=900),
    "more queries than keys": Case(s=7, t=3),
    "no keys": Case(s=2, t=0),
    "no queries": Case(s=0, t=5),
    "no sequences": Case(b=0, s=2, t=5),
    "nothing": Case(b=0, s=0, t=0),
    "no rope": Case(s=4, t=9, p=0),
    "one head": Case(s=4, t=9, h=1),
    "heads of a converted model": Case(s=3, t=130, h=9, n=64, r=88, p=32, v=64),
    "DeepSeek-V2-Lite": Case(s=2, t=70, h=16, n=128, r=512, p=64, v=128),
    "longer than a tile": Case(s=1, t=9000, h=2),
}


def record_paths(monkeypatch: Any) -> list[tuple[str, str]]:
    """A list that grows by (engine, path) with every attention call that follows."""
    calls: list[tuple[str, str]] = []

    def record(engine: str, module: Any, function: str, path: str) -> None:
        run = getattr(module, function)

        def recorded(*args: Any, **options: Any) -> Any:
            calls.append((engine, path))
            return run(*args, **options)

        monkeypatch.setattr(module, function, recorded)

    record("kernels", native, "absorbed", "absorbed")
    record("kernels", native, "prefill", "expanded")
    record("torch", portable, "absorbed", "absorbed")
    record("torch", portable, "expanded", "expanded")
    return calls
