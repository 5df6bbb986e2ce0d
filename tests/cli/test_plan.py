"""``mla plan`` at the command line."""

import json
import subprocess
import sys

import pytest

from mla.plan import known_models


def says(run, *parts):
    assert run.status == 2, run
    lines = run.err.strip().splitlines()
    assert len(lines) == 1, run.err
    for part in ("mla: error: ", *parts):
        assert part in lines[0]


def test_the_table(mla):
    run = mla("plan", "deepseek-v3", "--context", 131072)
    assert run.status == 0
    for part in ("32,768", "576", "488 GiB", "8.58 GiB", "68.6 KiB", "memory", "do not fit", "MTP"):
        assert part in run.out


def test_json(mla):
    run = mla("plan", "deepseek-v2-lite", "--context", 4096, "--batch", 8, "--json")
    answer = json.loads(run.out)
    figure = answer["figures"]["sequence_bytes_mla"]
    assert figure["result"] == 27 * 1152 * 4096
    assert figure["unit"] == "B"
    assert figure["formula"].startswith("total(stores * kept * layer_bytes_mla)")
    assert figure["numbers"]["layer_bytes_mla"] == 1152
    assert answer["model"]["kind"] == "MLA"
    assert answer["question"]["batch"] == 8
    assert answer["figures"]["queries_crossing"]["result"] == pytest.approx(170.67 * 4096 / 4266.67, rel=1e-4)


def test_explain(mla):
    run = mla("plan", "deepseek-v3", "--context", 131072, "--explain")
    assert "attend_ops_mla = h * s * (2 * (2 * r + p) * attended + 2 * r * (n + v))" in run.out
    assert "h = 128, s = 1, r = 512, p = 64, attended = 131,072, n = 128, v = 128" in run.out
    assert "numbers_mha = kv_mha * (w + v)" in run.out
    assert "arXiv:2405.04434" in run.out


def test_a_model_without_latents(mla, llama_folder):
    run = mla("plan", llama_folder, "--context", 100)
    assert run.status == 0
    assert "Not an MLA model" in run.out
    assert "GQA (2 groups)" in run.out


def test_a_model_folder(mla, mla_folder):
    answer = json.loads(mla("plan", mla_folder, "--json").out)
    assert answer["figures"]["token_bytes_mla"]["result"] == 3 * (32 + 8) * 2


def test_a_model_that_does_not_say_how_long_it_goes(mla, tmp_path):
    config = dict(known_models()["llama-3.1-8b"]["config"])
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**config, "max_position_embeddings": 8192}))
    assert "made for 8,192 tokens, not for 9,000" in mla("plan", file, "--context", 9000).err
    del config["max_position_embeddings"]
    file.write_text(json.dumps(config))
    assert "made for" not in mla("plan", file, "--context", 9000).err
    answer = json.loads(mla("plan", file, "--json").out)
    assert (answer["model"]["max_context"], answer["question"]["context"]) == (None, 32768)


def test_files(mla, tmp_path):
    page, picture = tmp_path / "plan.html", tmp_path / "plan.png"
    assert mla("plan", "youtu", "--html", page).status == 0
    assert "<!doctype html>" in page.read_text(encoding="utf-8")
    assert mla("plan", "youtu", "--png", picture).status == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    for option, name in (("--html", "plan.html"), ("--png", "plan.png")):
        assert mla("plan", "youtu", option, tmp_path / "new" / name).status == 0
        says(mla("plan", "youtu", option, page / name), f"{name} cannot be written: ")


def test_png_without_matplotlib(mla, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    says(mla("plan", "youtu", "--png", tmp_path / "plan.png"), "pip install matplotlib")


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (("deepsek-v3",), ("unknown model 'deepsek-v3'", "deepseek-v3")),
        (("deepseek-v3", "--hardware", "h1000"), ("unknown hardware 'h1000'", "h100")),
        (("deepseek-v3", "--context", 0), ("--context: expected an integer of at least 1, got 0",)),
        (("deepseek-v3", "--batch", -1), ("--batch: expected an integer of at least 1",)),
        (("deepseek-v3", "--query-tokens", 5, "--context", 4), ("--query-tokens: expected at most",)),
        (("deepseek-v3", "--cache-format", "int3"), ("--cache-format: expected one of",)),
        (("deepseek-v3", "--weight-format", "int3"), ("--weight-format: expected one of",)),
        (("glm-4.7-flash", "--tensor-parallel", 8), ("20 heads cannot be split over 8 devices",)),
        (("deepseek-v3", "--memory", "lots"), ("--memory: expected something like 80GB",)),
        (("deepseek-v3", "--rank", 0), ("--rank: expected an integer of at least 1",)),
        (("./nothing",), ("unknown model './nothing'",)),
        (("~nosuchuser/model",), ("'~nosuchuser/model': ", "expected a folder, a file or a Hub id")),
        (("m" * 300,), ("File name too long", "expected a folder, a file or a Hub id")),
        (("deepseek-v3", "--context", "9" * 401), ("--context: expected an integer up to", "401 digits")),
    ],
)
def test_mistakes(mla, options, parts):
    says(mla("plan", *options), *parts)


def test_no_torch_is_imported():
    code = (
        "import sys\nfrom mla.cli import main\nsys.argv = ['mla', 'plan', 'deepseek-v3']\n"
        "try:\n    main()\nexcept SystemExit as end:\n"
        "    heavy = {'torch', 'transformers', 'numpy', 'matplotlib'} & set(sys.modules)\n"
        "    sys.exit(end.code or ', '.join(heavy) or 0)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
