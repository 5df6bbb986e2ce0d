"""Calls of the native kernels that several tests share, their reference, and how close the two must be.

Caches come in every format and layout. Whatever a kernel may not read is poison: NaN, or 127 in int8 numbers
whose factor is NaN; entries of a page table beyond a sequence are a page that does not exist.
"""

import os
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

from mla.ops import native, reference
from tests.ops.cases import Case

# MLA_ISA narrows the tests down to one instruction set.
ISAS = (os.environ["MLA_ISA"],) if os.environ.get("MLA_ISA") else native.instruction_sets()
OPERATORS = ("decode", "absorbed", "prefill")
FORMATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}
NO_PAGE = 2147480000
IDENTITIES = 2**21  # numbers in the weights that make reference.absorbed an attention of given latent queries


@dataclass(frozen=True)
class Options:
    """How a call lays out its arguments, besides its sizes and the format of its cache."""

    queries: str = "fp32"
    weights: str = ""  # as the queries
    causal: bool = True
    lengths: tuple[int, ...] = ()  # all of the keys
    page: int = 0  # tokens per page; 0 is a contiguous cache
    holes: bool = False  # pages of -1
    mask: bool = False
    sinks: bool = False
    joined: bool = False  # c_kv and k_rope in one row of memory
    tight: bool = False  # no memory beyond the cache: a sanitizer sees what a poisoned margin would only hide
    transposed: bool = False  # queries as slices of [b, h, s, width]
    seed: int = 0


@dataclass
class Call:
    """The arguments of one call of each operator, and what the cache among them says."""

    cache: dict[str, object]
    queries: dict[str, dict[str, Tensor]]  # per operator
    scales: dict[str, float]
    latents: Tensor  # [b, t, r] fp64, zero where no query may look
    ropes: Tensor  # [b, t, p]
    seen: Tensor  # [b, t] bool
    lengths: tuple[int, ...]
    wanted: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def run(self, operator: str, isa: str | None) -> tuple[Tensor, Tensor]:
        return getattr(native, operator)(**self.arguments(operator), isa=isa)

    def arguments(self, operator: str) -> dict[str, object]:
        return self.queries[operator] | self.cache | {"scale": self.scales[operator]}

    def want(self, operator: str) -> tuple[Tensor, Tensor]:
        """Output and lse of the reference, in fp64."""
        kind = "decode" if operator == "decode" else "prefill"  # what "absorbed" computes as well
        if kind not in self.wanted:
            self.wanted[kind] = self._attend(kind)
        return self.wanted[kind]

    def _attend(self, operator: str) -> tuple[Tensor, Tensor]:
        x = {name: tensor.double() for name, tensor in self.queries[operator].items()}
        b, s, h, _ = x["q_rope"].shape
        r = self.latents.shape[-1]
        width = r if operator == "decode" else x["w_uv"].shape[1]
        out = torch.zeros(b, s, h, width, dtype=torch.float64)
        lse = torch.full((b, s, h), -torch.inf, dtype=torch.float64)
        sinks = self.cache["sinks"]
        at_once = max(1, IDENTITIES // r**2)
        for i, length in enumerate(self.lengths):
            for first in range(0, h, at_once):
                heads = slice(first, first + at_once)
                count = min(h, heads.stop) - first
                if operator == "decode":
                    same = torch.eye(r, dtype=torch.float64).expand(count, r, r)
                    attend, q, w_uk, w_uv = reference.absorbed, x["q_latent"], same, same
                else:
                    attend, q, w_uk, w_uv = (
                        reference.expanded,
                        x["q_nope"],
                        x["w_uk"][heads],
                        x["w_uv"][heads],
                    )
                out[i, :, heads], lse[i, :, heads] = attend(
                    q[i : i + 1, :, heads],
                    x["q_rope"][i : i + 1, :, heads],
                    self.latents[i : i + 1, :length],
                    self.ropes[i : i + 1, :length],
                    w_uk,
                    w_uv,
                    scale=self.scales[operator],
                    causal=self.cache["causal"],
                    mask=self.seen[i, :length],
                    sinks=None if sinks is None else sinks[heads],
                )
        return out, lse


def make_inputs(case: Case, seed: int = 0) -> dict[str, Tensor]:
    """Random fp64 inputs of both operators."""
    generator = torch.Generator().manual_seed(seed + 1)
    q_latent = torch.randn(case.b, case.s, case.h, case.r, generator=generator, dtype=torch.float64)
    return case.inputs(torch.float64, seed) | {"q_latent": q_latent}


@lru_cache(maxsize=8)
def kept_call(case: Case, cache: str, options: Options) -> Call:
    """make_call for tests that change nothing in it: instruction sets share inputs and reference."""
    return make_call(case, cache, options)


def make_call(case: Case, cache: str, options: Options, inputs: dict[str, Tensor] | None = None) -> Call:
    """A call on a cache of format `cache`; scores have the order of 1 with the inputs of make_inputs."""
    generator = torch.Generator().manual_seed(options.seed + 2)
    inputs = inputs or make_inputs(case, options.seed)
    lengths = options.lengths or (case.t,) * case.b
    pages, slots, table, room = _pages(case, options, lengths, generator)

    seen = torch.arange(case.t) < torch.tensor(lengths).reshape(-1, 1)
    key_mask = None
    if options.mask:
        key_mask = torch.rand(case.b, room, generator=generator) > 0.3
        seen &= key_mask[:, : case.t]
    if options.holes:
        assert table is not None
        hole = torch.rand(table.shape, generator=generator) > 0.6
        table[hole & (table != NO_PAGE)] = -1
        seen &= pages_of(table, case.t, options.page) >= 0

    place = pages[seen], slots[seen]
    amount = sum(-(-length // options.page) for length in lengths) + 2 if options.page else case.b + 2
    per_page = options.page or case.t
    c_kv, k_rope, latent_scale = _store(
        inputs["c_kv"][seen], inputs["k_rope"][seen], place, amount, per_page, cache, options.joined
    )
    if not options.page:  # page i is sequence i: the poison behind is not part of it
        c_kv, k_rope = c_kv[: case.b], k_rope[: case.b]
        latent_scale = None if latent_scale is None else latent_scale[: case.b]

    if options.tight:
        c_kv, k_rope = c_kv.clone(), k_rope.clone()
        latent_scale = None if latent_scale is None else latent_scale.clone()
    latents = torch.zeros(case.b, case.t, case.r, dtype=torch.float64)
    ropes = torch.zeros(case.b, case.t, case.p, dtype=torch.float64)
    latents[seen] = c_kv[place].double() * (
        1.0 if latent_scale is None else latent_scale[place].double()[:, None]
    )
    ropes[seen] = k_rope[place].double()

    dtype, weight_dtype = FORMATS[options.queries], FORMATS[options.weights or options.queries]
    q_rope = _queries(inputs["q_rope"], dtype, options)
    projected = {
        "q_nope": _queries(inputs["q_nope"], dtype, options),
        "q_rope": q_rope,
        "w_uk": inputs["w_uk"].to(weight_dtype),
        "w_uv": inputs["w_uv"].to(weight_dtype),
    }
    return Call(
        cache={
            "c_kv": c_kv,
            "k_rope": k_rope,
            "lengths": torch.tensor(lengths, dtype=torch.int32),
            "causal": options.causal,
            "latent_scale": latent_scale,
            "page_table": table,
            "key_mask": key_mask,
            "sinks": torch.randn(case.h, generator=generator) * 3 if options.sinks else None,
        },
        queries={
            "decode": {"q_latent": _queries(inputs["q_latent"], dtype, options), "q_rope": q_rope},
            "prefill": projected,
            "absorbed": dict(projected),
        },
        scales={"decode": (case.r + case.p) ** -0.5, "prefill": case.scale, "absorbed": case.scale},
        latents=latents,
        ropes=ropes,
        seen=seen,
        lengths=lengths,
    )


def pages_of(table: Tensor, t: int, page: int) -> Tensor:
    """[b, t] the page of each token."""
    return table[:, torch.arange(t) // page].long()


def _pages(
    case: Case, options: Options, lengths: tuple[int, ...], generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor | None, int]:
    """[b, t] page and slot of each token, the table, and the tokens that there is room for."""
    token = torch.arange(case.t).expand(case.b, case.t)
    if not options.page:
        return torch.arange(case.b)[:, None].expand(case.b, case.t), token, None, case.t
    counts = [-(-length // options.page) for length in lengths]
    width = -(-case.t // options.page) + 1
    order = torch.randperm(sum(counts) + 2, generator=generator, dtype=torch.int32)
    store = torch.full((case.b, width + 1), NO_PAGE, dtype=torch.int32)
    for i, count in enumerate(counts):
        store[i, :count] = order[sum(counts[:i]) :][:count]
    table = store[:, :width]
    return pages_of(table, case.t, options.page), token % options.page, table, width * options.page


def _store(
    c_kv: Tensor,
    k_rope: Tensor,
    place: tuple[Tensor, Tensor],
    amount: int,
    per_page: int,
    cache: str,
    joined: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The tokens that may be read, in their place of a store that is poison everywhere else."""
    r, p = c_kv.shape[-1], k_rope.shape[-1]
    dtype = FORMATS[cache]
    rope_dtype = torch.float32 if cache == "fp32" else torch.bfloat16
    latent_bytes, rope_bytes = r * dtype.itemsize, p * rope_dtype.itemsize
    gap = -latent_bytes % 4  # the rotary part must lie at a multiple of its size
    shape = (amount, per_page + 1)  # a row of poison after each page
    if joined:
        row = torch.empty((*shape, latent_bytes + gap + rope_bytes), dtype=torch.int8)
        store_c, store_k = (
            row[..., :latent_bytes].view(dtype),
            row[..., latent_bytes + gap :].view(rope_dtype),
        )
    else:
        store_c, store_k = torch.empty((*shape, r), dtype=dtype), torch.empty((*shape, p), dtype=rope_dtype)
    store_k.fill_(torch.nan)
    store_c.fill_(127 if cache == "int8" else torch.nan)
    scale = None
    if cache == "int8":
        factor = (c_kv.abs().amax(-1) / 127).float()
        c_kv = (c_kv / factor.clamp_min(torch.finfo(torch.float32).tiny)[:, None]).round().clamp(-127, 127)
        store = torch.full(shape, torch.nan)
        store[place] = factor
        scale = store[:, :per_page]
    store_c[place] = c_kv.to(dtype)
    store_k[place] = k_rope.to(rope_dtype)
    return store_c[:, :per_page], store_k[:, :per_page], scale


def _queries(x: Tensor, dtype: torch.dtype, options: Options) -> Tensor:
    if not options.transposed:
        return x.to(dtype)
    b, s, h, width = x.shape
    store = torch.full((b, h, s, width + 3), torch.nan, dtype=dtype)
    store[..., 1 : width + 1] = x.transpose(1, 2)
    return store[..., 1 : width + 1].transpose(1, 2)


def arithmetic(isa: str, operator: str, cache: str) -> str:
    """What an instruction set's products are made of, for sequences of more than a few keys."""
    if isa == "generic" or cache == "fp32":
        return "fp32"
    if isa.startswith(("amx", "avx512")) and cache == "int8" and operator != "prefill":
        return "int8"
    return "bf16" if isa in ("amx", "avx512_bf16") else "int16"


def tolerance(call: Call, operator: str, isa: str, cache: str, queries: str) -> tuple[float, float]:
    """How far output (Frobenius norm, relative) and lse (absolute) may be from the reference.

    About twice what random inputs show. Products are of fp32 numbers, of int16 whose rows share a factor, of
    bf16, where queries, keys and probabilities are each rounded to 8 bits, and expanded keys and values once
    more, or of int8, where a factor is shared as well. Each errs in proportion to the scores: where lse is
    beyond 10, more is allowed.
    """
    kind = arithmetic(isa, operator, cache)
    if kind == "fp32":
        out, lse, out_slope, lse_slope = 2e-6, 1e-5, 3e-7, 2e-6
        out *= max(1.0, max(call.lengths, default=0) / 4096)
    elif kind == "int16":
        out, lse, out_slope, lse_slope = 2e-3, 2e-3, 1e-4, 3e-4
    elif kind == "bf16" and operator == "prefill":
        out, lse, out_slope, lse_slope = 8e-3, 3e-2, 1e-3, 4e-3
    elif kind == "bf16":
        out, lse, out_slope, lse_slope = 5e-3, 3e-2, 1e-3, 4e-3
    else:
        out, lse, out_slope, lse_slope = 2e-2, 5e-2, 2e-3, 1e-2
    widths = call.latents.shape[-1], call.queries["prefill"]["q_nope"].shape[-1] + call.ropes.shape[-1]
    few = min(widths) < 8 and out > 1e-3
    if few or call.want(operator)[0].numel() < 8:  # too few roundings to even out
        out, lse, out_slope, lse_slope = (4 * x for x in (out, lse, out_slope, lse_slope))
    if queries == "bf16":  # the output is rounded as well
        out = max(out, 6e-3)
    _, want = call.want(operator)
    finite = want[want.isfinite()]
    beyond = max(0.0, finite.abs().max().item() - 10.0) if finite.numel() else 0.0
    return out + out_slope * beyond, lse + lse_slope * beyond


def distance(got: Tensor, want: Tensor, least: float = 0.0) -> float:
    """The Frobenius norm of the difference as a share of that of `want` (or of `least`); infinite for NaN."""
    norm = max(want.norm().item(), least)
    error = (got.double() - want).norm().item()
    if norm == 0 or error != error:
        return 0.0 if error == 0 else float("inf")
    return error / norm


def gap_of_lse(got: Tensor, want: Tensor) -> float:
    """The largest difference; infinite where only one of them is."""
    empty = want == -torch.inf
    if not torch.equal(got == -torch.inf, empty):
        return float("inf")
    gap = (got.double() - want)[~empty].abs().nan_to_num(torch.inf)
    return gap.max().item() if gap.numel() else 0.0


def check(
    call: Call,
    operator: str,
    isa: str,
    cache: str,
    queries: str = "fp32",
    least: float = 0.0,
    slack: float = 1.0,
) -> None:
    """Run and compare, to ``slack`` times the tolerance; a query that sees no key must give exact zeros."""
    out, lse = call.run(operator, isa)
    want, want_lse = call.want(operator)
    assert out.shape == want.shape
    assert lse.shape == want_lse.shape
    assert (out.dtype, lse.dtype) == (FORMATS[queries], torch.float32)
    most, most_lse = (slack * each for each in tolerance(call, operator, isa, cache, queries))
    error, error_lse = distance(out, want, least), gap_of_lse(lse, want_lse)
    assert error <= most, f"output off by {error:.2e}, allowed {most:.2e}"
    assert error_lse <= most_lse, f"lse off by {error_lse:.2e}, allowed {most_lse:.2e}"
    assert (out[want_lse == -torch.inf] == 0).all(), "a query that sees no key: expected zeros"
