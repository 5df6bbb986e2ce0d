"""The C++ kernels of every instruction set against the reference: sizes, formats and layouts."""

from dataclasses import replace

import pytest
import torch

from mla.ops import native
from tests.ops.cases import CASES, Case
from tests.ops.native_cases import FORMATS, ISAS, OPERATORS, Options, check, kept_call, make_call, make_inputs

KEYS = (0, 1, 64, 65, 119, 120, 121, 257, 1000)
SIZES = CASES | {
    **{f"{h} heads": Case(b=2, s=2, t=121, h=h, n=16, r=88, p=32, v=24) for h in (1, 9, 16, 33, 128, 130)},
    **{
        f"rank {r}, rope {p}": Case(s=3, t=130, h=5, n=7, r=r, p=p, v=11)
        for r in (1, 25, 88, 512)
        for p in (0, 1, 32, 64)
    },
    **{f"{t} keys": Case(b=2, s=2, t=t, h=17, n=9, r=40, p=8, v=13) for t in KEYS},
    # 300: more queries than keys
    **{f"{s} queries": Case(b=2, s=s, t=130, h=9, n=13, r=64, p=16, v=33) for s in (1, 2, 5, 8, 300)},
    "width 1": Case(s=2, t=9, h=2, n=1, r=1, p=1, v=1),
}
ROOMY = Case(b=4, s=3, t=130, h=5, n=9, r=26, p=6, v=7)
RAGGED = (130, 57, 1, 0)
LAYOUTS = {
    "ragged": Options(lengths=RAGGED),
    "ragged, not causal": Options(lengths=RAGGED, causal=False),
    "masked": Options(mask=True),
    "sinks": Options(sinks=True, lengths=RAGGED),
    "masked, sinks, ragged": Options(mask=True, sinks=True, lengths=RAGGED, seed=1),
    "one row": Options(joined=True, lengths=RAGGED),
    "no memory beyond": Options(tight=True),
    "no memory beyond, pages": Options(tight=True, page=16, lengths=RAGGED),
    "transposed queries": Options(transposed=True),
    "transposed queries, bf16": Options(transposed=True, queries="bf16"),
    "fp32 queries, bf16 weights": Options(weights="bf16"),
    "bf16 queries, fp32 weights": Options(queries="bf16", weights="fp32"),
    **{f"pages of {n}": Options(page=n, lengths=RAGGED) for n in (1, 3, 16, 64)},
    "pages, not causal": Options(page=16, lengths=RAGGED, causal=False),
    "pages with holes": Options(page=16, lengths=RAGGED, holes=True),
    "tokens with holes": Options(page=1, lengths=RAGGED, holes=True, causal=False),
    "pages of everything": Options(
        page=3,
        lengths=RAGGED,
        holes=True,
        mask=True,
        sinks=True,
        joined=True,
        transposed=True,
        queries="bf16",
    ),
}

by_isa = pytest.mark.parametrize("isa", ISAS)  # outermost, which runs fastest: one reference for all of them
by_operator = pytest.mark.parametrize("operator", OPERATORS)
by_cache = pytest.mark.parametrize("cache", FORMATS)


@by_isa
@by_operator
@by_cache
@pytest.mark.parametrize(
    ("queries", "causal"), [("fp32", True), ("bf16", True), ("fp32", False)], ids=["fp32", "bf16", "full"]
)
@pytest.mark.parametrize("size", SIZES)
def test_sizes(isa, operator, cache, queries, causal, size):
    options = Options(queries=queries, causal=causal)
    check(kept_call(SIZES[size], cache, options), operator, isa, cache, queries)


@by_isa
@by_operator
@by_cache
@pytest.mark.parametrize("s", [1, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(isa, operator, cache, s, layout):
    case, options = Case(**(vars(ROOMY) | {"s": s})), LAYOUTS[layout]
    check(kept_call(case, cache, options), operator, isa, cache, options.queries)


@by_isa
@by_operator
@by_cache
def test_dimensions_of_deepseek(isa, operator, cache):
    # To expand 128 heads' keys would take most of the time of all tests.
    case = Case(s=2, t=130, h=128 if operator == "decode" else 16, n=128, r=512, p=64, v=128)
    options = Options(queries="bf16", page=64, joined=True)
    check(kept_call(case, cache, options), operator, isa, cache, "bf16")


@by_isa
@by_operator
@by_cache
@pytest.mark.parametrize("t", [41, 141])  # the shorter in fp32, whatever the cache
@pytest.mark.parametrize("seed", range(4))
def test_odd_rows_at_odd_addresses(isa, operator, cache, t, seed):
    """Every width odd, queries one number beside an aligned address."""
    case = Case(b=2, s=3, t=t, h=3, n=5, r=2 * seed + 23, p=2 * seed + 1, v=2 * seed + 9)
    options = Options(joined=True, transposed=True, lengths=(t, t - 1), seed=seed)
    check(kept_call(case, cache, options), operator, isa, cache)


@by_isa
@by_cache
@pytest.mark.parametrize("page", [0, 30, 125, 400])
@pytest.mark.parametrize(("r", "p"), [(88, 32), (512, 64), (64, 0), (40, 24), (40, 22)])
def test_rows_are_read_where_they_lie_as_they_are_packed(isa, cache, page, r, p):
    """Joined rows of the right widths may be multiplied in place; parts apart are always packed."""
    case = Case(b=2, s=2, t=391, h=9, n=5, r=r, p=p, v=11)
    options = Options(page=page, tight=True, lengths=(391, 264), queries="bf16")
    apart = kept_call(case, cache, options)
    check(apart, "decode", isa, cache, "bf16")
    joined = kept_call(case, cache, replace(options, joined=True))
    for one, other in zip(joined.run("decode", isa), apart.run("decode", isa), strict=True):
        assert torch.equal(one, other)


@by_isa
@by_cache
@pytest.mark.parametrize(("r", "p"), [(40, 24), (48, 16), (40, 22)])
@pytest.mark.parametrize(
    ("s", "h"), [(1, h) for h in range(1, 34)] + [(3, h) for h in range(1, 12)], ids=lambda x: str(x)
)
def test_any_number_of_rows(isa, cache, r, p, s, h):
    """The last few are multiplied by several units at a time where these come out even."""
    case, options = Case(b=2, s=s, t=131, h=h, n=3, r=r, p=p, v=3), Options(queries="bf16", lengths=(131, 75))
    check(kept_call(case, cache, replace(options, tight=True, joined=True)), "decode", isa, cache, "bf16")


@by_isa
@by_operator
def test_queries_whose_last_dimension_is_not_contiguous(isa, operator):
    call = make_call(Case(b=2, s=3, t=9), "bf16", Options())
    want = call.run(operator, isa)
    for name, tensor in call.queries[operator].items():
        call.queries[operator][name] = tensor.mT.contiguous().mT
    got = call.run(operator, isa)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])


@by_isa
@by_operator
@by_cache
@pytest.mark.parametrize("t", [40, 140])
def test_nothing_to_see(isa, operator, cache, t):
    """Masked, without pages, or without keys: zeros and -inf, with a sink too, and no trace of NaN."""
    case = Case(b=3, s=2, t=t, h=3)
    for options in (Options(mask=True), Options(page=16), Options(lengths=(0, 0, 0))):
        for sinks in (None, torch.zeros(3)):
            call = make_call(case, cache, options)
            if options.mask:
                call.cache["key_mask"].zero_()
            if options.page:
                call.cache["page_table"].fill_(-1)
            call.cache["sinks"] = sinks
            for name in ("c_kv", "k_rope", "latent_scale"):
                if call.cache[name] is not None:
                    call.cache[name].fill_(127 if call.cache[name].dtype == torch.int8 else torch.nan)
            out, lse = call.run(operator, isa)
            assert (out == 0).all()
            assert (lse == -torch.inf).all()


@by_isa
@by_operator
@by_cache
def test_sequences_share_pages(isa, operator, cache):
    """A prefix held once: the same pages in two tables."""
    case = Case(b=2, s=2, t=144, h=3)
    inputs = make_inputs(case)
    inputs["c_kv"][1], inputs["k_rope"][1] = inputs["c_kv"][0], inputs["k_rope"][0]
    call = make_call(case, cache, Options(page=16), inputs)
    call.cache["page_table"][1, :2] = call.cache["page_table"][0, :2]
    check(call, operator, isa, cache)


@by_isa
@by_cache
def test_a_list_of_tokens(isa, cache):
    """Sparse attention: pages of one token over a contiguous cache, in any order, equal those keys alone."""
    case = Case(s=1, t=200, h=4, r=32, p=8)
    call = make_call(case, cache, Options(causal=False))
    chosen = torch.randperm(200, generator=torch.Generator().manual_seed(3))[:77]
    arguments = call.arguments("decode")
    flat = {
        name: arguments[name][0, :, None].contiguous()
        for name in ("c_kv", "k_rope", "latent_scale")
        if arguments[name] is not None
    }
    flat["lengths"] = torch.tensor([77], dtype=torch.int32)
    got = native.decode(**arguments | flat | {"page_table": chosen[None].int()}, isa=isa)
    alone = {name: x if name == "lengths" else x[:, 0][None, chosen] for name, x in flat.items()}
    want = native.decode(**arguments | alone, isa=isa)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])
    got = native.decode(**arguments | flat | {"page_table": chosen.flip(0)[None].int()}, isa=isa)
    # In int8 what rounding takes from a key is carried on to another one of the list, with AMX a little more.
    bound = {"int8": 8e-3 if isa == "amx" else 6e-3}.get(cache, 5e-3)
    torch.testing.assert_close(got[0], want[0], atol=bound, rtol=0)
    torch.testing.assert_close(got[1], want[1], atol=5e-3, rtol=0)


@by_isa
@by_operator
def test_a_chunk_on_a_prefix_equals_all_at_once(isa, operator):
    case = Case(b=1, s=50, t=300, h=3)
    call = make_call(case, "fp32", Options())
    out, lse = call.run(operator, isa)
    arguments = call.arguments(operator)
    first = "q_latent" if operator == "decode" else "q_nope"
    for begin, end in ((0, 7), (7, 8), (8, 50)):
        part = {name: arguments[name][:, begin:end] for name in (first, "q_rope")}
        part["lengths"] = torch.tensor([250 + end], dtype=torch.int32)
        got = getattr(native, operator)(**arguments | part, isa=isa)
        torch.testing.assert_close(got[0], out[:, begin:end], atol=2e-6, rtol=2e-5)
        torch.testing.assert_close(got[1], lse[:, begin:end], atol=2e-5, rtol=0)
