"""What absorb() does to a model besides its answers: refusals, reversibility, masks, copies."""

import copy
import gc
import io
import pickle
import subprocess
import sys
import weakref

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

from mla.cache import LatentCache
from mla.errors import MLAError
from mla.integrations import transformers as integration
from mla.integrations.transformers import absorb, is_absorbed, latent_attentions, restore
from mla.ops import portable
from tests.families import build, token_ids
from tests.nn.test_misuse import replaced
from tests.ops.cases import record_paths


@pytest.fixture
def model():
    return build("deepseek_v3")


def test_a_model_that_is_not_mla_is_refused():
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    with pytest.raises(MLAError, match=r"model type llama\) is not an MLA model.*convert it first"):
        absorb(LlamaForCausalLM(config))


def test_a_bias_or_another_layer_type_is_refused_and_nothing_changed(model):
    attention = list(latent_attentions(model).values())[-1]
    rows, rank = attention.kv_b_proj.weight.shape
    attention.kv_b_proj = torch.nn.Linear(rank, rows, bias=True)
    with pytest.raises(MLAError, match=r"layers\.2\.self_attn\.kv_b_proj: expected a plain linear layer"):
        absorb(model)
    attention.kv_b_proj = torch.nn.Sequential(torch.nn.Linear(rank, rows, bias=False))
    with pytest.raises(MLAError, match="merge an adapter"):
        absorb(model)
    attention.kv_b_proj = torch.nn.Linear(rank, rows, bias=False, device="meta")
    with pytest.raises(MLAError, match="load the model without offloading"):
        absorb(model)
    attention.kv_b_proj = replaced("pruned")
    with pytest.raises(MLAError, match="expected a layer without hooks"):
        absorb(model)
    attention.kv_b_proj = replaced("wrapped")
    with pytest.raises(MLAError, match=r"expected a plain floating-point weight of shape .*, got Wrapped"):
        absorb(model)
    with pytest.raises(ValueError, match='expected path "auto", "absorbed" or "expanded", got \'fast\''):
        absorb(model, path="fast")
    assert not is_absorbed(model)
    assert all("expand_kv" not in vars(module) for module in latent_attentions(model).values())


def test_an_absorbed_model_that_is_refused_stays_absorbed(model):
    absorb(model, path="expanded")
    attention = list(latent_attentions(model).values())[-1]
    attention.kv_b_proj = replaced("bias")
    with pytest.raises(MLAError, match="with a bias"):
        absorb(model)
    assert integration.absorbed_path(model) == "expanded"


def test_an_adapter_that_comes_after_absorb_is_refused(model):
    """Its base layer's weight alone would be used, in silence."""
    absorb(model)
    attention = list(latent_attentions(model).values())[-1]
    attention.kv_b_proj = torch.nn.Sequential(attention.kv_b_proj)
    with pytest.raises(MLAError, match=r"layer 2\.kv_b_proj: expected a plain linear layer"):
        model(token_ids(1, 4))


@torch.no_grad()
def test_models_that_share_a_config(model):
    ids = token_ids(1, 8)
    other = type(model)(model.config).eval()
    wanted = other(ids).logits
    absorb(model)
    torch.testing.assert_close(other(ids).logits, wanted)  # not absorbed
    absorb(other)
    torch.testing.assert_close(other(ids).logits, wanted, atol=1e-4, rtol=1e-4)
    restore(model)
    with pytest.raises(MLAError, match=r"set to sdpa since absorb.* absorb.model. again"):
        other(ids)
    torch.testing.assert_close(absorb(other)(ids).logits, wanted, atol=1e-4, rtol=1e-4)
    restore(other)
    assert model.config._attn_implementation == "sdpa"


def test_a_shared_config_is_not_left_without_sinks():
    """This family's sinks are unknown to sdpa, which takes them and does nothing."""
    model = build("hy_v4")
    assert model.config._attn_implementation == "eager"
    other = type(model)(model.config)
    for each in (model, other):
        absorb(each)
    for each in (model, other):
        restore(each)
    assert model.config._attn_implementation == "eager"


@torch.no_grad()
def test_sparse_attention_is_not_lost_by_a_shared_config():
    model = build("deepseek_v32")
    other = type(model)(model.config).eval()
    absorb(model)
    with pytest.raises(
        MLAError, match="has the config of an absorbed model, or a copy of it, and is not absorbed"
    ):
        other(token_ids(1, 40))
    absorb(other)(token_ids(1, 40))


@torch.no_grad()
def test_a_copied_config_does_not_absorb_in_silence(model):
    other = type(model)(copy.deepcopy(absorb(model).config)).eval()
    other.load_state_dict(model.state_dict())
    with pytest.warns(
        UserWarning, match=r"config of an absorbed model, or a copy of it, and is not absorbed"
    ):
        got = other(token_ids(1, 9)).logits
    torch.testing.assert_close(got, restore(model)(token_ids(1, 9)).logits, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_model_that_is_offloaded_after_absorb_is_named(model):
    accelerate = pytest.importorskip("accelerate")
    accelerate.cpu_offload(absorb(model), execution_device="cpu")
    with pytest.raises(
        MLAError, match=r"kv_b_proj: expected weights in memory, got none; restore\(model\), or"
    ):
        model(token_ids(1, 9))


@torch.no_grad()
def test_a_trace_holds_for_other_masks(model):
    absorb(model.requires_grad_(False), path="expanded")
    ids, full = token_ids(2, 8), torch.ones(2, 8, dtype=torch.int64)
    padded = full.clone()
    padded[1, :3] = 0

    def run(ids, mask):
        return model(ids, attention_mask=mask, use_cache=False).logits

    traced = torch.jit.trace(run, (ids, full), check_trace=False)
    for mask in (full, padded):
        wanted = run(ids, mask)
        torch.testing.assert_close(traced(ids, mask)[mask.bool()], wanted[mask.bool()], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_an_exported_model_takes_every_size(model):
    dynamic = torch.export.Dim.DYNAMIC
    given = {"input_ids": token_ids(2, 8), "use_cache": False}
    shapes = {"input_ids": {0: dynamic, 1: dynamic}, "use_cache": None}
    program = torch.export.export(absorb(model), (), given, dynamic_shapes=shapes).module()
    for b, s in ((2, 2), (3, 33), (1, 200)):
        ids = token_ids(b, s)
        got, wanted = (each(input_ids=ids, use_cache=False).logits for each in (program, model))
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-4)


def test_a_model_without_the_seam_is_refused(model, monkeypatch):
    kind = type(next(iter(latent_attentions(model).values())))
    monkeypatch.delattr(kind, "expand_kv")
    with pytest.raises(MLAError, match="no expand_kv there"):
        absorb(model)


def test_absorbing_twice_and_restoring_twice(model):
    before = model.config._attn_implementation
    assert absorb(absorb(model)) is model
    assert restore(restore(model)) is model
    assert model.config._attn_implementation == before
    assert "_prepare_cache_for_generation" not in vars(model)


def test_nothing_of_it_is_saved(model, tmp_path):
    absorb(model).save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert not is_absorbed(again)
    assert again.config._attn_implementation == "sdpa"


@torch.no_grad()
def test_weights_changed_after_absorbing_count():
    model = build("youtu")
    stock, ids = copy.deepcopy(model), token_ids()
    absorb(model)
    for each in (stock, model):
        for module in latent_attentions(each).values():
            module.kv_b_proj.weight.mul_(1.5)
    torch.testing.assert_close(model(ids).logits, stock(ids).logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(model.double()(ids).logits, stock.double()(ids).logits, atol=1e-9, rtol=1e-9)


@torch.no_grad()
def test_custom_four_dimensional_masks(model):
    stock, ids = copy.deepcopy(model), token_ids(2, 12)
    absorb(model)
    block = torch.ones(2, 1, 12, 12, dtype=torch.bool).tril()
    block[:, :, 6:, :6] = False
    additive = torch.zeros(block.shape).masked_fill(~block, torch.finfo(torch.float32).min)
    for mask in (block, additive):
        want, got = (each(ids, attention_mask=mask).logits for each in (stock, model))
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_packed_sequences(model):
    stock, ids = copy.deepcopy(model), token_ids(1, 12)
    absorb(model)
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6]])
    want, got = (each(ids, position_ids=positions, use_cache=False).logits for each in (stock, model))
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_generate_respects_the_cache_it_is_given(model):
    ids, options = token_ids(1, 9), {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True}
    absorb(model)
    mine = DynamicCache(config=model.config)
    assert model.generate(ids, past_key_values=mine, **options).past_key_values is mine
    static = model.generate(ids, cache_implementation="static", **options).past_key_values
    assert isinstance(static, StaticCache)
    made = model.generate(ids, **options).past_key_values
    assert isinstance(made, LatentCache)
    assert model.generate(ids, use_cache=False, **options).past_key_values is None
    restore(model)
    assert type(model.generate(ids, **options).past_key_values) is DynamicCache


def saved_and_loaded(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, saved_and_loaded, lambda model: pickle.loads(pickle.dumps(model))],
    ids=["copy", "file", "pickle"],
)
@torch.no_grad()
def test_copies_and_pickles_are_independent(model, copied):
    absorb(model)
    twin = copied(model)
    restore(model)
    assert is_absorbed(twin)
    ids = token_ids()
    torch.testing.assert_close(twin(ids).logits, model(ids).logits, atol=1e-4, rtol=1e-4)
    made = twin.generate(ids, max_new_tokens=2, do_sample=False, return_dict_in_generate=True)
    assert isinstance(made.past_key_values, LatentCache)
    for parameter in model.parameters():
        parameter.mul_(0.5)
    kept = twin(ids[:1, :4]).logits  # few rows: linear layers by the kernel
    for parameter in model.parameters():
        parameter.mul_(2)
    torch.testing.assert_close(kept, model(ids[:1, :4]).logits, atol=1e-4, rtol=1e-4)
    restore(twin)
    assert torch.equal(twin(ids).logits, model(ids).logits)


@torch.no_grad()
def test_another_process_may_be_given_an_absorbed_model(model, tmp_path):
    """One that has not imported anything of ours before."""
    ids = token_ids(1, 4)
    torch.save((absorb(model), ids), tmp_path / "model.pt")
    code = (
        "import sys, torch\n"
        "model, ids = torch.load(sys.argv[1], weights_only=False)\n"
        "with torch.no_grad():\n"
        "    torch.save(model(ids).logits, sys.argv[2])\n"
    )
    made = tmp_path / "logits.pt"
    subprocess.run([sys.executable, "-c", code, tmp_path / "model.pt", made], check=True)
    torch.testing.assert_close(torch.load(made), model(ids).logits)


@torch.no_grad()
def test_half_precision(model):
    """bf16: as near to the fp32 answer as the stock bf16 model is."""
    ids = token_ids(2, 30)
    exact = model(ids).logits
    stock = copy.deepcopy(model).bfloat16()
    absorbed = absorb(copy.deepcopy(stock))
    stock_error = (stock(ids).logits.float() - exact).abs().mean()
    assert (absorbed(ids).logits.float() - exact).abs().mean() < 1.5 * stock_error


def test_autocast_does_not_reach_the_scores(model, monkeypatch):
    """Half precision in the linear layers, as the stock model has it, but none in the attention."""
    states = []
    real = portable.absorbed
    monkeypatch.setattr(
        portable, "absorbed", lambda *a, **k: states.append(torch.is_autocast_enabled("cpu")) or real(*a, **k)
    )
    absorb(model, path="absorbed")
    ids = token_ids()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model.train()(ids, labels=ids, use_cache=False).loss
    loss.backward()
    assert states == [False] * model.config.num_hidden_layers


def test_an_option_that_changes_the_mathematics_is_not_dropped(model):
    absorb(model)
    module = next(iter(latent_attentions(model).values()))
    query, key, value = torch.zeros(1, 4, 1, 24), torch.zeros(1, 1, 5, 32), torch.zeros(1, 1, 5, 8)
    with pytest.raises(NotImplementedError, match="absorbed attention has no softcap"):
        integration._attention(module, query, key, value, None, scaling=1.0, softcap=30.0)
    with pytest.raises(ValueError, match="needs the softmax scale"):
        integration._attention(module, query, key, value, None)


def test_what_transformers_hands_to_losses_and_packs_changes_nothing(model):
    ids = token_ids(1, 8)
    others = {"shift_labels": ids, "position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])}
    packed = {"cu_seq_lens_q": torch.tensor([0, 4, 8]), "cu_seq_lens_k": torch.tensor([0, 4, 8])}
    options = {"labels": ids, "use_cache": False, "ignore_index": int(ids[0, 3]), "seq_idx": None, **others}
    want = model(ids, **options, **packed, max_length_q=4, max_length_k=4)
    got = absorb(model)(ids, **options, **packed, max_length_q=4, max_length_k=4)
    torch.testing.assert_close(got.loss, want.loss)
    torch.testing.assert_close(got.logits, want.logits, atol=1e-4, rtol=1e-4)


def test_a_mask_of_integers_is_named(model):
    with pytest.raises(ValueError, match="attention_mask: expected bool or a floating dtype"):
        absorb(model)(token_ids(2, 8), attention_mask=torch.ones(2, 1, 8, 8, dtype=torch.long).tril())


@torch.no_grad()
def test_models_that_share_modules(model):
    """A base and what stands around it, absorbed both: either may be restored, and be absorbed again."""
    ids = token_ids(1, 8)
    want = model(ids, use_cache=False).logits
    absorb(absorb(model.model) and model)
    restore(model)
    assert not is_absorbed(model.model)
    assert integration.absorbed_path(model.model) is None
    torch.testing.assert_close(model(ids, use_cache=False).logits, want)
    absorb(model.model)
    torch.testing.assert_close(model(ids, use_cache=False).logits, want, atol=1e-4, rtol=1e-4)
    restore(restore(model).model)
    assert all("expand_kv" not in vars(module) for module in latent_attentions(model).values())


@torch.no_grad()
def test_attention_that_is_compiled_by_itself(model):
    ids = token_ids(1, 8)
    want = model(ids, use_cache=False).logits
    for layer in model.model.layers:
        layer.self_attn = torch.compile(layer.self_attn, backend="eager")
    absorb(model)
    torch.testing.assert_close(model(ids, use_cache=False).logits, want, atol=1e-4, rtol=1e-4)
    restore(model)
    torch.testing.assert_close(model(ids, use_cache=False).logits, want)


def test_an_absorbed_model_is_freed_when_nobody_has_it():
    """At once, as a stock one: weights do not wait for Python to look for circles."""
    model = absorb(build("deepseek_v3"))
    with torch.no_grad():
        model.generate(token_ids(1, 8), max_new_tokens=2)
    weight = weakref.ref(model.lm_head.weight)
    gc.collect()
    gc.disable()
    try:
        del model
        assert weight() is None
    finally:
        gc.enable()


def test_other_modules_of_the_same_config_keep_their_attention():
    """A module that is not latent attention gets torch's own, causal over the last s of t keys."""
    module = torch.nn.Module()
    module.is_causal = True
    query, key, value = (torch.randn(1, 2, s, 4) for s in (3, 7, 7))
    out, _ = integration._attention(module, query, key, value, None, scaling=0.5)
    mask = torch.ones(3, 7, dtype=torch.bool).tril(4)
    want = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=0.5)
    torch.testing.assert_close(out, want.transpose(1, 2))


def test_what_is_no_model_of_transformers_is_refused(model):
    class Around(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.config = inner, inner.config

    for wrong in (Around(model), torch.compile(Around(model), backend="eager")):
        with pytest.raises(MLAError, match=r"expected a model of Transformers .* got Around; take the model"):
            absorb(wrong)


@torch.no_grad()
def test_a_compiled_model(model):
    """In the wrapper of torch.compile: absorbed, compiled with it as one graph, and restored."""
    ids, mask = token_ids(2, 8), torch.ones(2, 8, dtype=torch.long)
    mask[1, :3] = 0
    real = mask.bool()
    want, text = model(ids, attention_mask=mask).logits, model.generate(ids, max_new_tokens=3)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    compiled(ids, use_cache=False)  # a graph that must not be used again
    assert absorb(compiled) is compiled
    assert is_absorbed(compiled)
    assert is_absorbed(model)
    assert integration.absorbed_path(compiled) == "auto"
    torch.testing.assert_close(compiled(ids, use_cache=False).logits[0], want[0], atol=1e-4, rtol=1e-4)
    got = compiled(ids, attention_mask=mask, past_key_values=LatentCache(model.config)).logits
    torch.testing.assert_close(got[real], want[real], atol=1e-4, rtol=1e-4)
    assert compiled.generate(ids, max_new_tokens=3).tolist() == text.tolist()
    assert restore(compiled) is compiled
    assert not is_absorbed(model)
    assert "_prepare_cache_for_generation" not in vars(model)
    torch.testing.assert_close(compiled(ids, use_cache=False).logits[0], want[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["deepseek_v3", "deepseek_v32"])
@torch.no_grad()
def test_a_static_cache_goes_to_the_kernels(monkeypatch, family):
    """Prompt, chunk and tokens meet the keys that are there, not all that the cache has room for."""
    model = build(family)
    ids, mask = token_ids(2, 30), torch.ones(2, 30, dtype=torch.long)
    mask[1, :4] = 0
    options = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False}
    text = model.generate(ids, **options)
    want = model(ids, attention_mask=mask).logits
    absorb(model)
    calls, lengths = record_paths(monkeypatch), []
    honest = integration.prefill
    monkeypatch.setattr(
        integration,
        "prefill",
        lambda *args, **rest: lengths.append(args[2].shape[1]) or honest(*args, **rest),
    )
    cache = StaticCache(config=model.config, max_cache_len=400)
    parts = [
        model(ids[:, a:b], attention_mask=mask[:, :b], past_key_values=cache).logits
        for a, b in ((0, 20), (20, 29), (29, 30))
    ]
    real = mask.bool()
    torch.testing.assert_close(torch.cat(parts, dim=1)[real], want[real], atol=1e-4, rtol=1e-4)
    if family == "deepseek_v3":  # the other one's indexer chooses keys
        assert lengths == [t for t in (20, 29, 30) for _ in range(model.config.num_hidden_layers)]
        assert {engine for engine, _ in calls} == {"kernels"}
    assert model.generate(ids, cache_implementation="static", **options).tolist() == text.tolist()


@pytest.mark.parametrize("lengths", [(8, 5), (6, 5), (7, 8), (1, 1)])
@torch.no_grad()
def test_padding_at_the_end_goes_to_the_kernels(model, monkeypatch, lengths):
    """Also where the longest text does not fill the batch, and where a StaticCache has room beyond."""
    ids, mask = token_ids(2, 8), (torch.arange(8) < torch.tensor(lengths)[:, None]).long()
    want = model(ids, attention_mask=mask).logits
    absorb(model)
    calls = record_paths(monkeypatch)
    for cache in (None, StaticCache(config=model.config, max_cache_len=40)):
        got = model(ids, attention_mask=mask, past_key_values=cache).logits
        torch.testing.assert_close(got[mask.bool()], want[mask.bool()], atol=1e-4, rtol=1e-4)
    assert {engine for engine, _ in calls} == {"kernels"}


@torch.no_grad()
def test_unused_rows_of_a_static_cache_may_hold_anything(model):
    """A StaticCache hands over rows beyond its length; the mask hides them, so finite rubbish is harmless."""
    ids = token_ids(1, 10)
    want = model(ids).logits
    absorb(model)
    cache = StaticCache(config=model.config, max_cache_len=32)
    model(ids[:, :6], past_key_values=cache)
    for layer in cache.layers:
        layer.keys[:, :, 6:], layer.values[:, :, 6:] = 1e4, -1e4
    got = model(ids[:, 6:], past_key_values=cache).logits
    torch.testing.assert_close(got, want[:, 6:], atol=1e-4, rtol=1e-4)
