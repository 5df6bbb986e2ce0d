"""Benchmarks beside programs in processes of their own: they answer, they end, they are wrong."""

import sys

import pytest

from benchmarks import llama_cpp
from benchmarks.contender import Contender

ECHO = """
import os, sys
out = os.fdopen(int(sys.argv[-1]), "w")
for line in sys.stdin:
    print(line, end="", file=out, flush=True)
"""

# What benchmarks/llama_worker.py does, without llama.cpp and with log-probabilities of its own.
STAND_IN = """
import json, os, pathlib, sys
if sys.argv[1] == "convert":
    pathlib.Path(sys.argv[sys.argv.index("--outfile") + 1]).write_text("gguf")
else:
    out = os.fdopen(int(sys.argv[-1]), "w")
    for line in sys.stdin:
        answer = {"prefill_s": 1.0, "decode_s": 0.1, "logprobs": {"3": -1.0}}
        print(json.dumps(answer), file=out, flush=True)
"""
LLAMA = ["--layers", "1", "--hidden", "64", "--context", "40", "--tokens", "2", "--turns", "1"]


def test_a_contender_answers_and_ends():
    contender = Contender("echo", [sys.executable, "-c", ECHO], {})
    assert contender.ask({"prompt": [1, 2]}) == {"prompt": [1, 2]}
    assert contender.ask({"prompt": []}) == {"prompt": []}
    contender.close()
    assert contender.process.returncode == 0


def test_a_contender_that_dies_is_named_with_its_last_words():
    contender = Contender("it", [sys.executable, "-c", "import sys; sys.exit('out of luck')"], {})
    with pytest.raises(SystemExit, match=r"^it ended:\nout of luck"):
        contender.ask({})
    contender.close()


def test_wrong_log_probabilities_give_no_figures(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(llama_cpp, "WORKER", tmp_path / "worker.py")
    llama_cpp.WORKER.write_text(STAND_IN)
    with pytest.raises(SystemExit, match="no figures"):
        llama_cpp.main([*LLAMA, "--python", sys.executable])
    assert capsys.readouterr().out == ""


def test_figures_beside_llama_cpp(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(llama_cpp, "WORKER", tmp_path / "worker.py")
    monkeypatch.setattr(llama_cpp, "difference", lambda theirs, mine: 0.01)
    llama_cpp.WORKER.write_text(STAND_IN)
    llama_cpp.main([*LLAMA, "--python", sys.executable])
    told = capsys.readouterr().out
    assert told.count("1.00 s") == told.count("100.00 ms") == 2
    assert "differ by at most 0.010" in told


def test_log_probabilities_that_mean_the_same():
    mine = {5: -1.1, 7: -2.05, 9: -3.0}
    theirs = {"5": -1.0, "7": -2.0}
    assert llama_cpp.difference(theirs, mine) == pytest.approx(0.1)
    for wrong in ({**theirs, "8": -2.0}, {"5": -1.5}):
        with pytest.raises(SystemExit, match="no figures"):
            llama_cpp.difference(wrong, mine)


def test_llama_cpp_that_is_not_there(capsys):
    with pytest.raises(SystemExit):
        llama_cpp.main(["--python", "/nowhere/python"])
    assert "make llama" in capsys.readouterr().err
