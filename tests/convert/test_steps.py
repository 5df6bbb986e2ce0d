"""The steps of the method, each against a slow and plain statement of what it claims."""

from __future__ import annotations

import math

import pytest
import torch

from mla.convert.factorise import Factors, Terms, factorise
from mla.convert.pipeline import embedded
from mla.convert.rope_split import (
    balance,
    ladder,
    mix_pairs,
    residual_keys,
    rotary_keys,
    rotary_queries,
    split_rope,
)
from mla.convert.statistics import AttentionWeights, Sample, collect, rotate, teacher_block, to_complex
from mla.convert.text import _draw, tokenize_windows, write_windows
from mla.errors import MLAError
from tests.convert.tiny import teacher, tokens


def _weights(groups: int = 2) -> AttentionWeights:
    torch.manual_seed(0)
    H, d, D = 4, 8, 24
    return AttentionWeights(
        q=torch.randn(H, d, D) * 0.4,
        k=torch.randn(groups, d, D) * 0.4,
        v=torch.randn(groups, d, D) * 0.3,
        o=torch.randn(H, D, d) * 0.3,
        inv_freq=100.0 ** -(torch.arange(0, d, 2, dtype=torch.float64) / d),
        constant=torch.zeros(D),
    )


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_statistics_equal_their_definition(groups: int) -> None:
    weights = _weights(groups)
    x, starts = torch.randn(2, 7, 24), torch.randn(5, 24)
    found = collect(weights, Sample(x, starts))
    output = torch.stack([teacher_block(weights, each) for each in x])
    H, d = 4, 8
    z = x.double() @ found.basis.T
    torch.testing.assert_close(found.basis @ found.basis.T, torch.eye(len(z[0, 0]), dtype=z.dtype))
    key_cov = torch.zeros_like(found.key_cov)
    value_cov = torch.zeros_like(found.value_cov)
    lags = torch.zeros_like(found.lags)
    turn = torch.zeros_like(found.rotation)
    norm = torch.zeros_like(found.rotation.real)
    query_moment, pair_moment = torch.zeros_like(found.query_moment), torch.zeros_like(found.pair_moment)
    expected = torch.zeros(2, 7, 24, dtype=torch.float64)
    for b in range(2):
        for h in range(H):
            g = int(weights.group[h])
            q, k, v = (x[b].double() @ w.double().T for w in (weights.q[h], weights.k[g], weights.v[g]))
            logits = rotate(q, weights.inv_freq) @ rotate(k, weights.inv_freq).T / math.sqrt(d)
            a = logits.masked_fill(~torch.ones(7, 7).tril().bool(), -math.inf).softmax(-1)
            o = weights.o[h].double()
            expected[b] += (a @ v) @ o.T
            pairs = to_complex(x[b].double() @ weights.k.double().mT)  # [g, s, j]
            for t in range(7):
                mean_z, mean_v = a[t] @ z[b], a[t] @ v
                value_cov[h] += torch.outer(mean_z, mean_z)
                for s in range(t + 1):
                    w = a[t, s] ** 2 * (o @ (v[s] - mean_v)).square().sum()
                    key_cov[h] += w * torch.outer(z[b, s] - mean_z, z[b, s] - mean_z)
                    lags[h, t - s] += w
                    power = to_complex(q[t]).abs().square() * to_complex(k[s]).abs().square() * w
                    turn[h] += power * torch.polar(torch.ones(4).double(), weights.inv_freq * (t - s))
                    norm[h] += power
                    query_moment[h] += w * torch.outer(q[t], q[t])
                    products = pairs[:, None, s] * pairs[None, :, s].conj()  # [g, f, j]
                    pair_moment[h] += (w * to_complex(q[t]).abs().square() * products).permute(2, 0, 1)
    close = {"atol": 1e-5, "rtol": 1e-4}
    torch.testing.assert_close(output.double(), expected, **close)
    torch.testing.assert_close(found.key_cov, key_cov / 14, **close)
    torch.testing.assert_close(found.value_cov, value_cov / 14, **close)
    torch.testing.assert_close(found.lags, lags / lags.sum(1, keepdim=True), **close)
    torch.testing.assert_close(found.rotation, turn / norm, **close)
    torch.testing.assert_close(found.plain_cov, torch.einsum("btm,btn->mn", z, z) / 14, **close)
    z_starts = starts.double() @ found.basis.T
    torch.testing.assert_close(found.start_cov, z_starts.T @ z_starts / 5, **close)
    torch.testing.assert_close(found.query_moment, query_moment / lags.sum(1)[:, None, None], **close)
    torch.testing.assert_close(found.pair_moment, pair_moment / 14, **close)


def test_any_token_of_the_text_may_begin_one() -> None:
    model = teacher(bos_token_id=90)
    calibration = torch.tensor([[5, 7, 5], [8, 3, 7]])
    stream = embedded(model, calibration)
    assert torch.equal(stream.windows, model.get_input_embeddings()(calibration))
    assert torch.equal(stream.starts, model.get_input_embeddings()(torch.tensor([90, 3, 5, 7, 8])))


def test_of_many_tokens_some_begin_a_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mla.convert.pipeline.MOST_STARTS", 4)
    model = teacher(bos_token_id=None)
    stream = embedded(model, torch.arange(16).view(2, 8))
    assert torch.equal(stream.starts, model.get_input_embeddings()(torch.tensor([0, 4, 8, 12])))


def test_one_window_does_not_say_how_texts_begin() -> None:
    model = teacher(bos_token_id=None)
    stream = embedded(model, torch.tensor([[5, 7, 5]]))
    assert torch.equal(stream.starts, model.get_input_embeddings()(torch.tensor([5, 7])))


def test_where_every_window_begins_alike_every_text_does() -> None:
    model = teacher(bos_token_id=90)
    stream = embedded(model, torch.tensor([[1, 7, 5], [1, 3, 7]]))
    assert torch.equal(stream.starts, model.get_input_embeddings()(torch.tensor([1])))


def test_slots_and_residual_rebuild_every_logit_when_nothing_is_static() -> None:
    # One group, all of RoPE: slots alone give the rotated logits; the pair order is the interleaved one.
    weights = _weights(1)
    x = torch.randn(1, 9, 24)
    statistics = collect(weights, Sample(x, x[:, 0]))
    split = split_rope(statistics, weights.inv_freq, ladder(8, 100.0))
    assert not residual_keys(split, weights.k.double()).any()
    key = x[0].double() @ rotary_keys(split, weights.k.double()).T  # [t, p]
    query = torch.einsum("hpD,tD->htp", rotary_queries(split, weights.q.double()), x[0].double())

    def turned(rows: torch.Tensor) -> torch.Tensor:
        pairs = torch.view_as_complex(rows.unflatten(-1, (-1, 2)).contiguous())
        angles = torch.outer(torch.arange(9, dtype=torch.float64), weights.inv_freq)
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)

    expected = torch.stack(
        [
            rotate(x[0].double() @ weights.q[h].double().T, weights.inv_freq)
            @ rotate(x[0].double() @ weights.k[0].double().T, weights.inv_freq).T
            for h in range(4)
        ]
    )
    torch.testing.assert_close(turned(query) @ turned(key).T, expected)
    key_rows, query_rows = balance(
        rotary_keys(split, weights.k.double()), rotary_queries(split, weights.q.double())
    )
    torch.testing.assert_close(
        torch.einsum("hpD,pE->hDE", query_rows, key_rows),
        torch.einsum(
            "hpD,pE->hDE",
            rotary_queries(split, weights.q.double()),
            rotary_keys(split, weights.k.double()),
        ),
    )


def test_expected_rotation_turns_pairs() -> None:
    rows = torch.randn(8, 5, dtype=torch.float64)
    factor = torch.polar(torch.ones(4, dtype=torch.float64), torch.full((4,), math.pi / 2).double())
    turned = mix_pairs(factor, rows)
    torch.testing.assert_close(turned[:4], -rows[4:])
    torch.testing.assert_close(turned[4:], rows[:4])


def test_more_slots_lose_less() -> None:
    """Of the logits, when the rank is not cut."""
    weights = _weights(2)
    x = torch.randn(4, 32, 24)
    statistics = collect(weights, Sample(x, x[:, 0]))
    group = torch.arange(4) * 2 // 4
    queries, keys = weights.q.double(), weights.k.double()
    q, k = (torch.einsum("hdD,btD->bhtd", w, x.double()) for w in (queries, keys[group]))
    wanted = rotate(q, weights.inv_freq) @ rotate(k, weights.inv_freq).mT
    lost = []
    for p in (2, 4, 6, 8):
        frequencies = ladder(p, 100.0 ** (p / 8))
        split = split_rope(statistics, weights.inv_freq, frequencies)
        fixed = torch.einsum("hdD,btD->bhtd", mix_pairs(split.rotation, queries), x.double())
        left = torch.einsum("gdD,btD->bgtd", residual_keys(split, keys), x.double())[:, group]
        angles = torch.outer(torch.arange(32, dtype=torch.float64), frequencies)
        turn = torch.polar(torch.ones_like(angles), angles)
        slots = [
            torch.view_as_complex((x.double() @ rows.mT).unflatten(-1, (-1, 2)).contiguous()) * turn
            for rows in (rotary_queries(split, queries)[None].transpose(0, 1), rotary_keys(split, keys))
        ]
        turned = (slots[0] @ slots[1].mH).real.transpose(0, 1)
        made = turned + fixed @ left.mT
        lost.append(float(((made - wanted) * torch.ones(32, 32).tril()).square().mean()))
    nothing = float((wanted * torch.ones(32, 32).tril()).square().mean())
    assert nothing > lost[0] > lost[1] > lost[2] > lost[3]


def _terms() -> Terms:
    torch.manual_seed(1)
    root = torch.randn(6, 16, 16, dtype=torch.float64)
    metric = torch.randn(6, 4, 4, dtype=torch.float64)
    return Terms(torch.randn(6, 4, 16, dtype=torch.float64), metric @ metric.mT, root @ root.mT)


def _error(terms: Terms, found: Factors) -> float:
    """J of the module's text."""
    rest = terms.targets - found.decoders @ found.encoder
    return float(torch.einsum("ide,iem,imk,idk->", terms.metric, rest, terms.cov, rest))


def test_one_covariance_gives_the_decomposition() -> None:
    many = _terms()
    terms = Terms(many.targets, many.metric, many.cov[:1].expand(6, 16, 16))
    root = torch.linalg.cholesky(terms.cov[0])
    stack = torch.linalg.cholesky(terms.metric).mT @ terms.targets @ root
    values = torch.linalg.svdvals(stack.flatten(0, 1))
    for rank in (1, 5, 12):
        found = factorise(terms, rank, rounds=0)
        assert _error(terms, found) == pytest.approx(float(values[rank:].square().sum()), rel=1e-6)


def test_alternation_only_lowers_the_error() -> None:
    terms = _terms()
    errors = [_error(terms, factorise(terms, 6, rounds=rounds)) for rounds in (0, 1, 2, 4, 8)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.95 * errors[0]


def test_enough_rank_is_exact() -> None:
    terms = _terms()
    found = factorise(terms, 20)
    assert found.encoder.shape == (20, 16)
    nothing = Factors(found.encoder, torch.zeros_like(found.decoders))
    assert _error(terms, found) < 1e-20 * _error(terms, nothing)


class _Letters:
    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) for letter in text]}


def test_windows_are_spread_and_seeded() -> None:
    text = "".join(chr(1000 + index) for index in range(4000))
    windows = tokenize_windows(text, _Letters(), 4, 10)
    assert windows.shape == (4, 10)
    assert windows.dtype == torch.int64
    assert [int(row[0] - 1000) // 1000 for row in windows] == [0, 1, 2, 3]
    assert torch.equal(windows, tokenize_windows(text, _Letters(), 4, 10))
    assert not torch.equal(windows, tokenize_windows(text, _Letters(), 4, 10, seed=1))
    for windows in (1, 2):
        with pytest.raises(MLAError, match=f"5 characters hold 0 of {windows} windows of 10 tokens"):
            tokenize_windows("short", _Letters(), windows, 10)
    with pytest.raises(MLAError, match="at least 1 window"):
        tokenize_windows(text, _Letters(), 0, 10)


def test_windows_of_a_short_text_overlap_but_differ() -> None:
    class Pairs:
        def __call__(self, text: str) -> dict[str, list[int]]:
            return {"input_ids": [ord(letter) for letter in text[1::2]]}

    text = "".join(chr(1000 + index) for index in range(140))
    windows = tokenize_windows(text, Pairs(), 6, 10)
    starts = [int(row[0]) for row in windows]
    assert starts == [1001, 1013, 1025, 1037, 1049, 1061]
    with pytest.raises(
        MLAError, match=r"notes is too short: 129 characters hold 5 of 6 windows of 10 tokens"
    ):
        tokenize_windows(text[:129], Pairs(), 6, 10, name="notes")
    assert tokenize_windows(text[:129], Pairs(), 5, 10).shape == (5, 10)


@pytest.mark.parametrize("windows", [1, 3, 20])
def test_tokens_of_many_characters(windows: int) -> None:
    """Long words, or runs of spaces that are one token: the text is not short for them."""

    class Words:
        def __call__(self, text: str) -> dict[str, list[int]]:
            return {"input_ids": [len(word) for word in text.split()]}

    text = ("pneumonoultramicroscopic" + " ") * 1000
    found = tokenize_windows(text, Words(), windows, 10)
    assert found.shape == (windows, 10)
    with pytest.raises(MLAError, match="75 characters hold 0 of 1 windows of 10 tokens"):
        tokenize_windows(text[:75], Words(), 1, 10)


class _Talker:
    """A tokenizer of letters with a chat template; token 1 starts every text where it is told to."""

    bos_token_id = 1
    all_special_ids = (0, 1, 2)
    chat_template: str | None = "yes"

    def __init__(self, *, starts: bool = False) -> None:
        self.start = [1] if starts else []

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        start = self.start if add_special_tokens else []
        return {"input_ids": start + [1 if letter == "^" else ord(letter) % 90 + 3 for letter in text]}

    def get_vocab(self) -> dict[str, int]:
        return {str(token): token for token in range(94)}

    def get_added_vocab(self) -> dict[str, int]:
        return {"93": 93}

    def apply_chat_template(
        self, messages: list[dict[str, str]], tokenize: bool, add_generation_prompt: bool
    ) -> str:
        assert not tokenize
        assert add_generation_prompt
        return ("^" if self.start else "") + "<user>" + messages[0]["content"] + "</user><model>"


# A conversation up to the answer: the template's tokens, and as -1 those that the user says.
_BEFORE, _AFTER = ([ord(letter) % 90 + 3 for letter in part] for part in ("<user>", "</user><model>"))
_ASKED = torch.tensor([*_BEFORE, *[-1] * 24, *_AFTER])


def _told(texts: torch.Tensor) -> torch.Tensor:
    """Which texts are conversations: bool [n] of token ids [n, t]."""
    return ((texts[:, : len(_ASKED)] == _ASKED) | (_ASKED == -1)).all(1)


@pytest.mark.parametrize("starts", [False, True])
def test_a_model_writes_its_own_windows(starts: bool) -> None:
    talker, fresh = _Talker(starts=starts), 300 - starts
    windows = write_windows(teacher(), talker, 37, 300, seed=3)
    assert windows.shape == (37, 300)
    assert windows.dtype == torch.int64
    assert not starts or bool((windows[:, 0] == 1).all())
    # Texts of 128 tokens, every fourth a conversation; what the template does not give is drawn.
    texts = windows[:, 300 - fresh :].flatten()
    texts = texts[: len(texts) // 128 * 128].view(-1, 128)
    asked = torch.arange(len(texts)) % 4 == 3
    assert torch.equal(_told(texts), asked)
    for drawn in (texts[:, len(_BEFORE) : len(_BEFORE) + 24], texts[:, len(_ASKED) :]):
        assert len({tuple(row.tolist()) for row in drawn}) == len(texts)
    begun = set(texts[~asked, 0].tolist())
    assert len(begun) > 20
    assert min(begun) > 2
    assert max(begun) < 93
    assert torch.equal(windows, write_windows(teacher(), talker, 37, 300, seed=3))
    assert not torch.equal(windows, write_windows(teacher(), talker, 37, 300, seed=4))


def test_the_written_text_follows_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cached decoding draws from the very distribution of the full forward pass."""
    monkeypatch.setattr("mla.convert.text._words", lambda *_: torch.tensor([7]))
    silent = _Talker()
    silent.chat_template = None
    model = teacher()
    windows = write_windows(model, silent, 400, 3)
    assert bool((windows[:, 0] == 7).all())
    with torch.no_grad():
        chance = model(windows[:1, :1]).logits[0, 0].softmax(-1)
    seen = torch.bincount(windows[:, 1], minlength=len(chance)) / len(windows)
    assert float((seen - chance).abs().sum()) < 0.5  # 400 draws; a uniform draw is 1.4 away
    uniform = torch.full_like(chance, 1 / len(chance))
    assert float((seen - chance).abs().sum()) < float((seen - uniform).abs().sum())


def test_text_is_written_on_a_cache_as_without_one() -> None:
    model, given = teacher(), tokens(2, 40)
    seen: list[torch.Tensor] = []
    hook = model.register_forward_hook(lambda *call: seen.append(call[-1].logits))
    assert torch.equal(_draw(model, given, torch.Generator()), given)
    hook.remove()
    with torch.no_grad():
        torch.testing.assert_close(torch.cat(seen, 1), model(given[:, :-1]).logits, atol=1e-5, rtol=1e-4)


def test_a_long_template_leaves_room_for_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mla.convert.text._PIECE", 4)
    texts = write_windows(teacher(), _Talker(), 1, 16 * len(_ASKED)).view(-1, 2 * len(_ASKED))
    assert torch.equal(_told(texts), torch.arange(8) % 4 == 3)
    assert len({tuple(row.tolist()) for row in texts[3::4, len(_ASKED) :]}) == 2


def test_a_template_may_begin_with_what_the_user_says() -> None:
    class Bare(_Talker):
        def apply_chat_template(self, messages: list[dict[str, str]], **options: bool) -> str:
            return messages[0]["content"] + "</user><model>"

    texts = write_windows(teacher(), Bare(), 1, 1024).view(-1, 128)
    assert bool((texts[3::4, 24 : 24 + len(_AFTER)] == torch.tensor(_AFTER)).all())
    assert int(texts.min()) >= 0
