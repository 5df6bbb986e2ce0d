"""One test over all paths: outputs, log-sum-exp and gradients against the reference."""

import pytest
import torch
from torch.autograd import forward_ad

from mla.ops import attention, native, portable, reference
from tests.ops.cases import CASES, Case, record_paths

PATHS = {"absorbed": portable.absorbed, "expanded": portable.expanded}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def make_mask(case: Case, kind: str) -> torch.Tensor | None:
    if kind == "none":
        return None
    generator = torch.Generator().manual_seed(1)
    keep = torch.rand(case.b, 1, case.s, case.t, generator=generator) > 0.4
    keep[:, :, -1:] = False  # a query that sees nothing
    return keep if kind == "bool" else torch.zeros(keep.shape).masked_fill(~keep, -torch.inf)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("causal", [True, False])
def test_reference_absorbed_equals_expanded(name, causal):
    case = CASES[name]
    inputs = case.inputs(torch.float64)
    out_a, lse_a = reference.absorbed(**inputs, scale=case.scale, causal=causal)
    out_e, lse_e = reference.expanded(**inputs, scale=case.scale, causal=causal)
    assert out_a.shape == (case.b, case.s, case.h, case.v)
    assert lse_a.shape == (case.b, case.s, case.h)
    torch.testing.assert_close(out_a, out_e, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(lse_a, lse_e, atol=1e-12, rtol=1e-12)


def test_reference_equals_torch_attention():
    """The reference against code that we did not write."""
    case = Case(b=2, s=6, t=6)
    x = case.inputs(torch.float64)
    key = torch.cat(
        [
            torch.einsum("btr,hnr->bhtn", x["c_kv"], x["w_uk"]),
            x["k_rope"][:, None].expand(-1, case.h, -1, -1),
        ],
        dim=-1,
    )
    value = torch.einsum("btr,hvr->bhtv", x["c_kv"], x["w_uv"])
    query = torch.cat([x["q_nope"], x["q_rope"]], dim=-1).transpose(1, 2)
    want = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    out, _ = reference.expanded(**x, scale=case.scale, causal=True)
    torch.testing.assert_close(out, want.transpose(1, 2), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("mask", ["none", "bool", "float"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_path_equals_reference(path, name, causal, mask, dtype):
    case = CASES[name]
    inputs = case.inputs(dtype)
    options = {"scale": case.scale, "causal": causal, "mask": make_mask(case, mask)}
    want, want_lse = reference.expanded(**{k: x.double() for k, x in inputs.items()}, **options)
    out, lse = PATHS[path](**inputs, **options)
    assert out.dtype == dtype
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(out.double(), want, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(lse.double(), want_lse, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("path", PATHS)
def test_small_tiles_equal_one_tile(path):
    case = Case(b=2, s=23, t=57)
    inputs = case.inputs(torch.float64)
    options = {"scale": case.scale, "causal": True, "mask": make_mask(case, "bool")}
    want, want_lse = reference.expanded(**inputs, **options)
    out, lse = PATHS[path](**inputs, **options, query_tile=5, key_tile=7)
    torch.testing.assert_close(out, want, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(lse, want_lse, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", ["several tokens, ragged sizes", "one key", "more queries than keys"])
def test_sinks(path, name):
    case = CASES[name]
    inputs = case.inputs(torch.float64)
    sinks = torch.tensor([0.5, -1.0, 30.0], dtype=torch.float64)
    want, want_lse = reference.expanded(**inputs, scale=case.scale, causal=True, sinks=sinks)
    out, lse = PATHS[path](**inputs, scale=case.scale, causal=True, sinks=sinks)
    torch.testing.assert_close(out, want, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(lse, want_lse, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("path", PATHS)
def test_gradients_equal_reference(path, kind):
    case = Case(b=2, s=9, t=13)
    mask = make_mask(case, kind)
    if kind == "float":  # and learns; no query is without keys here, whose gradient the reference makes NaN
        mask = torch.where(torch.arange(case.s)[:, None] < case.s - 1, mask, 0.0).double()
        mask += torch.randn(mask.shape, generator=torch.Generator().manual_seed(2))
        mask[..., 0] = 0.5
    grads = {}
    for name, run in {"reference": reference.expanded, path: PATHS[path]}.items():
        inputs = case.inputs(torch.float64, requires_grad=True)
        inputs["sinks"] = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64, requires_grad=True)
        inputs["mask"] = mask.clone().requires_grad_(kind == "float")
        tiles = {} if name == "reference" else {"query_tile": 4, "key_tile": 5}
        out, lse = run(**inputs, scale=case.scale, causal=True, **tiles)
        visible = lse > -torch.inf
        (out.square().sum() + lse[visible].sin().sum()).backward()
        grads[name] = {k: x.grad for k, x in inputs.items() if x.requires_grad}
    for key, want in grads["reference"].items():
        torch.testing.assert_close(grads[path][key], want, atol=1e-10, rtol=1e-10, msg=key)


@pytest.mark.parametrize("path", PATHS)
def test_a_mask_of_another_dtype_changes_no_dtype(path):
    case = Case(s=4, t=9)
    inputs, mask = case.inputs(), make_mask(case, "float").double()
    wanted = reference.expanded(**inputs, scale=case.scale, mask=mask)
    found = PATHS[path](**inputs, scale=case.scale, mask=mask)
    for have, want in zip(found, wanted, strict=True):
        assert have.dtype == want.dtype == torch.float32
        torch.testing.assert_close(have, want, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("path", PATHS)
def test_dropout_keeps_the_expectation(path):
    case = Case(s=4, t=50)
    inputs = case.inputs(torch.float64)
    torch.manual_seed(0)
    options = {"scale": case.scale, "causal": True}
    mean = torch.stack([PATHS[path](**inputs, **options, dropout=0.3)[0] for _ in range(2000)]).mean(0)
    want, _ = reference.expanded(**inputs, **options)
    torch.testing.assert_close(mean, want, atol=0.08, rtol=0)
    assert not torch.equal(PATHS[path](**inputs, **options, dropout=0.3)[0], want)


@pytest.mark.parametrize("path", ["auto", "absorbed", "expanded"])
@pytest.mark.parametrize("s", [1, 3])
def test_decode_reads_nothing_beyond_the_length(path, s):
    case = Case(b=4, s=s, t=40)
    inputs = case.inputs()
    lengths = [40, 17, 1, 0]
    poisoned = {k: x.clone() for k, x in inputs.items()}
    for i, length in enumerate(lengths):
        poisoned["c_kv"][i, length:] = torch.nan
        poisoned["k_rope"][i, length:] = torch.nan
    plan = attention.plan_for(inputs["q_nope"], inputs["c_kv"], inputs["k_rope"], inputs["w_uv"], path=path)
    out, lse = attention.decode(**poisoned, scale=case.scale, lengths=torch.tensor(lengths), plan=plan)
    for i, length in enumerate(lengths):
        row = {k: x if k.startswith("w_") else x[i : i + 1] for k, x in inputs.items()}
        row |= {"c_kv": row["c_kv"][:, :length], "k_rope": row["k_rope"][:, :length]}
        want, want_lse = reference.expanded(**row, scale=case.scale, causal=True)
        torch.testing.assert_close(out[i : i + 1], want, atol=2e-5, rtol=2e-5)
        torch.testing.assert_close(lse[i : i + 1], want_lse, atol=2e-5, rtol=2e-5)
    assert (out[3] == 0).all()
    assert (lse[3] == -torch.inf).all()


def test_decode_with_a_mask():
    case = Case(b=2, s=2, t=11)
    inputs = case.inputs()
    mask = make_mask(case, "bool")
    out, lse = attention.decode(**inputs, scale=case.scale, lengths=[11, 11], mask=mask)
    want, want_lse = reference.expanded(**inputs, scale=case.scale, causal=True, mask=mask)
    torch.testing.assert_close(out, want, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(lse, want_lse, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("t", [10, 100, 4096, 10**6])
def test_plan_crosses_where_the_paper_dimensions_say(t):
    sizes = {"t": t, "h": 128, "n": 128, "r": 512, "p": 64, "v": 128, "causal": False}
    crossover = 170.7 * t / (t + 170.7)
    assert attention.make_plan(s=max(1, int(crossover * 0.98)), **sizes).path == "absorbed"
    assert attention.make_plan(s=int(crossover * 1.02) + 1, **sizes).path == "expanded"


def test_plan_counts_operations():
    plan = attention.make_plan(s=7, t=1000, h=128, n=128, r=512, p=64, v=128, causal=False)
    assert plan.absorbed_ops == 128 * 7 * (2176 * 1000 + 262144)
    assert plan.expanded_ops == 128 * (640 * 7 * 1000 + 262144 * 1000)
    assert "absorbed" in plan.reason


@pytest.mark.parametrize("requires_grad", [False, True], ids=["kernels", "torch"])
def test_prefill_follows_the_plan(monkeypatch, requires_grad):
    case = Case(s=3, t=9)
    calls = record_paths(monkeypatch)
    inputs = case.inputs(requires_grad=requires_grad)
    for path in PATHS:
        plan = attention.plan_for(
            inputs["q_nope"], inputs["c_kv"], inputs["k_rope"], inputs["w_uv"], path=path
        )
        attention.prefill(**inputs, scale=case.scale, plan=plan)
    assert calls == [("torch" if requires_grad else "kernels", path) for path in PATHS]


def test_the_plan_of_a_cache_with_room_is_that_of_what_it_holds(monkeypatch):
    case, planned = Case(b=2, s=3, t=500), []
    real = attention.make_plan
    monkeypatch.setattr(attention, "make_plan", lambda **sizes: planned.append(sizes["t"]) or real(**sizes))
    attention.decode(**case.inputs(), scale=case.scale, lengths=[7, 4])
    assert set(planned) == {7}


def test_scaled_queries_are_rounded_no_more_than_queries():
    """In bf16 a scale that is no power of two would round them once more."""
    case = Case(s=2, t=9)
    inputs = {name: x.bfloat16() for name, x in case.inputs().items()}
    exact = {name: x.double() for name, x in inputs.items()}
    want, _ = reference.expanded(**exact, scale=0.3)
    out, _ = portable.expanded(**inputs, scale=0.3)
    assert (out.double() - want).norm() / want.norm() < 3e-3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q_nope": torch.zeros(1, 2, 3)}, "q_nope: expected 4 dimensions"),
        ({"c_kv": torch.zeros(1, 2)}, "c_kv: expected 3 dimensions"),
        ({"q_rope": torch.zeros(1, 2, 3, 5)}, r"q_rope .* expected shape \(1, 2, 3, 6\), got \(1, 2, 3, 5\)"),
        ({"k_rope": torch.zeros(1, 8, 6)}, r"k_rope .* expected shape \(1, 9, 6\)"),
        ({"w_uk": torch.zeros(3, 8, 23)}, r"w_uk .* expected shape \(3, 8, 24\)"),
        ({"w_uv": torch.zeros(2, 10, 24)}, r"w_uv .* expected shape \(3, 10, 24\)"),
        ({"sinks": torch.zeros(4)}, r"sinks .* expected shape \(3,\)"),
        ({"mask": torch.ones(1, 1, 2, 8, dtype=torch.bool)}, "mask: expected a shape that broadcasts"),
        ({"mask": torch.ones(2, 9, dtype=torch.bool)}, "mask: expected a shape that broadcasts"),
        ({"mask": torch.ones(1, 1, 2, 9, dtype=torch.int64)}, "mask: expected bool or .*, got torch.int64"),
        ({"k_rope": torch.zeros(())}, r"k_rope: expected 3 dimensions \[b, t, p\], got shape \(\)"),
        ({"q_nope": torch.zeros(1, 2, 3, 8).long()}, r"q_nope .* expected a floating dtype, got torch.int64"),
        ({"w_uk": torch.zeros(3, 8, 24).char()}, r"w_uk .* expected a floating dtype, got torch.int8"),
        ({"c_kv": torch.zeros(1, 9, 24).byte()}, r"c_kv .* expected a floating dtype, got torch.uint8"),
        ({"c_kv": torch.zeros(1, 9, 24).char()}, "latent_scale: expected a tensor beside torch.int8 .* None"),
        ({"latent_scale": torch.ones(1, 9)}, "latent_scale: expected None beside torch.float32 .* a tensor"),
        ({"w_uv": torch.zeros(3, 10, 24, device="meta")}, "w_uv .* on cpu, as q_nope, got one on meta"),
        ({"mask": torch.ones(1, 1, 2, 9, device="meta")}, "mask: .* on cpu, as q_nope, got one on meta"),
        ({"scale": float("nan")}, "scale: expected a finite number in fp32, got nan"),
        ({"scale": float("-inf")}, "scale: expected a finite number in fp32, got -inf"),
    ],
)
@pytest.mark.parametrize("operator", ["prefill", "decode"])
def test_wrong_arguments_are_named(operator, change, message):
    case = Case(s=2, t=9)
    options = {"lengths": [9]} if operator == "decode" else {}
    with pytest.raises(ValueError, match=message):
        getattr(attention, operator)(**(case.inputs() | {"scale": case.scale} | options | change))


@pytest.mark.parametrize(
    "lengths", [[1], [1, 12], [-1, 3], [1, 2.5], torch.tensor([1.0, torch.nan]), torch.ones(2, 2).int()]
)
def test_wrong_lengths_are_named(lengths):
    case = Case(b=2, t=11)
    with pytest.raises(ValueError, match=r"lengths: expected 2 whole numbers from 0 to 11, got \["):
        attention.decode(**case.inputs(), scale=case.scale, lengths=lengths)


def test_unknown_path_is_named():
    with pytest.raises(ValueError, match='expected path "auto", "absorbed" or "expanded", got \'fast\''):
        attention.make_plan(s=1, t=1, h=1, n=1, r=1, p=2, v=1, path="fast")


@pytest.mark.parametrize("requires_grad", [False, True], ids=["kernels", "torch"])
@pytest.mark.parametrize("written", ["no mask", "for every query", "with the causal limit"])
@pytest.mark.parametrize("path", PATHS)
def test_another_default_device(path, written, requires_grad):
    """Tensors that are made on the way lie where the arguments do."""
    case = Case(b=2, s=5, t=9)
    inputs = case.inputs(requires_grad=requires_grad)
    mask = None if written == "no mask" else torch.ones(2, 1, 5, 9, dtype=torch.bool)
    if written == "with the causal limit":
        mask = mask.tril(4)
    plan = attention.plan_for(inputs["q_nope"], inputs["c_kv"], inputs["k_rope"], inputs["w_uv"], path=path)
    options = {"scale": case.scale, "mask": mask, "plan": plan}

    def run():
        return *attention.prefill(**inputs, **options), *attention.decode(**inputs, **options, lengths=[9, 4])

    want = run()
    with torch.device("meta"):
        got = run()
    for made, wanted in zip(got, want, strict=True):
        assert torch.equal(made, wanted)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("operator", ["prefill", "decode"])
def test_autocast_does_not_reach_the_scores(path, operator):
    """The same bits as without, also in the backward pass."""
    case = Case(b=2, s=5, t=9)
    options = {"lengths": [9, 7]} if operator == "decode" else {}
    results = []
    for enabled in (False, True):
        inputs = case.inputs(requires_grad=True)
        plan = attention.plan_for(
            inputs["q_nope"], inputs["c_kv"], inputs["k_rope"], inputs["w_uv"], path=path
        )
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            out, lse = getattr(attention, operator)(**inputs, scale=case.scale, plan=plan, **options)
        out.sum().backward()
        results.append((out, lse, *(x.grad for x in inputs.values())))
    for without, within in zip(*results, strict=True):
        assert torch.equal(without, within)


@pytest.mark.parametrize("operator", ["prefill", "decode"])
@pytest.mark.parametrize("name", ["q_nope", "c_kv", "w_uk"])
def test_forward_derivatives(operator, name):
    """Of functions that jvp is given, and of dual numbers; neither requires a gradient."""
    case = Case(s=2, t=9)
    inputs = case.inputs()
    point, direction = (
        inputs[name],
        torch.randn(inputs[name].shape, generator=torch.Generator().manual_seed(3)),
    )
    options = {"lengths": [9]} if operator == "decode" else {}

    def attend(x):
        out, _ = getattr(attention, operator)(**(inputs | {name: x}), scale=case.scale, **options)
        return out

    _, want = torch.autograd.functional.jvp(attend, point, direction)
    with torch.no_grad():
        _, got = torch.func.jvp(attend, (point,), (direction,))
        with forward_ad.dual_level():
            dual = forward_ad.unpack_dual(attend(forward_ad.make_dual(point, direction))).tangent
    assert want.norm() > 0.1
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(dual, want, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_vmap_over_queries_and_masks():
    case = Case(b=2, s=3, t=9)
    inputs = case.inputs()
    queries = torch.stack([inputs["q_nope"], -inputs["q_nope"]])
    keep = torch.rand(2, 2, 1, 3, 9, generator=torch.Generator().manual_seed(0)) > 0.4
    for masks in (keep, keep[..., :1, :]):

        def attend(q, mask):
            return attention.prefill(**(inputs | {"q_nope": q}), scale=case.scale, mask=mask)

        got = torch.vmap(attend)(queries, masks)
        for i in range(2):
            for each, want in zip(got, attend(queries[i], masks[i]), strict=True):
                torch.testing.assert_close(each[i], want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compile_traces_prefill_of_any_length(backend):
    """One graph with sizes that vary, and the plan chosen inside it."""

    def around(inputs, scale):
        out, lse = attention.prefill(**inputs, scale=scale)
        return out * 2, lse

    torch._dynamo.reset()
    traced = torch.compile(around, fullgraph=True, dynamic=True, backend=backend)
    for s, t in ((2, 9), (3, 11), (30, 30), (4, 200)):
        case = Case(s=s, t=t)
        inputs = case.inputs()
        for got, want in zip(traced(inputs, case.scale), around(inputs, case.scale), strict=True):
            torch.testing.assert_close(got, want)


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "export"])
@torch.no_grad()
def test_compile_and_export_take_masks_of_every_query(backend):
    """In one graph; what the mask says is not known there."""

    class Around(torch.nn.Module):
        def forward(self, inputs, mask):
            return attention.prefill(**inputs, scale=0.2, mask=mask)

    case = Case(b=2, s=5, t=9)
    inputs, causal = case.inputs(), torch.ones(2, 1, 5, 9, dtype=torch.bool).tril(4)
    torch._dynamo.reset()
    if backend == "export":
        traced = torch.export.export(Around(), (inputs, causal)).module()
    else:
        traced = torch.compile(Around(), fullgraph=True, backend=backend)
    for mask in (causal, causal.flip(0, 3)):
        for got, want in zip(traced(inputs, mask), Around()(inputs, mask), strict=True):
            torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("causal", [True, False])
@torch.no_grad()
def test_every_size_runs_without_gradients(name, path, causal):
    """What the kernels take and what they leave: empty batches, no queries and no keys among them."""
    case = CASES[name]
    inputs = case.inputs()
    options = {"scale": case.scale, "causal": causal}
    want, want_lse = reference.expanded(**inputs, **options)
    plan = attention.plan_for(
        inputs["q_nope"], inputs["c_kv"], inputs["k_rope"], inputs["w_uv"], causal=causal, path=path
    )
    keys = torch.ones(case.b, 1, 1, case.t, dtype=torch.bool)
    for mask in (None, keys, keys.expand(-1, -1, case.s, -1)):
        results = [attention.prefill(**inputs, **options, mask=mask, plan=plan)]
        results.append(attention.decode(**inputs, **options, mask=mask, plan=plan, lengths=[case.t] * case.b))
        for out, lse in results:
            torch.testing.assert_close(out, want, atol=2e-5, rtol=2e-5)
            torch.testing.assert_close(lse, want_lse, atol=2e-5, rtol=2e-5)
    half = {key: x.half() for key, x in inputs.items()}
    out, _ = attention.decode(**half, **options, lengths=[case.t] * case.b)
    assert out.shape == want.shape


@pytest.mark.skipif(not native.instruction_sets(), reason="built without kernels")
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("written", ["once", "for every query", "with the causal limit"])
@pytest.mark.parametrize("at_once", [1, 40, 2**24])
@torch.no_grad()
def test_masks_of_keys_go_to_the_kernels(monkeypatch, causal, written, at_once):
    """However they are written."""
    monkeypatch.setattr(attention, "_COMPARED", at_once)
    case = Case(b=2, s=5, t=9)
    inputs = case.inputs()
    mask = torch.rand(2, 1, 1, 9, generator=torch.Generator().manual_seed(0)) > 0.4
    if written == "for every query":
        mask = mask.expand(-1, -1, 5, -1).clone()
    elif written == "with the causal limit":
        mask = mask & torch.ones(5, 9, dtype=torch.bool).tril(4)
    want, want_lse = reference.expanded(**inputs, scale=case.scale, causal=causal, mask=mask)
    calls = record_paths(monkeypatch)
    out, lse = attention.prefill(**inputs, scale=case.scale, causal=causal, mask=mask)
    assert [engine for engine, _ in calls] == ["kernels"]
    torch.testing.assert_close(out, want, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(lse, want_lse, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("causal", [True, False])
@torch.no_grad()
def test_a_mask_of_queries_alone_hides_queries(causal):
    case = Case(s=3, t=4)
    inputs = case.inputs()
    mask = torch.tensor([False, False, True]).view(1, 1, 3, 1)
    want, want_lse = reference.expanded(**inputs, scale=case.scale, causal=causal, mask=mask)
    out, lse = attention.prefill(**inputs, scale=case.scale, causal=causal, mask=mask)
    torch.testing.assert_close(out, want, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(lse, want_lse, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("sink", [0.5, -torch.inf])
def test_a_query_without_keys_has_finite_gradients_beside_sinks(path, sink):
    case = Case(s=3, t=4)
    inputs = case.inputs(torch.float64, requires_grad=True)
    mask = torch.zeros(1, 1, 3, 4, dtype=torch.float64)
    mask[:, :, 0] = -torch.inf
    sinks = torch.tensor([sink, 1.0, -1.0], dtype=torch.float64, requires_grad=True)
    out, lse = PATHS[path](**inputs, scale=case.scale, causal=False, mask=mask, sinks=sinks)
    assert (out[:, 0] == 0).all()
    assert (lse[:, 0] == -torch.inf).all()
    (out.square().sum() + lse[:, 1:].sum()).backward()
    for name, x in {**inputs, "sinks": sinks}.items():
        assert x.grad.isfinite().all(), name


@pytest.mark.parametrize("path", PATHS)
def test_weights_may_have_another_dtype_than_queries(path):
    case = Case(s=3, t=4)
    inputs = case.inputs()
    rounded = {key: x.bfloat16() if key in ("w_uk", "w_uv") else x for key, x in inputs.items()}
    want, _ = reference.expanded(**rounded, scale=case.scale)
    out, _ = PATHS[path](**rounded, scale=case.scale)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, want, atol=2e-5, rtol=2e-5)
