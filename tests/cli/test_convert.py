"""``mla convert``: from a folder to a stock checkpoint that speaks, or one clear line, or nothing at all."""

import importlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, DeepseekV3ForCausalLM

from mla.convert import budget_for, exclusive
from mla.convert.memory import least_memory
from mla.errors import MLAError
from mla.integrations import loading

run_module = importlib.import_module("mla.convert.run")  # the package shows its function

SMALL = ("--windows", 2, "--window", 32)


def test_convert_then_speak(mla, llama_folder, tmp_path):
    out = tmp_path / "out"
    run = mla("convert", llama_folder, out, "--cache", 0.5, *SMALL)
    assert run.status == 0, run.err
    config = AutoModelForCausalLM.from_pretrained(out).config
    assert config.kv_lora_rank + config.qk_rope_head_dim == 2 * 2 * 8 * 0.5
    assert mla("doctor", out).status == 0
    answer = json.loads(mla("generate", out, "Hello", "--json", "--max-new-tokens", 4).out)
    assert answer["cache_bytes_per_token"] == 2 * 16 * 4
    report = json.loads((out / "report.json").read_text())
    assert report["cache_bytes_per_token"]["converted"] == answer["cache_bytes_per_token"]
    assert report["decoding"]["agreement"] > 0.9
    assert report["base_model"] is None
    assert (out / "README.md").is_file()


def test_the_command_of_the_card_makes_the_same(mla, llama_folder, tmp_path):
    model = shutil.copytree(llama_folder, tmp_path / "a model")
    (model / "README.md").write_text("---\nlanguage: en\nlicense: apache-2.0\n---\n\n# Tiny\nlicense: none\n")
    options = ("--rank", 8, "--heal", 0.01, "--dtype", "bfloat16", "--seed", 5)
    assert mla("convert", model, tmp_path / "out", *options, *SMALL).status == 0
    first = json.loads((tmp_path / "out" / "report.json").read_text())
    card = (tmp_path / "out" / "README.md").read_text()
    assert "\nlicense: apache-2.0\n" in card
    assert first["command"] in card
    _, verb, source, out, *rest = shlex.split(first["command"])
    assert (verb, source, out) == ("convert", str(model), "out")
    assert mla(verb, source, tmp_path / "again" / out, *rest).status == 0
    again = json.loads((tmp_path / "again" / "out" / "report.json").read_text())
    for name in ("command", "dims", "calibration", "dtype"):
        assert again[name] == first[name], name
    assert again["heal"]["minutes"] == first["heal"]["minutes"] == 0.01


def test_convert_json_and_rank(mla, llama_folder, tmp_path):
    run = mla("convert", llama_folder, tmp_path / "out", "--rank", 12, "--rope", 4, *SMALL, "--json")
    report = json.loads(run.out)
    assert (report["dims"]["rank"], report["dims"]["rope"]) == (12, 4)
    assert report["calibration"] == {"texts": ["self"], "windows": 2, "window": 32, "seed": 0}
    assert report == json.loads((tmp_path / "out" / "report.json").read_text())
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_convert_on_text_of_ones_own(mla, llama_folder, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 100)
    run = mla("convert", llama_folder, tmp_path / "out", "--calibration", text, *SMALL, "--json")
    assert json.loads(run.out)["calibration"]["texts"] == [str(text)]


def test_texts_share_the_windows(mla, llama_folder, tmp_path):
    from mla.convert import Request, workspace
    from mla.integrations.loading import load_model, load_tokenizer

    text = tmp_path / "text.txt"
    text.write_text("zzzz" * 500)
    texts = ("--calibration", text, "--calibration", "self")
    run = mla("convert", llama_folder, tmp_path / "out", *texts, *SMALL, "--json")
    report = json.loads(run.out)
    assert report["calibration"]["texts"] == [str(text), "self"]
    assert report["quality"]["text"] == f"the last part of {text} and written by the model itself"
    model, tokenizer = load_model(str(llama_folder), dtype="float32"), load_tokenizer(str(llama_folder))
    request = Request(calibration=(str(text), "self"), windows=5, window=32, heal=0.5)
    with workspace(model, tokenizer, tmp_path / "out", request, "converting") as work:
        parts = (work.calibration, work.held_out, work.training)
        read = [(ids[:, 1:] == ids[:, 1:2]).all(1).tolist() for ids in parts]  # nothing but z
    assert [sum(each) for each in read[:2]] == [2, 2]
    assert len(read[0]) == 5
    assert 2 * sum(read[2]) == len(read[2]) > 2 * 20  # the shorter text is repeated


def test_convert_heals(mla, llama_folder, tmp_path):
    run = mla("convert", llama_folder, tmp_path / "out", *SMALL, "--rank", 6, "--heal", 0.05, "--json")
    heal = json.loads(run.out)["heal"]
    assert heal["kl_after"] <= heal["kl_before"]
    assert heal["minutes"] == 0.05
    assert heal["chosen_on"] == "the windows that quality is measured on"
    assert DeepseekV3ForCausalLM.from_pretrained(tmp_path / "out").config.kv_lora_rank == 6


def test_explore_then_choose(mla, llama_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("mla.convert.explore.BUDGETS", (0.5, 0.25))
    page = tmp_path / "curve.html"
    run = mla("convert", llama_folder, page, "--explore", *SMALL, "--json")
    assert run.status == 0, run.err
    points = json.loads(run.out)["points"]
    assert "<svg" in page.read_text()
    assert list(tmp_path.iterdir()) == [page]
    allowed = max(point["kl"] for point in points)
    out = tmp_path / "out"
    run = mla("convert", llama_folder, out, "--max-kl", allowed, *SMALL, "--json")
    assert run.status == 0, run.err
    assert json.loads(run.out)["quality"]["kl"] <= allowed * 1.001
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curve.html", "out"]


def test_a_small_cache_is_calibrated_on_more_text_than_the_search(mla, llama_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("mla.convert.pipeline._TOKENS", ((1.0, 64), (0.9, 64), (0.0, 160)))
    real, read = run_module.convert, []
    monkeypatch.setattr(
        run_module, "convert", lambda *given, **more: read.append(more["calibration"]) or real(*given, **more)
    )
    run = mla("convert", llama_folder, tmp_path / "out", "--max-kl", 100, "--window", 32, "--json")
    assert run.status == 0, run.err
    report = json.loads(run.out)
    assert report["calibration"]["windows"] == len(read[0]) == 5
    promise = {"max_kl": 100.0, "max_ppl_increase": None, "kept": True}
    assert report["promise"] == promise | {"new_text": True, "seen_windows": 0}
    assert "kept on text that the search did not see" in (tmp_path / "out" / "report.html").read_text()
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_a_text_that_is_long_enough_for_the_search_is_enough(mla, llama_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("mla.convert.pipeline._TOKENS", ((1.0, 64), (0.9, 64), (0.0, 6400)))
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 60)
    options = ("--max-kl", 100, "--window", 32, "--calibration", text, "--json")
    run = mla("convert", llama_folder, tmp_path / "out", *options)
    assert run.status == 0, run.err
    assert "too short for 200 windows, which such a cache deserves: 2 do" in " ".join(run.err.split())
    assert json.loads(run.out)["calibration"]["windows"] == 2


def test_there_is_memory_for_the_search_but_not_for_more_text(mla, llama_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("mla.convert.pipeline._TOKENS", ((1.0, 64), (0.9, 64), (0.0, 64_000)))
    for module in ("mla.cli.convert", "mla.integrations.loading"):
        monkeypatch.setattr(f"{module}.free_memory", lambda: 2**20)
    run = mla("convert", llama_folder, tmp_path / "out", "--max-kl", 100, "--window", 32, "--json")
    assert run.status == 0, run.err
    said = " ".join(run.err.split())
    assert "there is too little memory for 2000 windows, which such a cache deserves: 2 do" in said
    assert json.loads(run.out)["calibration"]["windows"] == 2


def test_a_promise_that_the_result_does_not_keep_is_told(mla, llama_folder, tmp_path, monkeypatch):
    from mla.convert.promise import Promise

    real, quality = run_module._quality, []

    def worse(*given):
        quality.append(real(*given))
        return quality[0] | {"kl": 1000.0}

    monkeypatch.setattr(run_module, "_quality", worse)
    run = mla("convert", llama_folder, tmp_path / "out", "--max-kl", 100, *SMALL, "--json")
    assert run.status == 0, run.err
    said = " ".join(run.err.split())
    assert f"The search kept {Promise(100.0)}, the result does not on its held-out text: KL 1000" in said
    assert json.loads(run.out)["promise"]["kept"] is False
    assert "not kept on text that the search has seen" in (tmp_path / "out" / "report.html").read_text()


def test_convert_writes_bfloat16(mla, llama_folder, tmp_path):
    assert mla("convert", llama_folder, tmp_path / "out", "--dtype", "bfloat16", *SMALL).status == 0
    model = DeepseekV3ForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert str(model.dtype) == "torch.bfloat16"


def test_one_conversion_at_a_time_to_one_place(mla, llama_folder, tmp_path, monkeypatch):
    home = tmp_path / "home"
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("USERPROFILE", str(home))
    (tmp_path / "temporary").mkdir()
    with exclusive(tmp_path / "out"):
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))  # another session's
        run = mla("convert", llama_folder, tmp_path / "there" / ".." / "out", *SMALL)
        assert run.status == 2
        assert "is running: wait for it, or end it first" in run.err
        assert mla("convert", llama_folder, tmp_path / "other", *SMALL).status == 0
    assert [path.name for path in home.rglob("*")] == [".cache", "mla", "locks"]
    assert mla("convert", llama_folder, tmp_path / "out", *SMALL).status == 0


def test_a_home_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "home").write_text("")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with exclusive(tmp_path / "out"):
        assert list(tmp_path.glob("mla-*.lock"))
        with pytest.raises(MLAError, match="another conversion"), exclusive(tmp_path / "out"):
            pytest.fail("two at a time")
    assert not list(tmp_path.glob("mla-*.lock"))


def test_the_largest_seed(mla, llama_folder, tmp_path):
    options = ("--seed", 2**32 - 1, "--heal", 0.05)
    run = mla("convert", llama_folder, tmp_path / "out", *SMALL, *options, "--json")
    assert run.status == 0, run.err
    assert json.loads(run.out)["heal"]["tokens"] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--dtype", "float16"), "float16 cannot hold a converted model"),
        (("--dtype", "int4"), "--dtype: expected one of float32, bfloat16, got int4"),
        (("--cache", 1.5), "cache is a fraction"),
        (("--rope", 3), "rope must be even"),
        (("--calibration", "none.txt"), "none.txt: no such text file"),
        (
            ("--calibration", "{short}"),
            "(10 characters), its calibrating part, is too short: 3 characters hold 0 of 2 windows of 32",
        ),
        (("--window", 513), "window: expected 2 to 512 tokens, which is what the model takes, got 513"),
        (
            ("--calibration", os.devnull),
            "is no regular file, and will be read again: write the text to a file",
        ),
        (("--windows", 0), "at least 1 window"),
        (("--windows", 1), "windows takes 2 or more, got 1"),
        (
            ("--calibration", "self", "--calibration", "{short}", "--calibration", "more.txt"),
            "2 windows cannot be shared by 3 texts",
        ),
        (("--calibration", "self", "--calibration", "self"), "a calibration text is given twice"),
        (("--heal", "inf"), "heal takes minutes"),
        (("--device", "mps"), "--device mps: the conversion needs float64"),
        (("--device", "vulcan"), "--device vulcan: this torch cannot use it here"),
        (("--heal", -1), "heal takes minutes, 0 or more, got -1"),
        (("--seed", 2**43, "--heal", 1), "seed takes an integer from 0 to 4294967295, got 8796093022208"),
        (("--seed", -1), "seed takes an integer"),
        (("--explore", "--cache", 0.5), "choose the cache: leave out --cache"),
        (("--explore", "--heal", 1), "--explore compares untrained conversions"),
        (("--explore", "--dtype", "bfloat16"), "--explore writes no model: leave out --dtype, --split-query"),
        (("--explore", "--split-query"), "--explore writes no model"),
        (("--max-kl", 0), "the largest KL must be above 0"),
        (("--max-kl", 1, "--heal", -1), "heal takes minutes"),
    ],
)
def test_mistakes_leave_nothing(mla, llama_folder, tmp_path, tmp_path_factory, options, message):
    short = tmp_path_factory.mktemp("text") / "short.txt"
    short.write_text("Too short.")
    options = [str(option).format(short=short) for option in options]
    run = mla("convert", llama_folder, tmp_path / "out", *SMALL, *options)
    assert run.status == 2
    assert message in " ".join(run.err.split())
    assert len(run.err.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_broken_promise_keeps_what_was_measured(mla, llama_folder, tmp_path):
    out = tmp_path / "out"
    run = mla("convert", llama_folder, out, "--max-kl", 1e-9, *SMALL)
    assert run.status == 2
    assert "no cache below the original's" in run.err
    (kept,) = tmp_path.iterdir()
    assert f"What was measured stays in {kept} for another promise" in " ".join(run.err.split())
    run = mla("convert", llama_folder, out, "--max-kl", 100, *SMALL)
    assert run.status == 0, run.err
    assert list(tmp_path.iterdir()) == [out]


def test_earlier_work_of_another_request_is_named(mla, llama_folder, tmp_path):
    out = tmp_path / "out"
    assert mla("convert", llama_folder, out, "--max-kl", 1e-9, *SMALL).status == 2
    run = mla("convert", llama_folder, out, "--max-kl", 100, *SMALL, "--windows", 3)
    assert run.status == 0, run.err
    told = "these parts begin anew: text, search. They were made with another windows"
    assert told in " ".join(run.err.split())


def test_a_page_that_exists_is_kept(mla, llama_folder, tmp_path):
    page = tmp_path / "notes.txt"
    page.write_text("mine")
    run = mla("convert", llama_folder, page, "--explore", *SMALL)
    assert run.status == 2
    assert "notes.txt exists; choose another file or use --overwrite" in " ".join(run.err.split())
    assert page.read_text() == "mine"


def test_the_original_is_safe(mla, llama_folder, tmp_path):
    """OUT that is the model, holds it or lies in it: refused before anything is read or removed."""
    model = shutil.copytree(llama_folder, tmp_path / "models" / "llama")
    files = sorted(tmp_path.rglob("*"))
    (tmp_path / "link").symlink_to(model)
    for out in (model, tmp_path / "models", model / "out", tmp_path / "link" / "out"):
        for explore in ((), ("--explore",)):
            run = mla("convert", model, out, "--overwrite", *explore, *SMALL)
            assert run.status == 2
            assert "lie one in the other" in " ".join(run.err.split())
    (tmp_path / "link").unlink()
    assert sorted(tmp_path.rglob("*")) == files


@pytest.mark.parametrize("options", [(), ("--explore",)])
def test_a_file_on_the_way_to_out(mla, llama_folder, tmp_path, options, monkeypatch):
    monkeypatch.setattr("mla.integrations.loading.load_model", lambda *_, **__: pytest.fail("work was done"))
    (tmp_path / "file").write_text("mine")
    run = mla("convert", llama_folder, tmp_path / "file" / "out", *options, *SMALL)
    assert run.status == 2
    assert "cannot be written" in " ".join(run.err.split())


@pytest.mark.parametrize(
    ("options", "written", "kept"),
    [
        ((), 2, ".out.converting"),
        (("--max-kl", 100), 3, ".out.exploring"),
        (("--explore",), 3, ".out.exploring"),
    ],
)
def test_a_full_disk(mla, llama_folder, tmp_path, monkeypatch, options, written, kept):
    """One line, and the same command goes on."""
    parts = []

    def fills(tensors, path):
        if len(parts) == written:
            raise SafetensorError("I/O error: No space left on device (os error 28)")
        parts.append(path)
        save_file(tensors, path)

    with monkeypatch.context() as full:
        full.setattr("mla.convert.parts.save_file", fills)
        run = mla("convert", llama_folder, tmp_path / "out", *options, *SMALL)
    assert run.status == 2
    (said,) = run.err.strip().splitlines()
    assert said.startswith("mla: error: ")
    assert "No space left on device (os error 28). There must be room for it" in said
    assert said.endswith(
        f"What is finished is kept in {tmp_path / kept}: the same command goes on from there"
    )
    run = mla("convert", llama_folder, tmp_path / "out", *options, *SMALL)
    assert run.status == 0, run.err
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_more_than_there_is_memory(mla, llama_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "load_model", lambda *_, **__: pytest.fail("the weights were read"))
    monkeypatch.setattr(loading, "free_memory", lambda: 2**20)
    run = mla("convert", llama_folder, tmp_path / "out", "--windows", 200, "--window", 512)
    assert run.status == 2
    said = " ".join(run.err.split())
    assert "both models in float32 and 200 windows of 512 tokens, would need 0.05 GiB of memory" in said
    assert list(tmp_path.iterdir()) == []


def test_a_promise_may_take_all_of_the_cache(mla, llama_folder, tmp_path, monkeypatch):
    """What it may take there is known to be too much before the weights are read."""
    config = loading.load_config(str(llama_folder))
    half, full = (
        least_memory(
            config,
            budget_for(config, cache=cache, rank=None, rope=None),
            windows=2,
            window=32,
            split_query=False,
            heal=False,
        )
        for cache in (0.5, 1.0)
    )
    monkeypatch.setattr(loading, "load_model", lambda *_, **__: pytest.fail("the weights were read"))
    monkeypatch.setattr(loading, "free_memory", lambda: (half + full) // 2)
    run = mla("convert", llama_folder, tmp_path / "out", "--max-kl", 100, *SMALL)
    assert run.status == 2
    assert "both models in float32 and 2 windows of 32 tokens, would need" in " ".join(run.err.split())


def test_what_cannot_be_converted(mla, mla_folder, llama_folder, tmp_path):
    run = mla("convert", mla_folder, tmp_path / "out")
    assert run.status == 2
    assert "already has Multi-head Latent Attention" in run.err
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    run = mla("convert", llama_folder, tmp_path / "full", *SMALL)
    assert run.status == 2
    assert "is not empty" in run.err
    assert (tmp_path / "full" / "notes.txt").read_text() == "mine"


def test_killed_at_any_moment(llama_folder, tmp_path):
    """Whole, or not there; and the same command then writes what a run without a kill writes."""
    command = [sys.executable, "-m", "mla", "convert", str(llama_folder)]
    options = [str(option) for option in (*SMALL, "--seed", 3)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, str(tmp_path / "whole"), *options], check=True, env=environment)
    wanted = load_file(tmp_path / "whole" / "model.safetensors")
    out, work = tmp_path / "out", tmp_path / ".out.converting"
    for file in ("request.json", "windows.safetensors", "layer-000.safetensors", "layer-001.safetensors"):
        process = subprocess.Popen([*command, str(out), *options], env=environment, stderr=subprocess.DEVNULL)
        while not (work / file).exists():
            assert process.poll() is None, f"it ended before {file} was seen"
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
        if out.exists():
            AutoModelForCausalLM.from_pretrained(out)
            shutil.rmtree(out)
        subprocess.run([*command, str(out), *options], check=True, env=environment)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]
        found = load_file(out / "model.safetensors")
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            assert torch.equal(found[name], value), name
        shutil.rmtree(out)
