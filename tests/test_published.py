"""The re-implemented published conversions, exact where their mathematics is."""

from dataclasses import replace

import pytest
import torch

from benchmarks import converters, published
from mla.convert.checkpoint import attention_weights
from mla.convert.evaluation import evaluate
from tests.convert.tiny import divergence, teacher, tokens

D = 12  # head width of the tiny teacher
IDS = tokens(2, 80, seed=5)


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def proportional_keys(**changes):
    """A teacher whose two key heads are multiples of one: one rotary key holds both."""
    model = teacher(**changes)
    for layer in model.model.layers:
        with torch.no_grad():
            first, second = layer.self_attn.k_proj.weight.view(2, D, -1)
            second.copy_(-0.7 * first)
    return model


def same(student, original, tolerance=1e-4):
    torch.testing.assert_close(logits(student), logits(original), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("balance", [1.0, 2.0, None])
@pytest.mark.parametrize("fold", [1, 2])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])  # the latter has biases
def test_one_head_with_all_of_rope_is_exact_without_folding(kind, fold, balance):
    original = teacher(kind, num_key_value_heads=1)
    moments = published.input_moments(original, tokens(8, 40))
    student = published.transmla(original, moments, rope=D, fold=fold, rank=D, balance=balance)
    if fold == 1:
        same(student, original)
    else:  # frequencies that differ were mixed
        assert divergence(logits(original), logits(student)) > 1e-3


@pytest.mark.parametrize("fold", [1, 2, 3])
def test_the_rotary_slots_hold_heads_that_share_their_keys(fold):
    # With base 1 every frequency is the same, so folding is exact too.
    changes = {"rope_parameters": {"rope_type": "default", "rope_theta": 1.0}} if fold > 1 else {}
    original = proportional_keys(**changes)
    moments = published.input_moments(original, tokens(8, 40))
    same(published.transmla(original, moments, rope=D, fold=fold), original, 1e-3)


@pytest.mark.parametrize(("rope", "fold"), [(12, 1), (12, 3), (6, 2), (4, 3), (4, 6)])
def test_the_split_loses_nothing_but_rotation(rope, fold):
    weights = attention_weights(teacher(), 0)
    root = torch.randn(48, 60, dtype=torch.float64)
    split = published.rorope(weights, root @ root.T, rope=rope, fold=fold)
    x, y = torch.randn(2, 48, dtype=torch.float64)
    for head in range(4):
        group = int(weights.group[head])
        query = weights.q[head].double() @ x
        slots = (split.query_rope[head] @ x) @ (split.key_rope @ y)
        rest = query @ split.read_out[group] @ split.key_nope @ y
        torch.testing.assert_close(slots + rest, query @ (weights.k[group].double() @ y))


def test_fold_1_is_a_principal_component_analysis_at_every_frequency():
    weights = attention_weights(teacher(), 0)
    x = torch.randn(500, 48, dtype=torch.float64)
    split = published.rorope(weights, x.T @ x / 500, rope=D, fold=1)
    keys = torch.einsum("gdi,ti->tgd", weights.k.double(), x)
    slots = x @ split.key_rope.T
    for pair in range(D // 2):
        both = torch.cat([keys[..., pair], keys[..., pair + D // 2]])  # real and imaginary parts
        first = torch.linalg.svd(both, full_matrices=False).S[0]
        found = slots[:, [2 * pair, 2 * pair + 1]].square().sum().sqrt()
        torch.testing.assert_close(found, first)


def test_the_joint_cut_is_the_best_of_its_rank():
    x = torch.randn(400, 20, dtype=torch.float64) @ torch.randn(20, 20, dtype=torch.float64)
    keys, values = torch.randn(7, 20, dtype=torch.float64) * 5, torch.randn(6, 20, dtype=torch.float64)
    moments = x.T @ x / 400
    for balance in (None, 1.0, 2.0):
        latent, to_key, to_value = published.joint_pca(keys, values, moments, 5, balance=balance)
        ratio = balance * (x @ keys.T).norm() / (x @ values.T).norm() if balance else 1.0
        outputs = torch.cat([x @ keys.T / ratio, x @ values.T], dim=1)
        found = torch.cat([x @ (to_key @ latent).T / ratio, x @ (to_value @ latent).T], dim=1)
        least = torch.linalg.svdvals(outputs)[5:].square().sum()
        torch.testing.assert_close((outputs - found).square().sum(), least)


def test_care_is_the_cut_without_balance():
    # C^½ Wᵀ, its decomposition and the way back, as the paper writes it.
    weight, root = torch.randn(9, 20, dtype=torch.float64), torch.randn(20, 30, dtype=torch.float64)
    moments = root @ root.T
    values, vectors = torch.linalg.eigh(moments)
    half = vectors * values.sqrt() @ vectors.T
    u, s, v = torch.linalg.svd(half @ weight.T, full_matrices=False)
    expected = (torch.linalg.inv(half) @ (u[:, :4] * s[:4]) @ v[:4]).T
    latent, to_key, to_value = published.joint_pca(weight[:5], weight[5:], moments, 4, balance=None)
    torch.testing.assert_close(torch.cat([to_key, to_value]) @ latent, expected)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_mha2mla_is_exact_with_all_of_rope_and_rank(kind, groups):
    original = teacher(kind, num_key_value_heads=groups)
    contributions = published.pair_contributions(original, tokens(4, 40))
    assert contributions.shape == (2, groups, D // 2)
    same(published.mha2mla(original, contributions, rope=D), original)
    assert divergence(logits(original), logits(published.mha2mla(original, contributions, rope=4))) > 1e-3


def test_mha2mla_keeps_the_pairs_that_contribute_most():
    original = teacher()
    attention = original.model.layers[0].self_attn
    loud = torch.tensor([[1, 4], [0, 5]])  # per key-value head
    with torch.no_grad():
        for head, pairs in enumerate(loud):
            for pair in pairs:
                attention.k_proj.weight.view(2, D, -1)[head, [pair, pair + D // 2]] *= 50
    contributions = published.pair_contributions(original, tokens(4, 40))
    student = published.mha2mla(original, contributions, rope=4, rank=10)
    assert torch.equal(student.model.layers[0].self_attn.kept, loud)
    assert student.model.layers[0].self_attn.cached == 2 * 4 + 10


def test_refusals():
    original = teacher()
    moments = published.input_moments(original, tokens(2, 20))
    with pytest.raises(ValueError, match="fold 1 do not fit"):
        published.transmla(original, moments, rope=6, fold=1)
    with pytest.raises(ValueError, match="rank 40 is more than"):
        published.transmla(original, moments, rope=12, fold=1, rank=40)
    with pytest.raises(ValueError, match="rope must be even"):
        published.mha2mla(original, torch.ones(2, 2, 6), rope=5)


def test_the_benchmark_gives_every_method_the_same_cache():
    asked = []

    def own(windows, window):
        asked.append((windows, window))
        return tokens(8, 40)

    study = converters.Study(teacher(), tokens(8, 40), tokens(2, 48, seed=2), own, ours_rope={24: [4, 6]})
    methods = [*converters.METHODS, converters.PARTIAL]
    rows = converters.measure(study, methods, [24, 16], tokens(3, 48, seed=3))
    assert rows[0]["method"] == "teacher"
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert rows[0]["rank"] + rows[0]["rope"] == 48
    assert [row["method"] for row in rows[1:9:2]] == list(converters.METHODS)
    for row in rows[1:]:
        assert row["rank"] + row["rope"] == (row["budget"] or 48)
        assert row["tokens"] == 3 * 47
        assert row["kl"] > 0
    assert rows[1]["tried"] == 2
    # The command's own: half and a third of the cache, windows as long as the model takes.
    assert asked == [(96, 256)] * 3
    assert rows[1]["settings"] == "8 windows of 40"
    list(converters.ours(replace(study, own_size=(5, 40)), 16))
    assert asked[3:] == [(5, 40)]
    tried = next(row for row in rows if row["method"] == "TransMLA")
    assert tried["tried"] > 1
    again = evaluate(study.teacher, tokens(3, 48, seed=3))
    assert again.perplexity == pytest.approx(rows[0]["perplexity"])


def test_wikitext_is_joined():
    raw = 'a " first @-@ class " cut ( 1 @.@ 5 m ) of 5 @,@ 000 , it \'s fine .'
    assert converters.detokenise(raw) == 'a "first-class" cut (1.5 m) of 5,000, it\'s fine.'
