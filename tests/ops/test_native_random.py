"""Random sizes, layouts and options of the native kernels against the reference.

``make fuzz`` runs MLA_FUZZ examples of each operator instead of the few of ``make test``, never the same.
"""

import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mla.ops import native
from tests.ops import linear_cases
from tests.ops.cases import Case
from tests.ops.native_cases import FORMATS, ISAS, OPERATORS, Options, check, make_call, make_inputs

pytestmark = pytest.mark.skipif(not ISAS, reason="built without kernels")

FUZZ = int(os.environ.get("MLA_FUZZ", "0"))
random_calls = settings(
    max_examples=FUZZ or 150,
    deadline=None,
    derandomize=not FUZZ,
    database=None,
    suppress_health_check=list(HealthCheck),
)
NUMBER_OF_HEADS = st.one_of(st.integers(1, 20), st.sampled_from([31, 32, 33, 48, 64, 127, 128, 129, 130]))


@st.composite
def calls(draw):
    b, h = draw(st.integers(0, 3)), draw(NUMBER_OF_HEADS)
    s = draw(st.integers(0, 6 if h > 20 else 40))
    t = draw(
        st.one_of(st.integers(0, 20), st.integers(0, 400), st.sampled_from([64, 65, 119, 120, 121, 240]))
    )
    n, r, p, v = (draw(st.integers(*ends)) for ends in ((1, 40), (1, 140), (0, 70), (1, 40)))
    case = Case(b=b, s=s, t=t, h=h, n=n, r=r, p=p, v=v)
    page = draw(st.sampled_from([0, 0, 1, 2, 3, 7, 16, 64, 130]))
    flags = ("causal", "mask", "sinks", "joined", "tight", "transposed")
    options = Options(
        queries=draw(st.sampled_from(["fp32", "bf16"])),
        weights=draw(st.sampled_from(["", "fp32", "bf16"])),
        lengths=tuple(draw(st.one_of(st.just(t), st.integers(0, t))) for _ in range(b)),
        page=page,
        holes=page > 0 and draw(st.booleans()),
        seed=draw(st.integers(0, 2**16)),
        **{name: draw(st.booleans()) for name in flags},
    )
    sharpness = draw(st.sampled_from([0.0, 0.1, 1.0, 3.0, 10.0]))
    return case, draw(st.sampled_from(list(FORMATS))), options, sharpness


@pytest.mark.parametrize("operator", OPERATORS)
@random_calls
@given(calls(), st.sampled_from(ISAS or ("none",)), st.sampled_from([1, 1, 2, 3, 5]))
def test_any_call_equals_the_reference(operator, call, isa, threads):
    case, cache, options, sharpness = call
    inputs = make_inputs(case, options.seed)
    for name in ("q_latent", "q_nope", "q_rope"):
        inputs[name] *= sharpness
    made = make_call(case, cache, options, inputs)
    made.want(operator)  # before threads: the reference takes most of the time, and more of them slow it down
    # Where the few numbers of an output happen to be small: the size that such a mean should have.
    width = case.r if operator == "decode" else case.v
    least = (case.b * case.s * case.h * width / max(case.t, 1)) ** 0.5
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check(made, operator, isa, cache, options.queries, least * any(options.lengths))
    finally:
        torch.set_num_threads(before)


@random_calls
@given(
    rows=st.integers(0, 80),
    n=st.integers(0, 300),
    k=st.one_of(st.integers(1, 300), st.integers(1, 3000)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**16),
    isa=st.sampled_from(ISAS or ("none",)),
    threads=st.sampled_from([1, 1, 2, 3, 5]),
)
def test_any_linear_layer_equals_the_reference(rows, n, k, dtype, seed, isa, threads):
    x, weight = linear_cases.make(rows, n, k, dtype, seed)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        linear_cases.check(x, weight, native.linear(x, weight, isa=isa))
    finally:
        torch.set_num_threads(before)
