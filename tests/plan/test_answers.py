"""Where one overtakes another, what fits, what is copied: sentences and figures agree with one another."""

import math
import re

import pytest

from mla.formats import CACHE_FORMATS
from mla.plan import FORMATS, Question, get_hardware, known_models, load_shape, make_plan, read_shape
from mla.plan.page import page
from mla.plan.report import TITLES, sentences
from mla.plan.rows import SIDE_BY_SIDE
from tests.plan.cases import plan

MISTRAL = known_models()["mistral-7b"]["config"]
DOTS = {"model_type": "dots3_note", "num_hidden_layers": 8, "vocab_size": 1000}


def of(raw, **question):
    shape = read_shape(raw, name="x", source="x")
    return make_plan(shape, get_hardware("h100"), Question(**{"context": 4096, **question}))


def at(answer, **inputs):
    values = answer.values
    for name, value in inputs.items():
        values = values.replaced(name, value)
    return values


@pytest.mark.parametrize(
    "answer",
    [
        plan("deepseek-v3.2", context=131072, query_tokens=256),
        plan("deepseek-v3.2", context=1000, query_tokens=64),
        plan("deepseek-v3", context=4096, query_tokens=64),
        of(DOTS, context=3000, query_tokens=40),
        of({**MISTRAL, "sliding_window": 512}, context=9000, query_tokens=3),
    ],
    ids=["sparse", "sparse-short", "dense", "windows-beside-sparse", "windows"],
)
def test_absorbed_and_expanded_cross_where_their_operations_do(answer):
    queries = answer["queries_crossing"]
    assert 1 < queries < math.inf
    there = at(answer, s=queries)
    assert there["attention_ops_mla"] == pytest.approx(there["attention_ops_expanded"])
    few, many = at(answer, s=queries * 0.9), at(answer, s=queries * 1.1)
    assert few["attention_ops_mla"] < few["attention_ops_expanded"]
    assert many["attention_ops_mla"] > many["attention_ops_expanded"]
    if math.isfinite(context := answer["context_crossing"]):
        there = at(answer, t=context)
        assert there["attention_ops_mla"] == pytest.approx(there["attention_ops_expanded"])


def test_a_sparse_model_with_many_queries():
    sparse = plan("deepseek-v3.2", "h200", context=131072, query_tokens=256)
    assert sparse["attention_ops_mla"] < sparse["attention_ops_expanded"] / 5
    assert sparse["queries_crossing"] == pytest.approx(131072 * 131072 / (768 * 2048 + 131072))
    assert sparse["context_crossing"] == pytest.approx(256 * (768 * 2048 + 131072) / 131072)
    assert "for 256 query token(s) absorbed wins beyond 3,328 tokens of context" in sentences(sparse)[0]


def test_the_cheaper_form_at_every_context():
    assert "absorbed wins at every context" in sentences(plan("llama-3.1-8b", rank=100))[0]
    assert "expanded wins at every context" in sentences(plan("deepseek-v3", query_tokens=171))[0]


@pytest.mark.parametrize(
    "answer",
    [
        plan("kimi-linear", "macbook-m4-max", context=200000, batch=8, query_tokens=4),
        plan("kimi-linear", "macbook-m4-max", context=1000, batch=8, query_tokens=4),
        plan("deepseek-v3", "h200", context=131072, batch=64, tensor_parallel=8),
        plan("deepseek-v3.2", "b200", context=50000, query_tokens=200),
        plan("qwen3-8b", "macbook-m4-max", context=777, batch=3, query_tokens=4),
    ],
    ids=lambda answer: f"{answer.shape.name}-{answer.question.context}",
)
def test_who_is_first_here_follows_from_who_overtakes_whom(answer):
    lines = [line for line in sentences(answer) if line.startswith("A step with ")]
    assert len(lines) == 4
    for line in lines:
        mla_now = line.startswith("A step with MLA absorbed")
        for unit, here in (
            ("tokens of context", answer.question.context),
            ("sequences", answer.question.batch),
        ):
            turns = re.findall(rf"(MLA|MHA|GQA|MQA|MLA expanded) overtakes [\w ]+? at ([\d,]+) {unit}", line)
            firsts = [name for name, place in turns if int(place.replace(",", "")) <= here]
            if firsts:
                assert (firsts[-1] == "MLA") == mla_now, line
            elif turns:
                assert (turns[0][0] == "MLA") != mla_now, line


def test_a_second_overtaking_is_told():
    kimi = plan("kimi-linear", "macbook-m4-max", context=200000, batch=8, query_tokens=4)
    line = next(line for line in sentences(kimi) if line.startswith("A step with GQA is "))
    assert re.search(r"MLA overtakes GQA at 469 .* and GQA overtakes MLA at 1,668 tokens of context", line)


@pytest.mark.parametrize("column", ["mha", "gqa", "mqa", "mla"])
def test_where_the_cache_outweighs_the_weights(column):
    for answer in (
        plan("kimi-linear", context=1000, batch=40),
        of({**MISTRAL, "sliding_window": 512}, batch=900),
    ):
        place = answer[f"outweighs_{column}"]
        if math.isinf(place):
            long = at(answer, t=2**30)
            assert long[f"cache_device_{column}"] < long[f"weights_device_{column}"]
        else:
            there = at(answer, t=place)
            assert there[f"cache_device_{column}"] == pytest.approx(there[f"weights_device_{column}"])


def test_windows_never_outweigh_and_states_may_at_once():
    never = of({**MISTRAL, "sliding_window": 512})
    assert never["outweighs_mha"] == math.inf
    assert "never (MHA)" in " ".join(sentences(never))
    assert plan("kimi-linear", batch=10_000)["outweighs_mla"] == 1


@pytest.mark.parametrize(
    ("name", "hardware", "options", "advice"),
    [
        ("deepseek-v3", "h100", {}, "--tensor-parallel 8 is the least that holds them"),
        ("deepseek-v3", "h200", {"tensor_parallel": 4}, "--tensor-parallel 8 is the least that holds them"),
        ("llama-3.1-405b", "h100", {}, "--tensor-parallel 16 is the least"),
        ("smollm2-1.7b", "h100", {"memory": 50e6}, "No --tensor-parallel that divides 32 heads holds them"),
    ],
)
def test_the_advised_split_works(name, hardware, options, advice):
    answer = plan(name, hardware, context=100, **options)
    assert any(advice in line for line in sentences(answer))
    if found := re.match(r"--tensor-parallel (\d+)", advice):
        split = plan(name, hardware, context=100, **{**options, "tensor_parallel": int(found[1])})
        assert split["weights_device_mla"] < split["memory"]
        assert not any("do not fit" in line for line in sentences(split))


def test_the_models_own_weights_decide_whether_they_fit():
    llama = plan("llama-2-7b", context=100)
    own, other = llama["weights_device_mha"], llama["weights_device_mla"]
    assert own < other
    for memory, rank, said in (
        (other, None, "As MLA the weights would not fit: 14.3 GiB on a device of 14.3 GiB; the model's"),
        (own, None, "The weights do not fit: 12.6 GiB"),
        (own, 16, "The weights do not fit: 12.6 GiB"),
    ):
        lines = [line for line in sentences(plan("llama-2-7b", memory=memory, rank=rank)) if " fit" in line]
        assert [line[: len(said)] for line in lines] == [said]
    assert '"own": "mha"' in page(llama)


@pytest.mark.parametrize(
    ("batch", "few"), [(13, None), (14, "MHA"), (58, "MHA, GQA"), (500, "MHA, GQA, MQA, MLA absorbed")]
)
def test_a_batch_that_does_not_fit_is_told(batch, few):
    answer = plan("qwen3-8b", context=8192, batch=batch)
    lines = [line for line in sentences(answer) if "no room" in line]
    said = f"As {few} there is no room beside the weights for {batch} sequence(s) of 8,192 tokens: "
    assert [line[: len(said)] for line in lines] == ([] if few is None else [said])
    for column, title in TITLES.items():
        if column in SIDE_BY_SIDE:
            assert (title in (few or "").split(", ")) == (answer[f"sequences_{column}"] < batch)


def test_indexers_are_copied_to_every_device():
    one, eight = plan("deepseek-v3.2", "h200"), plan("deepseek-v3.2", "h200", tensor_parallel=8)
    indexers = 61 * (7168 * (128 + 64) + 1536 * 64 * 128)
    assert one["indexer_parameters"] == indexers
    copied = indexers + one["replicated_parameters"]
    split = one["parameters_mla"] - copied
    assert eight["weights_device_mla"] == pytest.approx(split / 8 + copied)
    moved = one["weights_moved_device_mla"] - copied
    assert eight["weights_moved_device_mla"] == pytest.approx(moved / 8 + copied)
    used = one["weight_ops_device_mla"] - 2 * copied
    assert eight["weight_ops_device_mla"] == pytest.approx(used / 8 + 2 * copied)
    assert plan("deepseek-v3")["indexer_parameters"] == 0


def test_the_note_tells_the_rank_that_is_shown():
    shape = load_shape("llama-3.1-8b", rank=100)
    assert any("rank 100, rotary key 32" in note for note in shape.notes)
    assert not any("928" in note for note in shape.notes)
    assert any("rank 928, rotary key 96" in note for note in load_shape("llama-3.1-8b").notes)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("rank", [1, 7, 509, 510, 512])
def test_rows_are_as_long_as_the_cache_makes_them(name, rank):
    answer = plan("deepseek-v3", cache_format=name, rank=rank)
    assert answer["layer_bytes_mla"] == FORMATS[name].row_bytes(rank, 64)
    assert set(CACHE_FORMATS) < set(FORMATS)
