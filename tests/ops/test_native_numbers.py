"""Numbers that break kernels: extreme magnitudes, scores that grow, NaN where it is seen and where not."""

import math

import pytest
import torch

from mla.ops import latent, native
from tests.ops.cases import Case
from tests.ops.native_cases import (
    FORMATS,
    ISAS,
    OPERATORS,
    Options,
    arithmetic,
    check,
    kept_call,
    make_call,
    make_inputs,
)

CASE = Case(b=1, s=2, t=300, h=6, n=32, r=128, p=32, v=24)
# Whole fours of units in every arithmetic: the last few rows may lie by fours.
FOURS = {"r": 32, "p": 8}


def scale_by(factor, *names):
    def change(x):
        for name in names:
            x[name] *= factor

    return change


def outlier(size, queries=1.0):
    """One channel of the latents is `size` times larger; the queries' factor on it is `queries`."""

    def change(x):
        x["c_kv"][..., 7] *= size
        x["q_latent"][..., 7] *= queries
        x["w_uk"][..., 7] *= queries

    return change


def ramp(values):
    """Scores that follow `values` [t] over the keys, on top of what they were."""

    def change(x):
        x["k_rope"][..., 0] = values
        x["q_rope"][..., 0] = (CASE.r + CASE.p) ** 0.5

    return change


def spike(x):
    """As in trained models, where keys are small: eight bits for a row leave the other channels two."""
    x["q_latent"][..., 5] *= 30
    x["c_kv"][..., 5] /= 30


def tokens_of_all_sizes(x):
    x["c_kv"] *= torch.logspace(-3, 1, CASE.t, dtype=torch.float64)[:, None]


def huge_latents(x):
    x["c_kv"] *= 1e6
    x["q_latent"] *= 1e-6
    x["q_nope"] *= 1e-6


def huge_keys(x):
    huge_latents(x)
    x["k_rope"] *= 1e6
    x["q_rope"] *= 1e-6


def far(factor):
    def change(x):
        scale_by(factor, "c_kv", "k_rope")(x)
        scale_by(1 / factor, "q_latent", "q_nope", "q_rope")(x)

    return change


UP = torch.linspace(0, 100, CASE.t, dtype=torch.float64)
NUMBERS = {
    "keys of 1e-20": scale_by(1e-20, "c_kv", "k_rope"),
    "latents of 1e-20": scale_by(1e-20, "c_kv"),
    "keys of 1e6": huge_keys,
    "latents of 1e6": huge_latents,
    # Their squares leave fp32.
    "keys of 1e25": far(1e25),
    "keys of 1e-25": far(1e-25),
    "zero latents": scale_by(0.0, "c_kv"),
    "zero keys": scale_by(0.0, "c_kv", "k_rope"),
    "zero queries": scale_by(0.0, "q_latent", "q_nope", "q_rope"),
    "an outlier of 1000": outlier(1000),
    "an outlier of 1000 that queries level": outlier(1000, 1e-3),
    "an outlier of 10 that queries level": outlier(10, 0.1),
    "a channel of queries far beyond the others": spike,
    "rotary keys of 30": scale_by(30.0, "k_rope"),
    "tokens of all sizes": tokens_of_all_sizes,
    "scores of 30": scale_by(10.0, "q_latent", "q_nope", "q_rope"),
    "scores of thousands": scale_by(1000.0, "q_latent", "q_nope", "q_rope"),
    "scores that rise": ramp(UP),
    "scores that fall": ramp(UP.flip(0)),
    "scores that rise and fall": ramp(100 * torch.sin(UP)),
    "scores far below zero": ramp(UP - 1000),
}
# Where a row shares one factor, what is small beside its largest number is lost: a channel of queries that is
# a thousand times smaller. One that is ten times smaller keeps four of its eight bits in int8.
LOST = {"int16": {"an outlier of 1000 that queries level"}, "int8": {"an outlier of 1000 that queries level"}}
ROUGH = {"int8": {"an outlier of 10 that queries level": 1.55}}

by_isa = pytest.mark.parametrize("isa", ISAS)
by_operator = pytest.mark.parametrize("operator", OPERATORS)
by_cache = pytest.mark.parametrize("cache", FORMATS)


@by_isa
@by_operator
@by_cache
@pytest.mark.parametrize("queries", ["fp32", "bf16"])
@pytest.mark.parametrize("name", NUMBERS)
def test_magnitudes(request, isa, operator, cache, queries, name):
    if name in LOST.get(arithmetic(isa, operator, cache), ()):
        request.applymarker(pytest.mark.xfail(reason="a row shares one factor", strict=True))
    inputs = make_inputs(CASE)
    NUMBERS[name](inputs)
    slack = ROUGH.get(arithmetic(isa, operator, cache), {}).get(name, 1.0)
    call = make_call(CASE, cache, Options(queries=queries), inputs)
    check(call, operator, isa, cache, queries, slack=slack)


@by_isa
@by_operator
@pytest.mark.parametrize("queries", ["fp32", "bf16"])
def test_int8_at_its_limits(isa, operator, queries):
    """-128, which quantising never gives, 127, and both in turn: sums that saturate would show."""
    call = make_call(Case(b=1, s=2, t=131, h=3, n=9, r=512, p=6, v=7), "int8", Options(queries=queries))
    latents = call.cache["c_kv"]
    latents[:, 0::3], latents[:, 1::3], latents[:, 2::3, ::2], latents[:, 2::3, 1::2] = -128, 127, -128, 127
    call.latents = latents.double() * call.cache["latent_scale"].double()[..., None]
    for name in ("q_latent", "q_nope"):
        for q in call.queries.values():
            if name in q:
                q[name][:, :, 0], q[name][:, :, 1] = q[name][:, :, 0].abs() / 20, -q[name][:, :, 1].abs() / 20
    check(call, operator, isa, "int8", queries)


@by_isa
@by_operator
@pytest.mark.parametrize("t", [30, 131])
def test_factors_below_zero(isa, operator, t):
    """Quantising never gives them; they are numbers like any others."""
    call = make_call(Case(b=1, s=2, t=t, h=3, n=9, r=70, p=6, v=7), "int8", Options())
    for latents in (call.cache["latent_scale"], call.latents):
        latents[:, ::3] *= -1
    check(call, operator, isa, "int8")


@by_isa
@by_operator
@by_cache
def test_negative_scales(isa, operator, cache):
    call = make_call(Case(b=1, s=2, t=131, h=3), cache, Options())
    call.scales = {name: -scale for name, scale in call.scales.items()}
    check(call, operator, isa, cache)


def exponentials(isa, x):
    """2^x as the kernels compute it, x [h] from -126 to -25: what a key of that score weighs beside a key of
    score 0. Their sum is 1 to the last bit."""
    to_powers_of_two = 0.6931472  # times log2(e) it is 1 in fp32
    keys = torch.tensor([[[0.0], [1.0]]])
    length = torch.tensor([2], dtype=torch.int32)
    queries = torch.zeros(1, 1, len(x), 1), x.view(1, 1, -1, 1)
    out, lse = native.decode(*queries, keys, keys, length, scale=to_powers_of_two, isa=isa)
    assert (lse == 0).all()
    return out.flatten()


@by_isa
def test_powers_of_two_are_exact(isa):
    x = torch.arange(-126.0, -24.0)
    assert torch.equal(exponentials(isa, x), torch.exp2(x.double()).float())


@by_isa
def test_exponentials_within_two_units_of_the_last_place(isa):
    x = torch.linspace(-27, -25, 30_001)
    got, want = exponentials(isa, x).double(), torch.exp2(x.double())
    unit = torch.exp2(want.log2().floor() - 23)
    # 1.94 where the compiler fuses products with sums, else 2.06.
    assert ((got - want).abs() / unit).max() < 2.1
    assert (got.diff() >= 0).all()


@by_isa
@by_operator
@by_cache
def test_one_key_is_its_own_average(isa, operator, cache):
    """To the last bit: its probability is 1."""
    call = make_call(Case(b=2, s=1, t=1, h=3), cache, Options())
    call.scales[operator] = 0.0
    out, lse = call.run(operator, isa)
    assert (lse == 0).all()
    if operator == "decode":
        assert torch.equal(out, call.latents[:, :, None].float().expand_as(out))


@by_isa
@by_cache
@pytest.mark.parametrize("t", [5, 130])
@pytest.mark.parametrize("n", [0, 4])
def test_latents_of_no_width(isa, cache, t, n):
    """Scores of the rotary part alone; no address stands for the latent, and that hides no key."""
    case = Case(b=2, s=2, t=t, h=3, p=8)
    call = make_call(case, cache, Options(causal=False))
    shared = call.arguments("decode") | {"c_kv": call.cache["c_kv"][..., :0].clone(), "isa": isa}
    q_rope = shared.pop("q_rope")
    shared.pop("q_latent")
    scores = torch.einsum("bshp,btp->bsht", q_rope.double(), call.ropes) * shared["scale"]
    out, lse = native.decode(q_rope[..., :0], q_rope, **shared)
    assert out.shape == (2, 2, 3, 0)
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), atol=2e-2, rtol=0)
    weights = torch.zeros(3, n, 0), torch.zeros(3, 5, 0)
    out, lse = native.prefill(torch.ones(2, 2, 3, n), q_rope, w_uk=weights[0], w_uv=weights[1], **shared)
    assert torch.equal(out, torch.zeros(2, 2, 3, 5))
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), atol=2e-2, rtol=0)


@by_isa
@by_operator
@by_cache
@pytest.mark.parametrize("sink", [-1e4, -100.0, 100.0, 1e4, -torch.inf])
def test_sinks_far_from_the_scores(isa, operator, cache, sink):
    call = make_call(Case(b=2, s=2, t=130, h=3), cache, Options(sinks=True, lengths=(130, 0)))
    call.cache["sinks"].fill_(sink)
    out, lse = call.run(operator, isa)
    call.cache["sinks"] = None
    plain, plain_lse = call.run(operator, isa)
    assert torch.equal(lse, plain_lse)  # never with the sink
    if sink < 0:
        assert torch.equal(out, plain)
    else:
        assert out.abs().max() < 1e-30


@by_isa
@pytest.mark.parametrize(("h", "p"), [(6, 32), (14, 30), (20, 30), (20, 32), (29, 32)])
def test_second_digits_of_any_number_of_rows(isa, h, p):
    case = Case(b=1, s=1, t=300, h=h, n=3, r=128, p=p, v=3)
    inputs = make_inputs(case)
    spike(inputs)
    check(make_call(case, "int8", Options(queries="bf16"), inputs), "decode", isa, "int8", "bf16")


@by_isa
@pytest.mark.parametrize("gap", [0.0, 2.0, 3.3, 4.0, 6.0, 8.0])
@pytest.mark.parametrize("t", [3, 70, 120, 500])
def test_what_lies_beside_a_key_that_outweighs_all(isa, gap, t):
    """A sink of attention: its own value is often nothing, and the output is that of the others."""
    chance = torch.Generator().manual_seed(0)
    c_kv = torch.randn(1, t, 64, generator=chance) + 0.5
    q = torch.randn(1, 1, 5, 64, generator=chance)
    scale, at = 0.01, 2
    k_rope = torch.zeros(1, t, 2)
    k_rope[0, at, 0] = round(gap / scale)  # a number of bf16's, or near one
    packed, factor = latent.quantise(c_kv)
    given = {"latent_scale": factor, "scale": scale, "isa": isa}
    lengths = torch.tensor([t], dtype=torch.int32)
    out, _ = native.decode(
        q, torch.eye(2)[:1].expand(1, 1, 5, 2), packed, k_rope.bfloat16(), lengths, **given
    )
    held = packed.double() * factor[..., None].double()
    scores = scale * (q[0, 0].double() @ held[0].T + k_rope.bfloat16()[0, :, 0].double())
    shares = scores.softmax(-1)
    others = shares.clone()
    others[:, at] = 0
    error = (out[0, 0].double() - shares @ held[0]).norm() / (others @ held[0]).norm()
    assert error < 0.02


@by_isa
@pytest.mark.parametrize(("t", "heavy"), [(120, 5), (4096, 1)])
def test_many_small_probabilities_are_not_lost_beside_large_ones(isa, t, heavy):
    """In every tile a few keys are seen, and the rest, each too small for a step of rounding, is as much as
    they are, and says the opposite."""
    chance = torch.Generator().manual_seed(0)
    common = torch.randn(64, generator=chance)
    large = torch.arange(t) % 120 < heavy
    c_kv = torch.randn(1, t, 64, generator=chance) * 0.5 + torch.where(large[:, None], -common, common)
    packed, factor = latent.quantise(c_kv)
    k_rope = torch.zeros(1, t, 2)
    k_rope[0, :, 0] = torch.where(large, 0.0, -math.log(600.0) + torch.randn(t, generator=chance) * 0.3)
    k_rope = k_rope.bfloat16()
    q, lengths = torch.zeros(1, 1, 5, 64), torch.tensor([t], dtype=torch.int32)
    q_rope = torch.eye(2)[:1].expand(1, 1, 5, 2)
    out, _ = native.decode(q, q_rope, packed, k_rope, lengths, scale=1.0, latent_scale=factor, isa=isa)
    held = packed[0].double() * factor[0, :, None].double()
    wanted = k_rope[0, :, 0].double().softmax(-1) @ held
    assert (out[0, 0].double() - wanted).norm(dim=-1).max() / wanted.norm() < 0.005


@by_isa
@by_operator
@by_cache
@pytest.mark.parametrize(
    ("s", "h", "sizes"),
    [(16, 3, {}), (16, 3, FOURS), (12, 3, FOURS), (16, 5, FOURS)],  # 48 rows; 32 and 4; 64 and 16
)
def test_nan_beyond_the_causal_limit(isa, operator, cache, s, h, sizes):
    """What no query of a row may see changes nothing of it, whatever it holds."""
    call = make_call(Case(b=1, s=s, t=96, h=h, **sizes), cache, Options())
    clean, clean_lse = call.run(operator, isa)
    names = ("k_rope", "latent_scale" if cache == "int8" else "c_kv")
    for name in names:
        call.cache[name][0, 90] = torch.nan
    out, lse = call.run(operator, isa)
    before = 90 - (96 - s)  # queries whose own token comes before that one
    assert torch.equal(lse[0, :before], clean_lse[0, :before])
    if arithmetic(isa, operator, cache) == "int8" and sizes:
        # Rows of a tile take second digits together: a NaN row no longer asks for them.
        torch.testing.assert_close(out[0, :before], clean[0, :before], atol=1e-2, rtol=0)
    elif arithmetic(isa, operator, cache) in ("int8", "int16") and cache == "int8":
        torch.testing.assert_close(out[0, :before], clean[0, :before])
    assert out[0, before:].isnan().all()


@by_isa
@by_operator
@by_cache
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("t", [40, 140])  # the shorter in fp32, whatever the cache
def test_queries_of_no_numbers_that_see_no_key(isa, operator, cache, t, value):
    call = make_call(Case(b=2, s=1, t=t, h=3), cache, Options(mask=True))
    call.cache["key_mask"][1] = False
    for x in call.queries[operator].values():
        if x.ndim == 4:
            x[1] = value
    out, lse = call.run(operator, isa)
    assert (out[1] == 0).all()
    assert (lse[1] == -torch.inf).all()


@by_isa
@by_operator
@by_cache
@pytest.mark.parametrize("rope", [True, False], ids=["k_rope", "c_kv"])
def test_nan_in_a_key_that_is_seen(isa, operator, cache, rope):
    """NaN for the queries that see it. Others of its sequence keep their lse (their output has 0 * NaN in its
    sum, as in the reference); other sequences keep everything."""
    where = "k_rope" if rope else "latent_scale" if cache == "int8" else "c_kv"
    call = make_call(Case(b=2, s=4, t=140, h=3, r=32, p=8), cache, Options())
    clean, clean_lse = call.run(operator, isa)
    token = call.cache[where][1, 138]
    (token if token.ndim == 0 else token[3]).fill_(torch.nan)
    out, lse = call.run(operator, isa)
    assert torch.equal(out[0], clean[0])
    assert torch.equal(lse[0], clean_lse[0])
    assert torch.equal(lse[1, :2], clean_lse[1, :2])
    assert lse[1, 2:].isnan().all()
    assert out[1, 2:].isnan().all()


@by_isa
@by_operator
@by_cache
@pytest.mark.parametrize("queries", ["fp32", "bf16"])
@pytest.mark.parametrize("rope", [True, False], ids=["q_rope", "q"])
@pytest.mark.parametrize(
    ("i", "j", "sizes"),
    [(2, 5, {}), (2, 5, FOURS), (3, 7, FOURS)],
    ids=["odd units", "among many rows", "among the last few"],
)
def test_nan_in_a_query(isa, operator, cache, queries, rope, i, j, sizes):
    """NaN, of any sign and payload, in its own row; the same bits as ever in all others."""
    call = make_call(Case(b=2, s=4, t=140, h=9, **sizes), cache, Options(queries=queries))
    clean, clean_lse = call.run(operator, isa)
    name = "q_rope" if rope else "q_latent" if operator == "decode" else "q_nope"
    for bits in (0x7FC00000, 0x7FFFFFFF, 0x7FFF8000, 0x7F810000):
        for nan in (bits, bits - 2**31):
            given = torch.tensor(nan, dtype=torch.int32).view(torch.float32)
            call.queries[operator][name][1, i, j, 3] = given
            out, lse = call.run(operator, isa)
            assert out[1, i, j].isnan().all()
            assert lse[1, i, j].isnan()
            out[1, i, j], lse[1, i, j] = clean[1, i, j], clean_lse[1, i, j]
            # Rows of a tile of integers take second digits together: a NaN row asks for none.
            loose = arithmetic(isa, operator, cache) == "int8" and sizes
            tolerance = {"atol": 1e-2, "rtol": 0} if loose else {"atol": 0, "rtol": 0}
            torch.testing.assert_close(out, clean, **tolerance)
            torch.testing.assert_close(lse, clean_lse, **tolerance)


@by_isa
@by_cache
@pytest.mark.parametrize("name", ["w_uk", "w_uv"])
def test_nan_in_a_weight(isa, cache, name):
    call = make_call(Case(b=1, s=2, t=130, h=3), cache, Options())
    clean, _ = call.run("prefill", isa)
    call.queries["prefill"][name][1, 4, 5] = torch.nan
    out, lse = call.run("prefill", isa)
    assert torch.equal(out[:, :, [0, 2]], clean[:, :, [0, 2]])
    assert out[:, :, 1, 4].isnan().all()
    assert lse[:, :, 1].isnan().all() == (name == "w_uk")


@by_isa
@by_operator
def test_infinite_scores_are_not_numbers(isa, operator):
    call = make_call(Case(b=1, s=2, t=30, h=2), "fp32", Options())
    call.queries[operator]["q_rope"][0, 0, 0] = 1e38
    call.queries[operator]["q_rope"][0, 0, 0, 1] = torch.inf
    out, lse = call.run(operator, isa)
    assert not out[0, 0, 0].isfinite().any()
    assert not lse[0, 0, 0].isfinite()
    assert out[0, 1].isfinite().all()


@by_isa
@by_operator
@by_cache
def test_flushing_denormals_changes_nothing_that_matters(isa, operator, cache):
    call = kept_call(Case(b=1, s=2, t=130, h=3), cache, Options())
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor has no such mode")
    try:
        check(call, operator, isa, cache)
    finally:
        torch.set_flush_denormal(False)
