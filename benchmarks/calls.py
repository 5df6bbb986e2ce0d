"""The calls that are measured: inputs, our kernels on caches of every format, and what must come out.

Random latents and queries whose scores have a variance of one. All formats and peers compute the same call:
its queries and its cache are numbers that bf16 holds. int8, which rounds them, has a reference of its own.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from benchmarks import timing
from mla.formats import CACHE_FORMATS
from mla.ops import latent, native, reference
from tests.ops.cases import Case

FORMATS = ("bf16", "int8", "fp32")
# The attention of DeepSeek-V2 and V3, and of a small model (9 heads of 64) converted at rank 88.
DIMENSIONS = {"512+64": Case(h=16, n=128, r=512, p=64, v=128), "88+32": Case(h=9, n=64, r=88, p=32, v=64)}
SCORES = 2**24  # numbers of the largest score matrix of the reference


class Rows:
    """The cache of a call as ``LatentCache`` holds it, one row per token, in the formats asked for."""

    def __init__(self, b: int, t: int, r: int, p: int) -> None:
        self.r, self.p = r, p
        generator = torch.Generator().manual_seed(0)
        self.bf16 = torch.empty(b, t, r + p, dtype=torch.bfloat16)
        for sequence in self.bf16:
            sequence.copy_(torch.randn(t, r + p, generator=generator))

    @cached_property
    def fp32(self) -> Tensor:
        return self.bf16.float()

    @cached_property
    def int8(self) -> Tensor:
        rows = torch.zeros(*self.bf16.shape[:2], latent.row_bytes(self.r, self.p), dtype=torch.uint8)
        for row, numbers in zip(rows, self.bf16, strict=True):
            new = latent.split_rows(row[None], self.r, self.p)
            assert new.scale is not None
            new.c_kv[0], new.scale[0] = latent.quantise(numbers[:, : self.r])
            new.k_rope[0] = numbers[:, self.r :]
        return rows

    def views(self, name: str) -> latent.Latents:
        rows: Tensor = getattr(self, name)
        if name == "int8":
            return latent.split_rows(rows, self.r, self.p)
        return latent.Latents(rows[..., : self.r], rows[..., self.r :])

    def nbytes(self, name: str) -> float:
        b, t, _ = self.bf16.shape
        return float(b * t * CACHE_FORMATS[name].row_bytes(self.r, self.p))

    def numbers(self, name: str, i: int) -> Tensor:
        """[t, r + p] fp32, what format ``name`` says of sequence i."""
        views = self.views(name)
        scale = None if views.scale is None else views.scale[i]
        return torch.cat(latent.Latents(views.c_kv[i], views.k_rope[i], scale).numbers(torch.float32), -1)


@lru_cache(maxsize=1)  # the largest are gigabytes; cases that differ in heads and queries share one
def make_rows(b: int, t: int, r: int, p: int) -> Rows:
    return Rows(b, t, r, p)


class Call(ABC):
    """What both calls have: a cache, queries, kv_b_proj, and a reference."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.scale = case.scale
        self.rows = make_rows(case.b, case.t, case.r, case.p)
        self.q_nope, self.q_rope, self.weight = _queries(case)

    def cache_bytes(self, name: str) -> float:
        return self.rows.nbytes(name)

    @abstractmethod
    def reference(self, name: str) -> tuple[Tensor, Tensor]:
        """Output and lse in fp32 on the numbers that the format holds."""

    @cached_property
    def exact(self) -> tuple[Tensor, Tensor]:
        """The reference on the cache that bf16 and fp32 share."""
        return self.reference("bf16")

    @property
    def want(self) -> Tensor:
        return self.exact[0]


class DecodeCall(Call):
    """Absorbed attention of the last s tokens of b sequences over their t keys; output [b, s, h, r]."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        w_uk = self.weight.view(case.h, case.n + case.v, case.r)[:, : case.n]
        q_latent = torch.einsum("bshn,hnr->bshr", self.q_nope, w_uk)
        self._queries = torch.cat([q_latent, self.q_rope], -1).bfloat16()

    @property
    def operations(self) -> float:
        case = self.case
        return 2.0 * case.b * case.s * case.h * case.t * (2 * case.r + case.p)

    def rows_of(self, dtype: torch.dtype) -> Tensor:
        """[b, t, r + p] of bf16 or fp32 numbers, the same ones."""
        return self.rows.bf16 if dtype == torch.bfloat16 else self.rows.fp32

    def queries_of(self, dtype: torch.dtype) -> Tensor:
        """[b, s, h, r + p]."""
        return self._queries.to(dtype)

    def ours(self, name: str, isa: str, page: int = 0) -> Callable[[], tuple[Tensor, Tensor]]:
        """Our kernel on a cache of format ``name``; with ``page``, in pages in a random order."""
        case, held = self.case, self.rows.views(name)
        q = self.queries_of(torch.float32 if name == "fp32" else torch.bfloat16)
        q_latent, q_rope = q[..., : case.r], q[..., case.r :]
        tensors = {"c_kv": held.c_kv, "k_rope": held.k_rope, "latent_scale": held.scale}
        table = None
        if page:
            order = torch.randperm(case.b * case.t // page, generator=torch.Generator().manual_seed(2))
            table = torch.argsort(order).int().view(case.b, -1)
            rows: Tensor = getattr(self.rows, name)
            paged = rows.view(-1, page, rows.shape[-1])[order]
            split = latent.split_rows(paged, case.r, case.p) if name == "int8" else None
            tensors = {
                "c_kv": paged[..., : case.r] if split is None else split.c_kv,
                "k_rope": paged[..., case.r :] if split is None else split.k_rope,
                "latent_scale": None if split is None else split.scale,
            }
        lengths = torch.full((case.b,), case.t, dtype=torch.int32)

        def run() -> tuple[Tensor, Tensor]:
            return native.decode(
                q_latent,
                q_rope,
                lengths=lengths,
                scale=self.scale,
                page_table=table,
                isa=isa,
                **tensors,
            )

        return run

    def reference(self, name: str) -> tuple[Tensor, Tensor]:
        """A block of query rows at a time."""
        case = self.case
        b, s, h, t, r = case.b, case.s, case.h, case.t, case.r
        out, lse = torch.empty(b, s * h, r), torch.empty(b, s * h)
        queries = self.queries_of(torch.float32).view(b, s * h, -1) * self.scale
        key = torch.arange(t)
        for i in range(b):
            numbers = self.rows.numbers(name, i)
            for block in torch.arange(s * h).split(max(1, SCORES // t)):
                scores = queries[i, block] @ numbers.T
                if s > 1:  # row x is head x % h of query x // h
                    scores.masked_fill_(key > t - s + block[:, None] // h, -torch.inf)
                lse[i, block] = torch.logsumexp(scores, -1)
                out[i, block] = torch.softmax(scores, -1) @ numbers[:, :r]
        return out.view(b, s, h, r), lse.view(b, s, h)


class PrefillCall(Call):
    """Expanded causal attention of the last s of t keys; output [b, s, h, v]."""

    @property
    def operations(self) -> float:
        case = self.case
        pairs = case.s * case.t - case.s * (case.s - 1) // 2
        return (
            2.0 * case.b * case.h
            * (pairs * (case.n + case.p + case.v) + case.t * case.r * (case.n + case.v))
        )  # fmt: skip

    @property
    def c_kv(self) -> Tensor:
        return self.rows.views("bf16").c_kv

    @property
    def k_rope(self) -> Tensor:
        return self.rows.views("bf16").k_rope

    def ours(self, name: str, isa: str) -> Callable[[], tuple[Tensor, Tensor]]:
        case, held = self.case, self.rows.views(name)
        dtype = torch.float32 if name == "fp32" else torch.bfloat16
        # As a model has them: slices of the weight of kv_b_proj.
        w_uk, w_uv = self.weight.to(dtype).view(case.h, case.n + case.v, case.r).split([case.n, case.v], 1)
        q_nope, q_rope = self.q_nope.to(dtype), self.q_rope.to(dtype)
        lengths = torch.full((case.b,), case.t, dtype=torch.int32)

        def run() -> tuple[Tensor, Tensor]:
            return native.prefill(
                q_nope,
                q_rope,
                held.c_kv,
                held.k_rope,
                w_uk,
                w_uv,
                lengths,
                scale=self.scale,
                latent_scale=held.scale,
                isa=isa,
            )

        return run

    def reference(self, name: str) -> tuple[Tensor, Tensor]:
        """``ops.reference`` head by head: it builds every score of a call at once."""
        case = self.case
        w_uk, w_uv = self.weight.view(case.h, case.n + case.v, case.r).split([case.n, case.v], 1)
        c_kv, k_rope = self.rows.views(name).numbers(torch.float32)
        parts = [
            reference.expanded(
                self.q_nope[:, :, x : x + 1],
                self.q_rope[:, :, x : x + 1],
                c_kv,
                k_rope,
                w_uk[x : x + 1],
                w_uv[x : x + 1],
                scale=self.scale,
                causal=True,
            )
            for x in range(case.h)
        ]
        return torch.cat([out for out, _ in parts], 2), torch.cat([lse for _, lse in parts], 2)


def _queries(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """q_nope [b, s, h, n], q_rope [b, s, h, p], kv_b_proj [h·(n + v), r]: fp32, but bf16 numbers."""
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int, std: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator) * std).bfloat16().float()

    return (
        random(case.b, case.s, case.h, case.n),
        random(case.b, case.s, case.h, case.p),
        random(case.h * (case.n + case.v), case.r, std=case.r**-0.5),
    )


@dataclass
class Checked:
    """A call of our kernel that has given the right result."""

    run: Callable[[], tuple[Tensor, Tensor]]
    error: float  # of the output, against the cache as the format holds it
    moved: float  # the same against the bf16 cache: what the format costs


def check(what: str, run: Callable[[], tuple[Tensor, Tensor]], call: Call, name: str) -> Checked:
    """No green check, no number: a wrong result ends the program.

    Errors of the output are relative, norm over norm; that of the lse is absolute.
    """
    out, lse = run()
    want, want_lse = call.reference(name) if name == "int8" else call.exact
    error = timing.relative_error(out, want)
    rows = torch.linalg.vector_norm(out - want, dim=-1) / torch.linalg.vector_norm(want, dim=-1)
    found = {
        "output": error,
        "output's worst row": float(rows.max()),
        "lse": float((lse - want_lse).abs().max()),
    }
    # One wrong row of thousands is lost in the norm of all; a right one may err by more than all of them.
    most = timing.TOLERANCE[name]
    allowed = {"output": most, "output's worst row": 4 * most, "lse": 4 * most}
    for part, value in found.items():
        if not value <= allowed[part]:
            raise SystemExit(
                f"{what}: wrong result, error of the {part} {value:.1e} above {allowed[part]:.0e}: no figures"
            )
    return Checked(run, error, timing.relative_error(out, call.want))
