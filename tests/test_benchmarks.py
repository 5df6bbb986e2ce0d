"""The benchmarks run, say what they ran on, and give no figures for a wrong result. No time is looked at."""

import json
import math

import pytest
import torch

from benchmarks import ceiling, decode, model, peers, prefill, timing
from benchmarks.calls import DecodeCall
from mla.ops import native
from tests.ops.cases import Case

pytestmark = pytest.mark.skipif(not native.instruction_sets(), reason="built without kernels")

DECODE = ["--dims", "88+32", "--heads", "3", "--batch", "2", "--context", "80", "--seconds", "0"]
PREFILL = ["--dims", "88+32", "--heads", "2", "--new", "7", "70", "9@80", "--seconds", "0"]
MODEL = ["--layers", "1", "--heads", "2", "--context", "40", "--steps", "2"]
FORMATS = ["--format", "bf16", "int8", "fp32"]


def run(main, arguments, capsys):
    main([*arguments, "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["machine"]["threads"] == torch.get_num_threads()
    assert found["machine"]["torch"] == torch.__version__
    return found


def test_ceiling(capsys):
    found = run(ceiling.main, ["--seconds", "0"], capsys)
    assert set(found["flops"]) == {
        f"{isa} {n}" for isa in native.instruction_sets() for n in ("half", "full")
    }
    assert all(each["best"] >= each["median"] > 1e6 for each in found["flops"].values())
    assert found["memory_bytes_per_s"]["best"] > 1e6


@pytest.mark.parametrize("isa", native.instruction_sets())
def test_decode(isa, capsys):
    found = run(decode.main, [*DECODE, *FORMATS, "--queries", "1", "3", "--isa", isa], capsys)
    assert found["isa"] == isa
    assert [(row["s"], row["format"]) for row in found["rows"]] == [
        (s, name) for s in (1, 3) for name in ("bf16", "int8", "fp32")
    ]
    for row in found["rows"]:
        assert row["operations"] == 2 * 2 * row["s"] * 3 * 80 * (2 * 88 + 32)
        assert row["cache_bytes"] == 2 * 80 * {"bf16": 240, "int8": 156, "fp32": 480}[row["format"]]
        assert row["best_s"] <= row["median_s"]
        assert row["best_flops"] == pytest.approx(row["operations"] / row["best_s"])
        assert row["best_share"] > 0
    assert len(found["int8_over_bf16"]) == 2


def test_decode_against_peers(capsys):
    found = run(
        decode.main, [*DECODE, "--queries", "1", "3", "--peers", "--vllm-library", "/nowhere"], capsys
    )
    for row in found["rows"]:
        torchs = {"matmul", "SDPA padded", "SDPA padded, heads as rows", "SDPA expanded"}
        assert set(row["peers"]) == {f"torch {each} {name}" for each in torchs for name in ("fp32", "bf16")}
        fastest = min(each["best_s"] for each in row["peers"].values())
        assert row["best_times_faster"] == pytest.approx(fastest / row["best_s"])
    assert set(found["speedups"]) == {"bf16", "int8", "all"}
    assert sum("does not exist" in note for note in found["notes"]) == 3  # two of vLLM, and SGLang


def test_decode_in_pages(capsys):
    found = run(decode.main, [*DECODE, *FORMATS, "--page", "16"], capsys)
    assert found["page"] == 16
    assert len(found["rows"]) == 3


def test_prefill_against_peers(capsys):
    found = run(prefill.main, [*PREFILL, *FORMATS, "--peers"], capsys)
    assert [(row["s"], row["t"]) for row in found["rows"][::3]] == [(7, 7), (70, 70), (9, 89)]
    for row in found["rows"]:
        assert row["operations"] == 2 * 2 * sum(
            (row["t"] - row["s"] + i + 1) * (64 + 32 + 64) for i in range(row["s"])
        ) + 2 * 2 * row["t"] * 88 * (64 + 64)
        assert len(row["peers"]) == 4
    assert not found["notes"]


@pytest.mark.parametrize(("main", "arguments"), [(decode.main, DECODE), (prefill.main, PREFILL)])
def test_tables(main, arguments, capsys):
    main([*arguments, "--peers"])
    out = capsys.readouterr().out
    assert "of ceiling" in out
    assert "times faster in the geometric mean" in out
    assert "GB/s" in out.splitlines()[-2]


def test_model(capsys):
    found = run(model.main, [*MODEL, "--cache-format", "int8", "--profile"], capsys)
    assert set(found["contexts"]) == {"40"}
    assert found["contexts"]["40"]["absorbed"]["bytes_per_token_and_layer"] == pytest.approx(644, rel=0.5)
    assert any(each["name"] == "mla::absorbed" for each in found["profile"]["operators"])
    model.main([*MODEL, "--profile"])
    assert "mla::absorbed" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", ["zero", "late", "nan", "lse"])
@pytest.mark.parametrize("name", ["decode", "prefill"])
def test_a_wrong_result_gives_no_figures(name, wrong, monkeypatch, capsys):
    attend = getattr(native, name)

    def garbage(*tensors, **options):
        out, lse = attend(*tensors, **options)
        if wrong == "zero":
            out = torch.zeros_like(out)
        elif wrong == "late":
            out[-1, -1, -1] *= 1.05  # hardly seen in the norm of all
        elif wrong == "nan":
            out[0, 0, 0, 0] = torch.nan
        else:
            lse[0, 0, 0] += 0.1
        return out, lse

    monkeypatch.setattr(native, name, garbage)
    main, arguments = (decode.main, DECODE) if name == "decode" else (prefill.main, PREFILL)
    with pytest.raises(SystemExit, match=r"wrong result.*no figures"):
        main(arguments)
    assert capsys.readouterr().out == ""


def test_a_wrong_model_gives_no_figures(monkeypatch, capsys):
    attend = native.prefill

    def garbage(*tensors, **options):
        out, lse = attend(*tensors, **options)
        return -out, lse

    monkeypatch.setattr(native, "prefill", garbage)
    with pytest.raises(SystemExit, match="no figures"):
        model.main(MODEL)
    assert capsys.readouterr().out == ""


def test_a_peer_that_fails_is_named():
    call = DecodeCall(Case(t=70, r=24, p=6))

    def broken():
        raise RuntimeError("out of luck\nsecond line")

    admission = peers.Peers()
    found = {
        "right": peers.Peer(lambda: call.want, call.want, 1e-3),
        "wrong": peers.Peer(lambda: call.want + 1, call.want, 1e-3),
        "nan": peers.Peer(lambda: call.want * math.nan, call.want, 1e-3),
        "broken": peers.Peer(broken, call.want, 1e-3),
        "absent": "not installed",
    }
    runs, slow, errors = admission.admit(found, "case", call.operations, ours=1.0)
    assert set(runs) == set(errors) == {"right"}
    assert not slow
    notes = " ".join(admission.notes)
    for words in ("wrong: wrong: relative error", "nan: wrong", "broken: raises RuntimeError: out of luck"):
        assert words in notes
    assert "absent: not installed" in notes
    # One that is far behind is timed once, and left out where it would take too long.
    runs, slow, _ = admission.admit({"slow": found["right"]}, "case", 1.0, ours=1e-12)
    assert set(slow) == {"slow"}
    assert not runs
    runs, slow, _ = admission.admit({"slow": found["right"]}, "large", 1e12, ours=1.0)
    assert not runs
    assert not slow


def test_turns_alternate():
    order = []
    runs = {name: lambda name=name: order.append(name) for name in "abc"}
    times = timing.take_turns(runs, 0.0, between=lambda: order.append("-"), least=4)
    turns = "".join(order).split("-")[1:]
    assert len(turns) == 4
    for turn in turns:
        assert turn == "".join(sorted(turn))
        assert set(turn) == set("abc")
    assert {len(each.seconds) for each in times.values()} == {4}


def test_the_grid():
    assert {size[:2] for size in decode.parse([]).sizes} == {("512+64", 16), ("512+64", 128), ("88+32", 9)}
    assert len(decode.parse(["--quick"]).sizes) == 4
    assert len(decode.parse(["--full"]).sizes) == 3 * 3 * 4 * 4
    assert decode.parse(["--batch", "3"]).sizes == [("512+64", h, 3, 4096, 1) for h in (16, 128)]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--context", "3", "--queries", "4"],
        ["--heads", "0"],
        ["--context", "100", "--page", "16"],
        ["--isa", "z80"],
    ],
)
def test_mistakes_end_with_one_line(arguments, capsys):
    with pytest.raises(SystemExit):
        decode.main(arguments)
    assert capsys.readouterr().out == ""
