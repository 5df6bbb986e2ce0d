"""Whose product vLLM's linear layers take, and that it is right for any number of rows."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import linear as torch_linear

from mla.integrations.vllm import linear as module

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(not module._DTYPES, reason="packed weights are better here: AMX, or no kernel"),
]


class VLLMParameter(torch.nn.Parameter):
    pass


@pytest.fixture
def dispatch(monkeypatch):
    """The plugin's choice of a product; what it leaves to vLLM is listed in ``left``."""
    model = SimpleNamespace(use_mla=True)
    monkeypatch.setattr("vllm.config.get_current_vllm_config", lambda: SimpleNamespace(model_config=model))
    left = []
    choose = module.with_plain_weights(lambda layer, remove_weight: left.append(remove_weight))
    return SimpleNamespace(choose=choose, left=left, model=model)


def layer_of(weight):
    return SimpleNamespace(weight=VLLMParameter(weight, requires_grad=False))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("rows", [0, 1, 3, 64, 65, 200])
def test_any_number_of_rows(dispatch, monkeypatch, dtype, rows):
    layer = layer_of(torch.randn(40, 70).to(dtype) / 8)
    dispatch.choose(layer, remove_weight=True)
    assert dispatch.left == []
    assert type(layer.weight) is torch.nn.Parameter
    asked = []
    monkeypatch.setattr(
        "mla.ops.native.compute_linear", lambda *tensors: asked.append(rows) or torch_linear(*tensors)
    )
    x, bias = torch.randn(rows, 70).to(dtype), torch.randn(40).to(dtype)
    for given in (None, bias):
        got = layer.cpu_linear(x, layer.weight, given)
        # A bias is added to a product that was rounded before.
        close = {"rtol": 1.6e-2, "atol": 1.6e-2} if dtype == torch.bfloat16 else {}
        torch.testing.assert_close(got, torch_linear(x, layer.weight, given), **close)
    assert asked == ([rows, rows] if rows <= 64 else [])


@torch.no_grad()
def test_one_compiled_graph_serves_few_rows_and_many(dispatch):
    layer = layer_of(torch.randn(40, 70))
    dispatch.choose(layer, remove_weight=True)
    compiled = torch.compile(
        lambda x: layer.cpu_linear(x, layer.weight, None), backend="eager", fullgraph=True, dynamic=True
    )
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows in (300, 2, 64, 65):
            x = torch.randn(rows, 70)
            torch.testing.assert_close(compiled(x), torch_linear(x, layer.weight))


def test_what_stays_vllms(dispatch):
    for weight in (
        torch.randn(4, 1, 8),
        torch.randn(4, 8).half(),
        torch.randn(8, 4).mT,
        torch.randn(4, 8).to("meta"),
    ):
        layer = layer_of(weight)
        before = layer.weight
        dispatch.choose(layer, remove_weight=False)
        assert layer.weight is before
    dispatch.model.use_mla = False
    dispatch.choose(layer_of(torch.randn(4, 8)), remove_weight=True)
    assert dispatch.left == [False] * 4 + [True]
