"""Linear layers and experts of an absorbed model: their classes' numbers, and whose forward pass is whose."""

import copy

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from torch import nn

from mla.integrations.layers import give_back, take_over
from mla.integrations.transformers import absorb, is_absorbed, restore
from mla.ops import native
from mla.ops.direct import USED
from mla.ops.linear import FEW_ROWS
from tests.families import build, token_ids

pytestmark = pytest.mark.skipif(not USED, reason="no kernel for linear layers")


@pytest.fixture
def model():
    return build("deepseek_v3")


@pytest.fixture
def taken(monkeypatch):
    """The rows of every call of the kernel."""
    rows = []
    real = native.compute_linear
    monkeypatch.setattr(
        native, "compute_linear", lambda x, weight: rows.append(x.numel() // x.shape[-1]) or real(x, weight)
    )
    return rows


def experts_of(model):
    return next(module for module in model.modules() if hasattr(module, "gate_up_proj"))


def routed(experts, tokens, dtype, seed=0):
    """Hidden states of different tokens, two different experts of each and their shares."""
    chance = torch.Generator().manual_seed(seed)
    count, _, d = experts.gate_up_proj.shape
    hidden = torch.randn(tokens, d, generator=chance).to(dtype)
    chosen = torch.stack([torch.randperm(count, generator=chance)[:2] for _ in range(tokens)])
    return hidden, chosen, torch.rand(tokens, 2, generator=chance)


@pytest.mark.parametrize("tokens", [1, 2, 5, 65, 200])
@torch.no_grad()
def test_experts_give_what_their_class_gives(model, taken, tokens):
    experts = experts_of(model)
    inputs = routed(experts, tokens, torch.float32)
    stock = experts(*inputs)
    assert not taken
    changed = take_over(experts)
    torch.testing.assert_close(experts(*inputs), stock, atol=1e-6, rtol=1e-5)
    # Each expert meets its tokens once, with two weights.
    _, counts = inputs[1].unique(return_counts=True)
    assert taken == [count for count in counts.tolist() if count <= FEW_ROWS[torch.float32] for _ in range(2)]
    assert tokens < 200 or not taken
    give_back(changed)
    assert "forward" not in vars(experts)


@torch.no_grad()
def test_experts_in_bf16_are_as_exact_as_their_class(model, taken):
    experts = experts_of(model)
    exact = experts(*routed(experts, 4, torch.float32))
    experts.bfloat16()
    inputs = routed(experts, 4, torch.bfloat16)
    stock = (experts(*inputs).float() - exact).abs().mean()
    take_over(experts)
    made = experts(*inputs)
    assert made.dtype == torch.bfloat16
    assert (made.float() - exact).abs().mean() < 1.2 * stock
    assert taken


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@torch.no_grad()
def test_a_trace_does_not_keep_the_experts_of_its_example(model):
    experts = experts_of(model)
    first, second = (routed(experts, 1, torch.float32, seed) for seed in (0, 1))
    assert set(first[1].flatten().tolist()) != set(second[1].flatten().tolist())
    take_over(experts)
    traced = torch.jit.trace(experts, first, check_trace=False)
    for inputs in (first, second):
        torch.testing.assert_close(traced(*inputs), experts(*inputs), atol=1e-6, rtol=1e-5)


def test_gradients_go_through_the_class(model, taken):
    experts = experts_of(model)
    take_over(experts)
    hidden, chosen, shares = routed(experts, 2, torch.float32)
    experts(hidden.requires_grad_(), chosen, shares).sum().backward()
    assert hidden.grad is not None
    assert experts.down_proj.grad is not None
    assert not taken


@torch.no_grad()
def test_another_librarys_forward_pass_stays(model, taken):
    theirs = model.model.layers[0].self_attn.o_proj
    theirs.forward = lambda x: nn.functional.linear(x, theirs.weight)
    ids = token_ids()[:1, :4]
    stock = model(ids).logits
    changed = take_over(model)
    assert any(module is model.lm_head for module in changed)
    assert not any(module is theirs for module in changed)
    torch.testing.assert_close(model(ids).logits, stock, atol=1e-5, rtol=1e-4)
    assert taken
    give_back(changed)
    assert [name for name, module in model.named_modules() if "forward" in vars(module)] == [
        "model.layers.0.self_attn.o_proj"
    ]


@torch.no_grad()
def test_another_librarys_hook_around_ours_stays(model, taken):
    """As accelerate sets them, to bring weights into memory; everything else is given back."""
    ids = token_ids()[:1, :4]
    absorb(model)
    hooked = model.model.layers[0].self_attn.o_proj
    seen = []

    class Hook(ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            seen.append(module)
            return args, kwargs

    add_hook_to_module(hooked, Hook())
    want = model(ids).logits
    with pytest.warns(UserWarning, match="1 layers keep their forward passes: .* remove its hooks"):
        restore(model)
    assert not is_absorbed(model)
    assert [module for module in model.modules() if "forward" in vars(module)] == [hooked]
    torch.testing.assert_close(model(ids).logits, want, atol=1e-4, rtol=1e-4)
    assert seen == [hooked, hooked]
    remove_hook_from_module(hooked)
    absorb(model)
    del model.lm_head.forward  # nothing there to give back
    restore(model)
    assert not any("forward" in vars(module) for module in model.modules())


class GemmaRMSNorm(nn.Module):
    """The name, and another norm: it counts its weight from 1."""

    def __init__(self, size):
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.zeros(size)), 1e-6

    def forward(self, x):
        return torch.nn.functional.rms_norm(x, x.shape[-1:], 1 + self.weight, self.variance_epsilon)


@torch.no_grad()
def test_norms_are_the_kernels_where_they_are_ours(model, monkeypatch):
    calls = []
    real = native.rms_norm
    monkeypatch.setattr(native, "rms_norm", lambda *given: calls.append(1) or real(*given))
    norms = [module for module in model.modules() if type(module).__name__.endswith("RMSNorm")]
    ids = token_ids(1, 1)
    want = model(ids).logits
    other = GemmaRMSNorm(8)
    model.model.add_module("other", other)
    changed = take_over(model)
    assert set(norms) <= set(changed)
    assert other not in changed
    torch.testing.assert_close(model(ids).logits, want)
    assert len(calls) == len(norms)
    give_back(changed)
    assert torch.equal(model(ids).logits, want)
    assert len(calls) == len(norms)


def test_subclasses_of_linear_layers_are_left_alone():
    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    assert take_over(nn.Sequential(Scaled(3, 3), nn.ReLU())) == ()


@torch.no_grad()
def test_a_copy_computes_with_its_own_weights(model):
    take_over(model)
    twin = copy.deepcopy(model)
    ids = token_ids()[:1, :4]
    before = model(ids).logits
    for parameter in twin.parameters():
        parameter.mul_(1.5)
    assert torch.equal(model(ids).logits, before)
    assert not torch.allclose(twin(ids).logits, before)
