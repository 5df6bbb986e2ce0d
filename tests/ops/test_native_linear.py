"""The kernel of linear layers: against fp64, amid poison, at odd sizes; and what takes it."""

import contextlib

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.functional import linear as torch_linear
from torch.overrides import TorchFunctionMode
from torch.testing._internal.two_tensor import TwoTensor

from mla.nn.layers import Linear
from mla.ops import direct, native
from mla.ops import linear as module
from mla.ops.linear import FEW_ROWS, linear
from tests.ops.linear_cases import check, make
from tests.ops.native_cases import ISAS

pytestmark = pytest.mark.skipif(not ISAS, reason="built without kernels")
by_isa = pytest.mark.parametrize("isa", ISAS)
by_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])

ROWS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 16, 17, 33, 131)
WIDTHS = (1, 2, 3, 15, 16, 31, 32, 33, 63, 88, 100, 128, 129, 257, 576, 1024)
OUTPUTS = (1, 2, 3, 5, 31, 33, 119, 120, 121, 250)


@by_isa
@by_dtype
@pytest.mark.parametrize("k", WIDTHS)
def test_every_size(isa, dtype, k):
    for rows in ROWS:
        for n in OUTPUTS:
            x, weight = make(rows, n, k, dtype)
            check(x, weight, native.linear(x, weight, isa=isa))


@by_isa
@by_dtype
def test_memory_that_ends_with_the_last_number(isa, dtype):
    """A sanitizer sees what is read beyond."""
    for k in WIDTHS:
        for rows, n in ((3, 7), (11, 7), (20, 130)):
            x, weight = (part.contiguous() for part in make(rows, n, k, dtype))
            check(x, weight, native.linear(x, weight, isa=isa))


@by_isa
@by_dtype
@pytest.mark.parametrize("rows", [3, 10, 40])
def test_threads_change_nothing(isa, dtype, rows):
    x, weight = make(rows, 1000, 700, dtype)
    torch.set_num_threads(1)
    alone = native.linear(x, weight, isa=isa)
    check(x, weight, alone)
    for threads in (2, 3, 5, 64):
        torch.set_num_threads(threads)
        assert torch.equal(native.linear(x, weight, isa=isa), alone)


@by_isa
@by_dtype
@pytest.mark.parametrize("rows", [2, 12, 45])
def test_nan_and_infinity_go_where_they_belong(isa, dtype, rows):
    x, weight = (part.contiguous() for part in make(rows, 40, 70, dtype))
    weight[7, 69], weight[11, 0] = torch.nan, torch.inf
    x[0, 0] = 1.0
    got = native.linear(x, weight, isa=isa)
    assert got[:, 7].isnan().all()
    assert got[0, 11] == torch.inf
    rest = [i for i in range(40) if i not in (7, 11)]
    check(x, weight[rest], got[:, rest])


@by_isa
@by_dtype
def test_any_dimensions_and_strides_of_the_rows(isa, dtype):
    _, weight = make(1, 9, 34, dtype)
    wide = torch.randn(34, 2, 3).to(dtype)
    for x in (wide.permute(2, 1, 0), wide[:, 0, 0], wide[:, :1, 0].mT, wide.permute(1, 2, 0)[:, :0]):
        got = native.linear(x, weight, isa=isa)
        assert got.shape == (*x.shape[:-1], 9)
        check(x, weight, got)


@by_isa
@by_dtype
@pytest.mark.parametrize("rows", [2, 20])
def test_rows_of_a_weight_that_are_one_in_memory(isa, dtype, rows):
    x, weight = make(rows, 1, 70, dtype)
    weight = weight.expand(150, 70)
    check(x, weight, native.linear(x, weight, isa=isa))


@by_isa
@by_dtype
def test_nothing_to_sum_or_to_give(isa, dtype):
    assert torch.equal(
        native.linear(torch.ones(2, 0, dtype=dtype), torch.ones(3, 0, dtype=dtype), isa=isa),
        torch.zeros(2, 3, dtype=dtype),
    )
    nothing = native.linear(torch.ones(2, 4, dtype=dtype), torch.ones(0, 4, dtype=dtype), isa=isa)
    assert nothing.shape == (2, 0)


@pytest.mark.parametrize(
    ("x", "weight", "message"),
    [
        (torch.ones(2, 3), torch.ones(4, 5), r"got shapes \(2, 3\) and \(4, 5\)"),
        (torch.ones(2, 3), torch.ones(3), r"got shapes \(2, 3\) and \(3,\)"),
        (torch.ones(()), torch.ones(4, 5), r"got shapes \(\) and \(4, 5\)"),
        (torch.ones(2, 3), torch.ones(4, 3).bfloat16(), "expected both fp32 or both bf16"),
        (torch.ones(2, 3).half(), torch.ones(4, 3).half(), r"got torch\.float16 and torch\.float16"),
        (torch.ones(2, 3), torch.ones(3, 4).mT, "weight: expected a contiguous last dimension"),
    ],
)
def test_what_does_not_fit_is_refused(x, weight, message):
    for device in ("cpu", "meta"):
        strides = x.stride(), weight.stride()
        x, weight = x.to(device), weight.to(device)
        assert (x.stride(), weight.stride()) == strides
        with pytest.raises(ValueError, match=message):
            native.linear(x, weight)


def test_an_instruction_set_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="expected an instruction set of this machine"):
        native.linear(torch.ones(1, 2), torch.ones(3, 2), isa="mmx")


@by_dtype
def test_opcheck(dtype):
    x, weight = make(2, 5, 8, dtype)
    torch.library.opcheck(torch.ops.mla.linear.default, (x, weight, None))


def test_shapes_without_data():
    got = native.linear(torch.ones(2, 3, 4, device="meta"), torch.ones(5, 4, device="meta"))
    assert (got.shape, got.device.type) == ((2, 3, 5), "meta")
    with pytest.raises(ValueError, match="weight: expected a CPU tensor, got one on meta"):
        native.linear(torch.ones(2, 4), torch.ones(5, 4, device="meta"))


def test_another_default_device():
    x, weight = make(2, 5, 8, torch.float32)
    want = native.linear(x, weight)
    with torch.device("meta"):
        assert torch.equal(native.linear(x, weight), want)


used = pytest.mark.skipif(not direct.USED, reason="no kernel that models use")


@pytest.fixture
def calls(monkeypatch):
    """The rows of every call of the kernel."""
    seen = []

    def counting(real):
        return lambda x, weight: seen.append(x.numel() // x.shape[-1]) or real(x, weight)

    for name in ("linear", "compute_linear"):
        monkeypatch.setattr(module.native, name, counting(getattr(native, name)))
    return seen


@used
@by_dtype
@torch.no_grad()
def test_few_rows_take_the_kernel(dtype, calls):
    _, weight = make(1, 6, 40, dtype)
    most = FEW_ROWS[dtype]
    for rows in range(most + 3):
        x = torch.randn(1, rows, 40).to(dtype)
        tolerance = 1e-5 if dtype == torch.float32 else 0.05
        torch.testing.assert_close(linear(x, weight), torch_linear(x, weight), atol=tolerance, rtol=0.01)
    assert calls == list(range(most + 1))


@used
@by_dtype
@torch.no_grad()
def test_a_bias_is_added(dtype, calls):
    x, weight = make(3, 6, 40, dtype)
    bias = torch.randn(6).to(dtype)
    for rows in (x, x[None], x[0]):
        got = linear(rows, weight, bias)
        want = rows.double() @ weight.double().mT + bias.double()
        assert (got.shape, got.dtype) == (want.shape, dtype)
        exact = dtype == torch.float32
        torch.testing.assert_close(
            got.double(), want, atol=1e-5 if exact else 0.05, rtol=1e-5 if exact else 0.01
        )
    assert calls == [3, 3, 1]
    with pytest.raises(RuntimeError, match="size"):
        linear(x, weight, bias[:2])


def test_what_the_kernel_does_not_compute_is_left_to_torch(calls):
    x, weight, bias = torch.randn(2, 8), nn.Parameter(torch.randn(3, 8)), nn.Parameter(torch.randn(3))
    assert linear(x, weight).requires_grad
    assert linear(x, weight.detach(), bias).requires_grad
    assert linear(x.requires_grad_(), weight.detach()).requires_grad
    with torch.no_grad():
        want = x @ weight.mT
        torch.testing.assert_close(linear(x.double(), weight.double()), want.double(), atol=1e-5, rtol=1e-5)
        with torch.autocast("cpu", torch.bfloat16):
            assert linear(x, weight).dtype == torch.bfloat16
        assert linear(x.to("meta"), weight.to("meta")).device.type == "meta"
        torch.testing.assert_close(linear(x, weight.mT.contiguous().mT), want)
        torch.testing.assert_close(linear(x, weight[0]), want[:, 0])
        torch.testing.assert_close(linear(x, weight.relu().to_sparse()), x @ weight.relu().mT)
        torch.testing.assert_close(linear(x.relu().to_sparse(), weight), x.relu() @ weight.mT)
        with pytest.raises(RuntimeError, match="dtype"):
            linear(x, weight.bfloat16())
        with pytest.raises(RuntimeError, match="dtype"):
            linear(x, weight, bias.bfloat16())
    assert calls == []


def test_forward_derivatives_are_left_to_torch(calls):
    x, weight, bias = torch.randn(2, 8), torch.randn(3, 8), torch.randn(3)
    _, got = torch.func.jvp(linear, (x, weight, bias), (x, weight, bias))
    torch.testing.assert_close(got, 2 * x @ weight.mT + bias)
    with torch.no_grad(), forward_ad.dual_level():
        made = linear(x, forward_ad.make_dual(weight, weight))
        torch.testing.assert_close(forward_ad.unpack_dual(made).tangent, x @ weight.mT)
    assert calls == []


@used
@torch.no_grad()
def test_who_follows_operators_sees_ours():
    """All others are spared the dispatcher, which must not be noticed."""
    x, weight = make(2, 5, 8, torch.float32)
    want = native.linear(x, weight)
    traced = torch.jit.trace(lambda x: linear(x, weight), x)
    assert "mla::linear" in str(traced.graph)
    torch.testing.assert_close(traced(x + 1), native.linear(x + 1, weight))
    assert "mla.linear" in make_fx(lambda x: linear(x, weight))(x).code
    with torch.profiler.profile() as profile:
        linear(x, weight)
    assert "mla::linear" in {event.name for event in profile.events()}
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert isinstance(linear(mode.from_tensor(x), weight), FakeTensor)
    for context in (contextlib.nullcontext(), torch.inference_mode(), torch.device("meta")):
        with context:
            assert torch.equal(linear(x, weight), want)
    with Functions() as seen:
        linear(x, weight)
    assert seen.names == ["linear.default"]


class Functions(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if isinstance(func, torch._ops.OpOverload):
            self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


@used
@torch.no_grad()
def test_tensors_whose_numbers_lie_elsewhere():
    """The kernel reads memory: where a tensor is a wrapper, or its sign is to be turned, torch sees to it."""
    x, weight = make(2, 5, 8, torch.float32)
    want = native.linear(x, weight)
    for mine, theirs in ((TwoTensor(x, x), weight), (TwoTensor(x, x), torch.nn.Parameter(weight))):
        got = linear(mine, theirs)
        assert isinstance(got, TwoTensor)
        assert torch.equal(got.a, want)
    assert torch.equal(linear(torch._neg_view(x), weight), -want)
    assert torch.equal(linear(x, torch._neg_view(weight)), -want)


@used
@torch.no_grad()
def test_a_layer_is_torchs_own_to_those_who_load_and_compile_it(calls):
    layer, stock = Linear(8, 3, bias=False), nn.Linear(8, 3, bias=False)
    stock.load_state_dict(layer.state_dict())
    x = torch.randn(2, 8)
    torch.testing.assert_close(layer(x), stock(x))
    assert calls == [2]
    torch._dynamo.reset()
    traced = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for rows in (1, 2, 5, FEW_ROWS[torch.float32] + 1):
        x = torch.randn(rows, 8)
        torch.testing.assert_close(traced(x), stock(x))
