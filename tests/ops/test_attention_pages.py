"""The public ``decode`` over a cache in pages: as over one in rows, and nothing else of the pages is read."""

import pytest
import torch

from mla.ops import attention, latent
from tests.ops.cases import Case, record_paths

PAGE = 8
LENGTHS = [37, 16, 1, 0]


def in_pages(inputs, lengths, *, spare=5, seed=0):
    """(inputs with the cache in shuffled pages, their table): NaN and -7 wherever nothing may be read."""
    pages = [-(-length // PAGE) for length in lengths]
    total = sum(pages) + spare
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed)).tolist()
    table = torch.full((len(lengths), max(pages) + 2), -7, dtype=torch.int64)
    pools = {
        name: torch.full((total, PAGE, inputs[name].shape[2]), torch.nan, dtype=inputs[name].dtype)
        for name in ("c_kv", "k_rope")
    }
    for i, length in enumerate(lengths):
        for j in range(pages[i]):
            table[i, j] = page = order.pop()
            rows = slice(j * PAGE, min((j + 1) * PAGE, length))
            for name, pool in pools.items():
                pool[page, : rows.stop - rows.start] = inputs[name][i, rows]
    return inputs | pools, table


@pytest.mark.parametrize("engine", ["kernels", "torch"])
@pytest.mark.parametrize("path", ["absorbed", "expanded"])
@pytest.mark.parametrize("mask", [None, "keys", "queries"])
@pytest.mark.parametrize("s", [1, 3])
def test_pages_equal_rows(monkeypatch, engine, path, mask, s):
    case = Case(b=4, s=s, t=40)
    inputs = case.inputs(torch.float32 if engine == "kernels" else torch.float16)
    paged, table = in_pages(inputs, LENGTHS)
    room = table.shape[1] * PAGE
    given = {"scale": case.scale, "lengths": LENGTHS, "sinks": torch.tensor([0.5, -1.0, 2.0])}
    given["plan"] = attention.plan_for(
        inputs["q_nope"], inputs["c_kv"], inputs["k_rope"], inputs["w_uv"], path=path
    )
    keep = (
        torch.rand(4, 1, 1 if mask == "keys" else s, room, generator=torch.Generator().manual_seed(1)) > 0.4
    )
    masks = ({}, {}) if mask is None else ({"mask": keep[..., :40]}, {"mask": keep})
    want, want_lse = attention.decode(**inputs, **given, **masks[0])
    calls = record_paths(monkeypatch)
    for pages in (table, table.int()):
        out, lse = attention.decode(**paged, **given, **masks[1], page_table=pages)
        assert torch.equal(out, want)
        assert torch.equal(lse, want_lse)
    if mask != "queries" or s == 1:  # else each sequence is a call of its own, and some masks are simple
        assert {name for name, _ in calls} == {engine}


def test_int8_pages_have_scales_and_sequences_may_share_pages():
    case = Case(b=2, s=2, t=24)
    inputs = case.inputs()
    for name in ("c_kv", "k_rope"):
        inputs[name][1, :PAGE] = inputs[name][0, :PAGE]  # one beginning
    codes, scales = latent.quantise(inputs["c_kv"])
    given = {"scale": case.scale, "lengths": [24, 17]}
    rows = inputs | {"c_kv": codes, "k_rope": inputs["k_rope"].bfloat16()}
    want = attention.decode(**rows, latent_scale=scales, **given)
    table = torch.tensor([[4, 0, 3], [4, 1, 2]])
    pages = {name: torch.zeros(5, PAGE, x.shape[2]).to(x.dtype) for name, x in rows.items() if x.ndim == 3}
    pool = torch.full((5, PAGE), torch.nan)
    for i in range(2):
        for j, page in enumerate(table[i].tolist()):
            part = slice(j * PAGE, (j + 1) * PAGE)
            pages["c_kv"][page], pool[page] = codes[i, part], scales[i, part]
            pages["k_rope"][page] = rows["k_rope"][i, part]
    paged = rows | {name: pages[name] for name in ("c_kv", "k_rope")}
    got = attention.decode(**paged, latent_scale=pool, **given, page_table=table)
    for have, wanted in zip(got, want, strict=True):
        assert torch.equal(have, wanted)


def test_gradients_reach_the_pages():
    case = Case(b=2, s=2, t=24)
    inputs = case.inputs(torch.float64)
    lengths = [24, 11]
    paged, table = in_pages(inputs, lengths)
    gradients = []
    for given, options in ((inputs, {}), (paged, {"page_table": table})):
        c_kv = given["c_kv"].requires_grad_()
        out, _ = attention.decode(**(given | {"c_kv": c_kv}), scale=case.scale, lengths=lengths, **options)
        gradients.append(torch.autograd.grad(out.square().sum(), c_kv)[0])
    rows = gradients[1][table[0, :3]].flatten(0, 1)
    torch.testing.assert_close(rows, gradients[0][0], atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("width", [0, 3])
@pytest.mark.parametrize("b", [0, 2])
def test_no_keys(b, width):
    case = Case(b=b, t=PAGE)
    given = case.inputs() | {"c_kv": torch.zeros(4, PAGE, case.r), "k_rope": torch.zeros(4, PAGE, case.p)}
    for dtype in (torch.float32, torch.float64):
        cast = {name: x.to(dtype) for name, x in given.items()}
        table = torch.full((b, width), -1)
        out, lse = attention.decode(**cast, scale=case.scale, lengths=[0] * b, page_table=table)
        assert out.shape == (b, 1, case.h, case.v)
        assert (out == 0).all()
        assert (lse == -torch.inf).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tensors_without_values_have_shapes(dtype):
    case = Case(b=4, t=37)
    given, table = in_pages(case.inputs(), LENGTHS)
    meta = {name: x.to(dtype).to("meta") for name, x in given.items()}
    out, lse = attention.decode(**meta, scale=0.2, lengths=LENGTHS, page_table=table.to("meta"))
    assert (out.device.type, out.shape, lse.shape) == (
        "meta",
        (4, case.s, case.h, case.v),
        (4, case.s, case.h),
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"page_table": torch.zeros(2, 3)},
            r"page_table: expected int32 or int64 .* b = 2, got torch.float32",
        ),
        ({"page_table": torch.zeros(1, 3).int()}, r"page_table: .* with b = 2, got torch.int32 \(1, 3\)"),
        ({"page_table": torch.zeros(2).int()}, r"page_table: .* got torch.int32 \(2,\)"),
        ({"page_table": torch.zeros(2, 3, device="meta").int()}, "page_table: .* on cpu, .* got one on meta"),
        (
            {"page_table": torch.tensor([[0, 1, 4], [0, 0, 4]])},
            r"page_table\[0, 2\]: expected 0 to 3 .* got 4",
        ),
        (
            {"page_table": torch.tensor([[0, 1, 2], [-1, 0, 9]])},
            r"page_table\[1, 0\]: expected 0 to 3 .* got -1",
        ),
        (
            {"c_kv": torch.zeros(0, 8, 24), "k_rope": torch.zeros(0, 8, 6)},
            r"page_table\[0, 0\]: expected none, the cache has no pages, got 0",
        ),
        ({"lengths": [25, 3]}, r"lengths: expected 2 whole numbers from 0 to 24, got \[25, 3\]"),
        ({"k_rope": torch.zeros(3, 8, 6)}, r"k_rope \[pages, page size, p\]: expected shape \(4, 8, 6\)"),
        (
            {"c_kv": torch.zeros(4, 24)},
            r"c_kv: expected 3 dimensions \[pages, page size, r\], got shape \(4, 24\)",
        ),
        ({"mask": torch.ones(2, 1, 1, 8).bool()}, r"mask: expected .* \[b, h, s, t\] = \(2, 3, 1, 24\), got"),
        (
            {"c_kv": torch.zeros(4, 8, 24).char(), "latent_scale": torch.ones(2, 24)},
            r"latent_scale \[pages, page size\]: expected shape \(4, 8\), got \(2, 24\)",
        ),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wrong_pages_are_named(dtype, change, message):
    case = Case(b=2)
    pages = {"c_kv": torch.zeros(4, PAGE, case.r), "k_rope": torch.zeros(4, PAGE, case.p)}
    given = {name: x.to(dtype) for name, x in (case.inputs() | pages).items()}
    options = {"scale": case.scale, "lengths": [17, 3], "page_table": torch.zeros(2, 3).int()}
    with pytest.raises(ValueError, match=message):
        attention.decode(**(given | options | change))
