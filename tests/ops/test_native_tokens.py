"""The kernels that work on every token by itself: norms of rows, and latents on their way into a cache."""

import pytest
import torch

from mla.formats import CACHE_FORMATS
from mla.ops import direct, latent, native, norm
from tests.ops.native_cases import ISAS

pytestmark = pytest.mark.skipif(not ISAS, reason="built without kernels")
by_isa = pytest.mark.parametrize("isa", ISAS)
by_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
used = pytest.mark.skipif(not direct.USED, reason="no kernel that models use")

WIDTHS = (1, 2, 3, 15, 16, 17, 31, 32, 33, 75, 129, 512, 1000)
EPS = 1e-5


def rows_amid_poison(rows, width, dtype, seed=0, beside=5):
    """Rows of a wider tensor, in which all else is NaN."""
    wide = torch.full((rows, width + beside), torch.nan).to(dtype)
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) * 3
    wide[:, 2 : 2 + width] = x.to(dtype)
    return wide[:, 2 : 2 + width]


@by_isa
@by_dtype
@pytest.mark.parametrize("rows", [1, 2, 7, 300])
def test_norms(isa, dtype, rows):
    for width in WIDTHS:
        x = rows_amid_poison(rows, width, dtype)
        weight = torch.randn(width, generator=torch.Generator().manual_seed(1)).to(dtype)
        got = native.rms_norm(x, weight, EPS, isa=isa)
        exact = x.double() * (x.double().square().mean(-1, keepdim=True) + EPS).rsqrt()
        want = weight.double() * exact.to(dtype).double()
        assert got.is_contiguous()
        step = 2.0**-7 if dtype == torch.bfloat16 else 1e-6  # in bf16 a number may be rounded the other way
        torch.testing.assert_close(got.double(), want, atol=1e-6, rtol=step)
        # What Transformers computes differs by the order of the sum alone: rarely in what is rounded to bf16.
        off = got != norm.in_torch(x, weight, EPS)
        assert dtype == torch.float32 or float(off.float().mean()) < 0.02


@by_isa
@by_dtype
def test_norms_of_numbers_at_the_edge(isa, dtype):
    weight = torch.ones(20, dtype=dtype)
    for value in (0.0, 1e-30, torch.inf, torch.nan):
        x = torch.ones(3, 20, dtype=dtype)
        x[1, 17] = value
        x[2] = value
        got, want = native.rms_norm(x, weight, EPS, isa=isa), norm.in_torch(x, weight, EPS)
        torch.testing.assert_close(got, want, equal_nan=True)
    for shape in ((0, 20), (2, 0, 20), (20,), (2, 3, 20)):
        x = torch.ones(shape, dtype=dtype)
        assert native.rms_norm(x, weight, EPS, isa=isa).shape == shape


@used
@torch.no_grad()
def test_what_takes_the_kernel_of_norms(monkeypatch):
    calls = []
    real = native.rms_norm
    monkeypatch.setattr(native, "rms_norm", lambda *given: calls.append(1) or real(*given))
    x, weight = torch.randn(2, 3, 8), torch.randn(8)

    def taken(x, weight):
        calls.clear()
        torch.testing.assert_close(norm.rms_norm(x, weight, EPS), norm.in_torch(x, weight, EPS))
        return bool(calls)

    assert taken(x, weight)
    assert taken(x.bfloat16(), weight.bfloat16())
    assert taken(x.mT.contiguous().mT, weight)  # numbers that do not lie side by side are copied
    for others in ((x.double(), weight.double()), (x.half(), weight.half()), (x.bfloat16(), weight)):
        assert not taken(*others)
    assert not taken(torch._neg_view(x), weight)
    with torch.enable_grad():
        assert not taken(x, weight.clone().requires_grad_())
        assert taken(x, weight)
    with torch.device("meta"):  # a mode: somebody follows what is computed
        assert not taken(x, weight)
    assert torch.func.vmap(lambda x: norm.rms_norm(x, weight, EPS))(x).shape == x.shape
    torch._dynamo.reset()
    compiled = torch.compile(norm.rms_norm, fullgraph=True, backend="aot_eager")
    calls.clear()
    torch.testing.assert_close(compiled(x, weight, EPS), norm.in_torch(x, weight, EPS))
    assert not calls


@pytest.mark.parametrize(
    ("x", "weight", "message"),
    [
        (torch.ones(2, 8), torch.ones(7), r"expected one k and a contiguous weight, got \(2, 8\) and \(7,\)"),
        (torch.ones(2, 8), torch.ones(16)[::2], "contiguous weight"),
        (torch.ones(()), torch.ones(()), "expected one k"),
        (torch.ones(2, 8).double(), torch.ones(8).double(), "both fp32 or both bf16, got torch.float64"),
        (torch.ones(2, 8), torch.ones(8).bfloat16(), "got torch.float32 and torch.bfloat16"),
    ],
)
def test_norms_that_do_not_fit(x, weight, message):
    with pytest.raises(ValueError, match=message):
        native.rms_norm(x, weight, EPS)


def empty_cache(kind, places, r, p):
    """(all bytes, of which half belong to nobody, and views of rows in them)."""
    width = CACHE_FORMATS[kind].row_bytes(r, p)
    held = torch.full((*places, 2 * width), 0xAB, dtype=torch.uint8)
    if kind == "int8":
        return held, latent.split_rows(held[..., :width], r, p)
    numbers = held[..., :width].view(latent.FORMAT_DTYPES[kind])
    return held, latent.Latents(numbers[..., :r], numbers[..., r:])


def in_torch(into, c_kv, k_rope, slots=None):
    """What must be written, by torch's operators one after the other."""
    for b, (latents, keys) in enumerate(zip(c_kv, k_rope, strict=True)):
        for s in range(len(latents)):
            place = (b, s)
            if slots is not None:
                slot = int(slots[b * len(latents) + s])
                if slot < 0:
                    continue
                place = divmod(slot, into.c_kv.shape[1])
            into.k_rope[place] = keys[s].to(into.k_rope.dtype)
            if into.scale is None:
                into.c_kv[place] = latents[s].to(into.c_kv.dtype)
            else:
                into.c_kv[place], into.scale[place] = latent.quantise(latents[s])


@by_isa
@by_dtype
@pytest.mark.parametrize("kind", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize(("b", "s"), [(1, 1), (3, 5), (2, 200)])
def test_tokens_on_their_way_into_a_cache(isa, dtype, kind, b, s):
    for r, p in ((512, 64), (75, 26), (88, 32), (1, 2), (17, 2)):
        c_kv = rows_amid_poison(b * s, r, dtype).unflatten(0, (b, s))
        k_rope = rows_amid_poison(b * s, p, dtype, seed=1).unflatten(0, (b, s))
        slots = torch.randperm(2 * b * s + 3)[: b * s]
        slots[::3] = -1
        for places, where in (((b, s), None), ((-(-(2 * b * s + 3) // 7), 7), slots)):
            (held, into), (wanted, reference) = (empty_cache(kind, places, r, p) for _ in range(2))
            native.append(c_kv, k_rope, into.c_kv, into.k_rope, into.scale, slots=where, isa=isa)
            in_torch(reference, c_kv, k_rope, where)
            assert torch.equal(held, wanted)  # to the last bit, and nothing between the rows


@by_isa
def test_integers_of_numbers_at_the_edge(isa):
    rows = torch.randn(8, 20)
    rows[1] = 0
    rows[2, 3], rows[3, 4], rows[4, 5] = torch.nan, torch.inf, -torch.inf
    rows[5] = 1e-44  # a scale of which nothing is left
    rows[6] *= 1e38
    rows[7] = torch.linspace(-127, 127, 20).round() + 0.5  # half-way cases
    rows[7, 0] = -127
    for dtype in (torch.float32, torch.bfloat16):
        x = rows.to(dtype)[None]
        _, into = empty_cache("int8", (1, 8), 20, 2)
        native.append(x, torch.zeros(1, 8, 2), into.c_kv, into.k_rope, into.scale, isa=isa)
        numbers, scale = latent.quantise(x)
        assert torch.equal(into.c_kv, numbers)
        torch.testing.assert_close(into.scale, scale, rtol=0, atol=0, equal_nan=True)


@used
@pytest.mark.parametrize("kind", ["fp32", "bf16", "fp16", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_what_takes_the_kernel_that_stores(monkeypatch, kind, dtype):
    calls = []
    real = native.append
    monkeypatch.setattr(native, "append", lambda *given, **more: calls.append(1) or real(*given, **more))
    c_kv, k_rope = torch.randn(2, 3, 33).to(dtype), torch.randn(2, 3, 8).to(dtype)
    slots = torch.tensor([8, -1, 0, 3, -1, 5])
    for places, where in (((2, 3), None), ((3, 4), slots)):
        (held, into), (wanted, reference) = (empty_cache(kind, places, 33, 8) for _ in range(2))
        latent.store(into, c_kv.requires_grad_(), k_rope, slots=where)
        in_torch(reference, c_kv.detach(), k_rope, where)
        assert torch.equal(held, wanted)
    known = dtype in (torch.float32, torch.bfloat16) and kind != "fp16"
    assert len(calls) == 2 * known
    (held, into), (wanted, reference) = (empty_cache(kind, (3, 4), 33, 8) for _ in range(2))
    latent.store(into, c_kv, k_rope, slots=slots.int())  # of another dtype: torch takes it
    in_torch(reference, c_kv.detach(), k_rope, slots)
    assert torch.equal(held, wanted)
    assert len(calls) == 2 * known
    # Where somebody follows operators, torch's write the same.
    held, into = empty_cache(kind, (2, 3), 33, 8)
    with torch.device("meta"):
        latent.store(into, c_kv, k_rope)
    assert len(calls) == 2 * known
    in_torch(reference := empty_cache(kind, (2, 3), 33, 8)[1], c_kv.detach(), k_rope)
    assert torch.equal(into.c_kv, reference.c_kv)


def test_a_graph_that_saved_the_cache_finds_it_changed():
    _, into = empty_cache("fp32", (1, 3), 8, 4)
    weight = torch.ones(8, requires_grad=True)
    loss = (into.c_kv * weight).sum()
    latent.store(into, torch.ones(1, 3, 8), torch.ones(1, 3, 4))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    with torch.inference_mode():
        _, into = empty_cache("fp32", (1, 3), 8, 4)
        latent.store(into, torch.ones(1, 3, 8), torch.ones(1, 3, 4))
        assert (into.c_kv == 1).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"c_kv": torch.ones(2, 3, 8).double()}, "c_kv: expected fp32 or bf16, got torch.float64"),
        ({"k_rope": torch.ones(2, 2, 4)}, r"k_rope \[b, s, p\]: expected shape \(2, 3, 4\)"),
        ({"to_c_kv": torch.ones(2, 3, 9)}, r"to_c_kv: expected shape \(2, 3, 8\), got .* \(2, 3, 9\)"),
        ({"to_c_kv": torch.ones(2, 3, 8).half()}, "to_c_kv: expected fp32, bf16 or int8, got torch.float16"),
        ({"to_c_kv": torch.ones(2, 3, 16)[..., ::2]}, "to_c_kv: expected a contiguous last dimension"),
        ({"to_k_rope": torch.ones(2, 3, 4).bfloat16()}, "to_k_rope: expected torch.float32"),
        ({"to_scale": torch.ones(2, 3)}, "to_scale: expected a tensor beside int8 latents alone"),
        ({"slots": torch.tensor([0, 1, 2, 3, 4])}, r"slots \[b · s\]: expected torch.int64 \(6,\)"),
        ({"slots": torch.arange(6).int()}, r"slots \[b · s\]: expected torch.int64"),
        ({"slots": torch.arange(12)[::2]}, "slots: expected a contiguous tensor"),
        ({"slots": torch.tensor([0, 1, 2, 3, 4, 6])}, r"slots\[5\]: expected less than 6, got 6"),
    ],
)
def test_tokens_that_do_not_fit(change, message):
    given = {
        "c_kv": torch.ones(2, 3, 8),
        "k_rope": torch.ones(2, 3, 4),
        "to_c_kv": torch.zeros(2, 3, 8),
        "to_k_rope": torch.zeros(2, 3, 4),
        "to_scale": None,
        "slots": None,
    }
    *tensors, slots = (given | change).values()
    with pytest.raises(ValueError, match=message):
        native.append(*tensors, slots=slots)
