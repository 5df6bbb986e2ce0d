"""Absorbed models learn as they did before."""

import copy

import pytest
import torch
from transformers import DynamicCache

from mla.cache import LatentCache
from mla.integrations.transformers import absorb
from tests.families import build, token_ids


@pytest.fixture
def model():
    return build("deepseek_v3")


@pytest.mark.parametrize("path", ["absorbed", "expanded", "auto"])
def test_training_gradients(model, path):
    stock, ids = model, token_ids()
    absorbed = absorb(copy.deepcopy(model), path=path)
    for each in (stock, absorbed):
        each.train()(ids, labels=ids, use_cache=False).loss.backward()
    for (name, want), got in zip(stock.named_parameters(), absorbed.parameters(), strict=True):
        if want.grad is None:  # an expert that no token chose
            assert got.grad is None
        else:
            torch.testing.assert_close(got.grad, want.grad, atol=1e-5, rtol=1e-3, msg=name)


@pytest.mark.parametrize("path", ["absorbed", "expanded"])
def test_queries_learn_over_two_calls_on_one_cache(model, path):
    """All else is frozen, so that the new latents carry no gradients, but what the queries read is saved."""
    model.requires_grad_(False)
    weight = model.model.layers[-1].self_attn.q_b_proj.weight.requires_grad_()
    ids, gradients = token_ids(1, 12), []
    for each, cache in ((model, DynamicCache()), (absorb(model, path=path), LatentCache(capacity=20))):
        first, second = (each(part, past_key_values=cache).logits for part in ids.split([8, 4], dim=1))
        (gradient,) = torch.autograd.grad(first.sum() + second.sum(), weight)
        gradients.append(gradient)
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-4, rtol=1e-3)


def test_gradients_pass_through_generate(model):
    """Without its no_grad, as who trains on what a model writes calls it."""

    def gradient(model):
        model.zero_grad()
        out = type(model).generate.__wrapped__(
            model, token_ids(2, 9), max_new_tokens=4, return_dict_in_generate=True, output_logits=True
        )
        torch.stack(out.logits).logsumexp(-1).sum().backward()
        return model.get_input_embeddings().weight.grad.clone()

    wanted = gradient(model)
    torch.testing.assert_close(gradient(absorb(model)), wanted, atol=1e-4, rtol=1e-3)
