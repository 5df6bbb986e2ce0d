"""The int8 format: the documented bound, rows of bytes, and attention on them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mla.formats import CACHE_FORMATS
from mla.ops import attention, latent, native, reference
from tests.ops.cases import Case
from tests.ops.native_cases import arithmetic


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 600), st.integers(0, 2**32 - 1), st.floats(-18, 18))
def test_no_number_moves_by_more_than_half_a_step(r, seed, exponent):
    generator = torch.Generator().manual_seed(seed)
    c_kv = torch.randn(3, 5, r, generator=generator).exp() * 10.0**exponent
    packed, scale = latent.quantise(c_kv)
    moved = (latent.Latents(packed, c_kv, scale).numbers(torch.float64)[0] - c_kv.double()).abs()
    bound = c_kv.double().abs().amax(-1, keepdim=True) / 254
    # Above half a step only by the rounding of fp32 itself.
    assert (moved <= bound * (1 + 1e-4)).all()


def test_zeros_and_nan():
    c_kv = torch.zeros(3, 4)
    c_kv[1, 2], c_kv[2, 0] = torch.nan, torch.inf
    packed, scale = latent.quantise(c_kv)
    assert (packed[0] == 0).all()
    assert scale[0] == 0
    assert scale[1].isnan()
    assert scale[2].isinf()


@pytest.mark.parametrize(("r", "p", "width"), [(512, 64, 644), (88, 32, 156), (25, 6, 44), (3, 0, 8)])
def test_rows_are_as_wide_as_documented(r, p, width):
    assert latent.row_bytes(r, p) == width == CACHE_FORMATS["int8"].row_bytes(r, p)
    rows = torch.zeros(2, 7, width, dtype=torch.uint8)
    held = latent.split_rows(rows, r, p)
    assert held.c_kv.shape == (2, 7, r)
    assert held.k_rope.shape == (2, 7, p)
    assert held.scale is not None
    held.c_kv.fill_(-1)
    held.k_rope.fill_(1.0)
    held.scale.fill_(2.0)
    again = latent.split_rows(rows.clone(), r, p)  # parts do not overlap
    assert (again.c_kv == -1).all()
    assert (again.k_rope == 1).all()
    assert (again.scale == 2).all()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (torch.zeros(1, 2, 643, dtype=torch.uint8), r"rows: expected uint8 \[b, t, 644\], got torch.uint8"),
        (torch.zeros(1, 2, 644, dtype=torch.int8), "got torch.int8"),
    ],
)
def test_other_rows_are_refused(rows, message):
    with pytest.raises(ValueError, match=message):
        latent.split_rows(rows, 512, 64)


@pytest.mark.parametrize("requires_grad", [False, True], ids=["kernels", "torch"])
@pytest.mark.parametrize("path", ["absorbed", "expanded"])
def test_attention_on_int8_equals_the_numbers_it_stands_for(path, requires_grad):
    case = Case(b=2, s=3, t=200, h=5, n=16, r=64, p=8, v=12)
    inputs = case.inputs(torch.float32)
    packed, scale = latent.quantise(inputs["c_kv"])
    inputs["k_rope"] = inputs["k_rope"].bfloat16()
    held = latent.Latents(packed, inputs["k_rope"], scale)
    c_kv, k_rope = held.numbers(torch.float64)
    exact = {**inputs, "c_kv": c_kv, "k_rope": k_rope}
    want, want_lse = reference.expanded(**exact, scale=case.scale, causal=True)
    inputs["q_nope"].requires_grad_(requires_grad)
    plan = attention.plan_for(inputs["q_nope"], packed, inputs["k_rope"], inputs["w_uv"], path=path)
    stored = {**inputs, "c_kv": packed, "latent_scale": scale}
    out, lse = attention.prefill(**stored, scale=case.scale, plan=plan)
    # Some kernels round queries and probabilities to int8 as well.
    kernel = None if requires_grad or path == "expanded" else native.best()
    most = 2e-2 if kernel and arithmetic(kernel, "decode", "int8") == "int8" else 5e-3
    assert float((out.detach().double() - want).norm() / want.norm()) < most
    torch.testing.assert_close(lse.detach().double(), want_lse, atol=most, rtol=0)
    for name, change in {"none": {"latent_scale": None}, "short": {"latent_scale": scale[:, 1:]}}.items():
        with pytest.raises(ValueError, match="latent_scale"):
            attention.prefill(**{**stored, **change}, scale=case.scale), name


@pytest.mark.parametrize("operator", ["prefill", "decode"])
def test_factors_have_gradients(operator):
    case = Case(b=1, s=2, t=7)
    inputs = case.inputs()
    packed, scale = latent.quantise(inputs["c_kv"])
    stored = inputs | {"c_kv": packed, "k_rope": inputs["k_rope"].bfloat16()}
    options = {"lengths": [7]} if operator == "decode" else {}

    def total(scale):
        out, _ = getattr(attention, operator)(**stored, latent_scale=scale, scale=case.scale, **options)
        return out.sum()

    total(scale.requires_grad_()).backward()
    step = torch.zeros_like(scale)
    step[0, 3] = 1e-2 * scale[0, 3].item()
    with torch.no_grad():
        slope = (total(scale + step) - total(scale - step)) / 2e-2
    torch.testing.assert_close(scale.grad[0, 3] * scale[0, 3], slope, atol=1e-3, rtol=2e-2)
