"""Arguments that do not fit: which it is, what was expected and what came."""

import re

import pytest
import torch

from mla.ops import native
from tests.ops.cases import Case
from tests.ops.native_cases import ISAS, OPERATORS, Options, make_call

pytestmark = pytest.mark.skipif(not native.instruction_sets(), reason="built without kernels")

CASE = Case(b=2, s=3, t=20, h=4, n=8, r=24, p=6, v=10)
CONTIGUOUS = Options(mask=True, sinks=True)
PAGED = Options(mask=True, sinks=True, page=8)  # room for 32 tokens in tables of 4 pages, 8 pages in all

by_operator = pytest.mark.parametrize("operator", OPERATORS)


def error_of(operator, cache, options, name, change, of_data=False):
    """What is said about a call whose argument `name` is `change` of what it was; without data, too, unless
    the error is one `of_data`."""
    arguments = make_call(CASE, cache, options).arguments(operator)
    arguments[name] = change(arguments[name])
    messages = []
    for given in (arguments,) if of_data else (arguments, without_data(arguments)):
        with pytest.raises(ValueError) as caught:  # noqa: PT011, the callers look at the text
            getattr(native, operator)(**given)
        messages.append(str(caught.value))
    assert len(set(messages)) == 1
    return messages[0]


def without_data(arguments):
    """The same shapes, dtypes and strides on "meta"."""
    return {
        name: torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
        if isinstance(x, torch.Tensor)
        else x
        for name, x in arguments.items()
    }


def strided(x):
    """The same numbers with a gap after each."""
    return torch.stack([x, x], dim=-1).flatten(-2)[..., ::2]


SHAPES = {
    "q_rope": (lambda x: x[..., :5], ("(2, 3, 4, 6)", "(2, 3, 4, 5)")),
    "k_rope": (lambda x: x[:, :19], ("(2, 20, 6)", "(2, 19, 6)")),
    "lengths": (lambda x: x[:1], ("torch.int32 (2,)", "(1,)")),
    "latent_scale": (lambda x: x[:, :19], ("torch.float32 (2, 20)", "(2, 19)")),
    "key_mask": (lambda x: x[:, :19], ("torch.bool (2, 20)", "(2, 19)")),
    "sinks": (lambda x: x[:3], ("torch.float32 (4,)", "(3,)")),
}


@by_operator
@pytest.mark.parametrize("name", SHAPES)
def test_shapes(operator, name):
    change, (expected, came) = SHAPES[name]
    message = error_of(operator, "int8", CONTIGUOUS, name, change)
    assert message.startswith(name)
    assert f"expected {expected}" in message or f"expected shape {expected}" in message
    assert f"got torch.{str(message).rpartition('torch.')[2]}" in message
    assert message.endswith(came)


@by_operator
@pytest.mark.parametrize(
    "name", ["q", "q_rope", "c_kv", "k_rope", "lengths", "latent_scale", "key_mask", "sinks"]
)
def test_numbers_of_dimensions(operator, name):
    if name == "q":
        name = "q_latent" if operator == "decode" else "q_nope"
    for change in (lambda x: x[0], lambda x: x.flatten()[0]):
        message = error_of(operator, "int8", CONTIGUOUS, name, change)
        assert message.startswith(name)
        assert "expected" in message
        assert "got" in message


@by_operator
@pytest.mark.parametrize(
    ("name", "dtype", "expected"),
    [
        ("q_rope", torch.bfloat16, "expected both fp32 or both bf16, got torch.float32 and torch.bfloat16"),
        ("q_rope", torch.float64, "expected both fp32 or both bf16, got torch.float32 and torch.float64"),
        ("c_kv", torch.float16, "c_kv: expected fp32, bf16 or int8, got torch.float16"),
        ("c_kv", torch.uint8, "c_kv: expected fp32, bf16 or int8, got torch.uint8"),
        ("c_kv", torch.float32, "k_rope: expected torch.float32 beside torch.float32 latents, got torch.bf"),
        ("k_rope", torch.float32, "k_rope: expected torch.bfloat16 beside torch.int8 latents, got torch.fl"),
        ("lengths", torch.int64, "lengths [b]: expected torch.int32 (2,), got torch.int64"),
        ("latent_scale", torch.float64, "latent_scale: expected torch.float32 (2, 20), got torch.float64"),
        ("key_mask", torch.uint8, "key_mask [b, t]: expected torch.bool (2, 20), got torch.uint8"),
        ("sinks", torch.float64, "sinks [h]: expected torch.float32 (4,), got torch.float64"),
    ],
)
def test_dtypes(operator, name, dtype, expected):
    assert expected in error_of(operator, "int8", CONTIGUOUS, name, lambda x: x.to(dtype))


@by_operator
def test_both_queries_of_a_dtype_that_is_not_known(operator):
    arguments = make_call(CASE, "bf16", CONTIGUOUS).arguments(operator)
    for name in ("q_latent", "q_nope", "q_rope"):
        if name in arguments:
            arguments[name] = arguments[name].half()
    with pytest.raises(ValueError, match=r"queries: expected .* got torch.float16 and torch.float16"):
        getattr(native, operator)(**arguments)


@by_operator
def test_factors_come_with_int8_and_with_nothing_else(operator):
    message = error_of(operator, "int8", CONTIGUOUS, "latent_scale", lambda x: None)
    assert message == "latent_scale: expected a tensor beside torch.int8 latents, got None"
    message = error_of(operator, "bf16", CONTIGUOUS, "latent_scale", lambda x: torch.ones(2, 20))
    assert message == "latent_scale: expected None beside torch.bfloat16 latents, got a tensor"


@by_operator
@pytest.mark.parametrize("name", ["c_kv", "k_rope", "lengths", "key_mask", "sinks"])
def test_strides(operator, name):
    message = error_of(operator, "bf16", CONTIGUOUS, name, strided)
    assert message.startswith(f"{name}: expected")
    assert "contiguous" in message
    assert re.search(r"got strides \([\d, ]*2,?\)$", message)


@by_operator
@pytest.mark.parametrize("scale", [float("nan"), float("inf"), -float("inf"), 1e39])
def test_scales_that_are_not_finite(operator, scale):
    message = error_of(operator, "bf16", CONTIGUOUS, "scale", lambda x: scale)
    assert message == f"scale: expected a finite number in fp32, got {scale}"


@by_operator
@pytest.mark.parametrize("lengths", [[21, 3], [-1, 3], [3, 2**31 - 1], [3, -(2**31)]])
def test_lengths_beyond_the_cache(operator, lengths):
    wrong = next(i for i, length in enumerate(lengths) if not 0 <= length <= 20)
    message = error_of(operator, "bf16", CONTIGUOUS, "lengths", lambda x: torch.tensor(lengths).int(), True)
    assert message.startswith(f"lengths[{wrong}]: expected 0 to 20")
    assert message.endswith(f"got {lengths[wrong]}")


@by_operator
def test_lengths_beyond_the_table(operator):
    message = error_of(operator, "bf16", PAGED, "lengths", lambda x: torch.tensor([20, 33]).int(), True)
    assert message.startswith("lengths[1]: expected 0 to 32")
    assert message.endswith("got 33")


@by_operator
@pytest.mark.parametrize(
    ("options", "name", "shape"),
    [
        (CONTIGUOUS, "c_kv", (2, 0, 24)),  # and the other parts of the cache with it
        (PAGED, "c_kv", (8, 0, 24)),
        (PAGED, "page_table", (2, 0)),
        (Options(), "c_kv", (2, 0, 24)),
        (Options(page=8), "page_table", (2, 0)),
    ],
    ids=["no keys", "pages of no keys", "no pages", "no keys, no mask", "no pages, no mask"],
)
@pytest.mark.parametrize("cache", ["bf16", "int8"])
@pytest.mark.parametrize("cut", [False, True], ids=["new", "cut"])
def test_lengths_of_a_cache_without_room(operator, cache, options, name, shape, cut):
    """Empty tensors have addresses that may not be read, or none, which stands for an argument left out."""
    arguments = make_call(CASE, cache, options).arguments(operator)
    names = ("c_kv", "k_rope", "latent_scale") if name == "c_kv" else (name,)
    for each in (*names, "key_mask"):
        if arguments[each] is not None:
            empty = arguments[each][:, :0]
            arguments[each] = empty if cut else empty.clone()
    assert arguments[name].shape == shape
    with pytest.raises(ValueError, match=r"lengths\[1\]: expected 0 to 0 .* got 1"):
        getattr(native, operator)(**arguments | {"lengths": torch.tensor([0, 1]).int()})
    out, lse = getattr(native, operator)(**arguments | {"lengths": torch.zeros(2).int()})
    assert (out == 0).all()
    assert (lse == -torch.inf).all()


@by_operator
@pytest.mark.parametrize("page", [8, -2, 2147480000, -(2**31)])
def test_pages_that_do_not_exist(operator, page):
    def change(table):
        table[1, 2] = page
        return table

    message = error_of(operator, "bf16", PAGED, "page_table", change, True)
    assert message.startswith("page_table[1, 2]: expected 0 to 7, or -1")
    assert message.endswith(f"got {page}")


@by_operator
@pytest.mark.parametrize(
    ("change", "came"),
    [
        (lambda x: x.long(), "torch.int64 (2, 4)"),
        (lambda x: x[0], "torch.int32 (4,)"),
        (lambda x: x[:1], "torch.int32 (1, 4)"),
    ],
)
def test_page_tables(operator, change, came):
    message = error_of(operator, "bf16", PAGED, "page_table", change)
    assert message == f"page_table: expected int32 [2, pages], got {came}"


@by_operator
def test_page_tables_with_gaps(operator):
    message = error_of(operator, "bf16", PAGED, "page_table", strided)
    assert re.fullmatch(r"page_table: expected contiguous rows, got strides \(\d+, 2\)", message)


@by_operator
def test_a_table_of_one_page_may_have_any_stride(operator):
    call = make_call(Case(b=2, s=2, t=8, h=3), "fp32", Options(page=8))
    want, _ = call.run(operator, None)
    call.cache["page_table"] = strided(call.cache["page_table"])[:, :1]
    assert torch.equal(call.run(operator, None)[0], want)


@by_operator
def test_a_mask_that_fits_the_cache_but_not_the_table(operator):
    message = error_of(operator, "bf16", PAGED, "key_mask", lambda x: x[:, :20])
    assert message == "key_mask [b, t]: expected torch.bool (2, 32), got torch.bool (2, 20)"


@by_operator
def test_another_batch(operator):
    message = error_of(operator, "bf16", CONTIGUOUS, "c_kv", lambda x: x[:1])
    assert message == "c_kv [b, t, r]: expected shape (2, 20, 24), got torch.bfloat16 (1, 20, 24)"


def test_another_rank_in_the_queries():
    message = error_of("decode", "bf16", CONTIGUOUS, "q_latent", lambda x: x[..., :23])
    assert message == "q_latent [b, s, h, r]: expected 4 dimensions, the last of 24, got shape (2, 3, 4, 23)"


@pytest.mark.parametrize(
    ("name", "change", "expected"),
    [
        ("w_uk", lambda x: x[:, :7], "w_uk [h, n, r]: expected shape (4, 8, 24), got float32 (4, 7, 24)"),
        ("w_uk", lambda x: x[0], "w_uk [h, n, r]: expected shape (4, 8, 24), got float32 (8, 24)"),
        ("w_uv", lambda x: x[:3], "w_uv [h, v, r]: expected shape (4, 10, 24), got float32 (3, 10, 24)"),
        ("w_uv", lambda x: x[..., 1:], "w_uv [h, v, r]: expected shape (4, 10, 24), got float32 (4, 10, 23)"),
        ("w_uv", lambda x: x[0], "w_uv [h, v, r]: expected"),
        ("w_uk", torch.Tensor.half, "w_uk and w_uv: expected both fp32 or both bf16, got float16 and"),
        ("w_uv", torch.Tensor.bfloat16, "w_uk and w_uv: expected both fp32 or both bf16, got float32 and"),
    ],
)
def test_weights(name, change, expected):
    message = error_of("prefill", "bf16", CONTIGUOUS, name, change)
    assert message.replace("torch.", "").startswith(expected)


TENSORS = ["q_rope", "c_kv", "k_rope", "lengths", "latent_scale", "page_table", "key_mask", "sinks"]


@pytest.mark.parametrize(
    ("operator", "name"),
    [("decode", name) for name in ("q_latent", *TENSORS)]
    + [("prefill", name) for name in ("q_nope", *TENSORS, "w_uk", "w_uv")],
)
def test_devices(operator, name):
    message = error_of(operator, "int8", PAGED, name, lambda x: x.to("meta"), True)
    assert message == f"{name}: expected a CPU tensor, got one on meta"


@by_operator
@pytest.mark.parametrize("isa", ["", "sse9", "AVX2"])
def test_instruction_sets_that_do_not_exist(operator, isa):
    have = re.escape(f"({', '.join(native.instruction_sets())}), got {isa}")
    with pytest.raises(ValueError, match=f"isa: expected an instruction set of this machine {have}"):
        make_call(CASE, "bf16", CONTIGUOUS).run(operator, isa)
    with pytest.raises(ValueError, match=f"isa: expected an instruction set of this machine {have}"):
        native.ceiling(isa, 1)


@by_operator
def test_nothing_is_checked_away_by_empty_tensors(operator):
    """No queries: no work, but shapes must fit all the same."""
    case = Case(b=2, s=0, t=20, h=4)
    arguments = make_call(case, "bf16", Options()).arguments(operator)
    out, lse = getattr(native, operator)(**arguments)
    assert (out.shape[:3], lse.shape) == ((2, 0, 4), (2, 0, 4))
    with pytest.raises(ValueError, match="lengths"):
        getattr(native, operator)(**arguments | {"lengths": arguments["lengths"][:1]})


def test_errors_leave_the_kernels_usable():
    call = make_call(CASE, "bf16", PAGED)
    before = call.run("decode", ISAS[0])
    for _ in range(3):
        error_of("decode", "bf16", PAGED, "lengths", lambda x: x + 100, True)
    after = call.run("decode", ISAS[0])
    assert torch.equal(before[0], after[0])


@by_operator
def test_derivatives_are_refused(operator):
    arguments = make_call(CASE, "fp32", CONTIGUOUS).arguments(operator)
    arguments["q_rope"].requires_grad_()
    with pytest.raises(ValueError, match="expected tensors that autograd does not follow"):
        getattr(native, operator)(**arguments)
    with torch.no_grad():
        getattr(native, operator)(**arguments)


def test_derivatives_of_linear_layers_and_norms_are_refused():
    x, weight = torch.ones(2, 8), torch.ones(8, requires_grad=True)
    with pytest.raises(ValueError, match="autograd does not follow"):
        native.rms_norm(x, weight, 1e-6)
    with pytest.raises(ValueError, match="autograd does not follow"):
        native.linear(x, weight[None])


APPENDED = {
    "c_kv": torch.zeros(1, 2, 8),
    "k_rope": torch.zeros(1, 2, 4),
    "to_c_kv": torch.zeros(3, 1, 8, dtype=torch.int8),
    "to_k_rope": torch.zeros(3, 1, 4, dtype=torch.bfloat16),
    "to_scale": torch.zeros(3, 1),
    "slots": torch.tensor([1, 2]),
}


@pytest.mark.parametrize("name", APPENDED)
def test_what_is_appended_lies_on_the_cpu(name):
    native.append(**APPENDED)
    with pytest.raises(ValueError, match=f"^{name}: expected a CPU tensor, got one on meta"):
        native.append(**{**APPENDED, name: APPENDED[name].to("meta")})


@pytest.mark.parametrize("name", ["c_kv", "k_rope", "to_c_kv", "to_k_rope"])
def test_what_is_appended_has_three_dimensions(name):
    with pytest.raises(ValueError, match=rf"^{name}: expected 3 dimensions, got shape \([23], .\)"):
        native.append(**{**APPENDED, name: APPENDED[name].flatten(0, 1)})


@pytest.mark.parametrize("name", ["x", "weight"])
def test_what_is_normed_lies_on_the_cpu(name):
    given = {"x": torch.ones(2, 8), "weight": torch.ones(8)}
    with pytest.raises(ValueError, match=f"^{name}: expected a CPU tensor, got one on meta"):
        native.rms_norm(**{**given, name: given[name].to("meta")}, eps=1e-6)
