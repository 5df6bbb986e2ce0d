"""What holds for every verb: the options as they stand, help, the version, encodings, an interruption."""

import importlib.metadata
import io
import re
import sys

import pytest
import typer

import mla.cli
from mla import __version__
from mla.ops import native

#: Scripts are written against these: whoever changes a name changes it here, and says so in the CHANGELOG.
OPTIONS = {
    "plan": "MODEL --context --batch --hardware --memory --cache-format --weight-format --tensor-parallel "
    "--query-tokens --rank --html --png --explain --json",
    "generate": "MODEL PROMPT --max-new-tokens --temperature --top-p --seed --raw --max-model-len --dtype "
    "--cache-format --device --load-cache --save-cache --json",
    "chat": "MODEL --system --max-new-tokens --temperature --top-p --seed --max-model-len --dtype "
    "--cache-format --device --load-cache --save-cache --json",
    "serve": "MODEL --engine --host --port --max-model-len --cache-format --memory --api-key --cache-dir "
    "--cache-dir-size --served-model-name --dtype VLLM_OPTIONS",
    "convert": "MODEL OUT --cache --rank --rope --calibration --heal --explore --max-kl --max-ppl-increase "
    "--windows --window --split-query --seed --dtype --device --overwrite --json",
    "eval": "MODEL --text --against --window --max-tokens --stock --dtype --cache-format --device --json",
    "doctor": "MODEL --tokens --dtype --device --json",
    "bench": "MODEL --context --tokens --stock --dtype --cache-format --device --json",
}


def test_the_options_of_every_verb():
    group = typer.main.get_command(mla.cli.app)
    found = {
        verb: " ".join(
            each.name.upper() if each.param_type_name == "argument" else each.opts[0]
            for each in command.params
        )
        for verb, command in group.commands.items()
    }
    assert found == OPTIONS


@pytest.mark.parametrize("verb", [(), *[(verb,) for verb in OPTIONS]])
def test_help(mla, verb):
    run = mla(*verb, "--help")
    assert run.status == 0
    plain = re.sub(r"\x1b\[[0-9;]*m", "", run.out)  # typer colours it wherever it takes itself for in CI
    assert f"Usage: {' '.join(('mla', *verb))} " in plain


def test_the_version_names_what_it_runs_with(mla):
    said = mla("--version").out
    assert said.startswith(f"mla {__version__}, Python 3.")
    assert f"torch {importlib.metadata.version('torch')}" in said
    assert f"kernels: {next(iter(native.instruction_sets()), 'none')}" in said


def test_an_interruption_is_one_line(mla, mla_folder, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("mla.cli.session.Session", interrupted)
    run = mla("generate", mla_folder, "Hello")
    assert (run.status, run.out, run.err) == (130, "", "mla: interrupted\n")


class Piped(io.TextIOWrapper):
    """A pipe as Python opens it in a locale that is not UTF-8."""

    def __init__(self, data=b"", **options):
        super().__init__(io.BytesIO(data), **options)


@pytest.mark.parametrize(
    "options", [{"encoding": "latin-1"}, {"encoding": "utf-8", "errors": "surrogateescape"}]
)
def test_pipes_hold_utf8_in_every_locale(mla, mla_folder, monkeypatch, options):
    out = Piped(**options)
    monkeypatch.setattr(sys, "stdin", Piped("schön 🙂".encode(), **options))
    monkeypatch.setattr(sys, "stdout", out)
    assert mla("generate", mla_folder, "-", "--raw", "--max-new-tokens", 4, "--json").status == 0
    out.flush()
    assert '"prompt_tokens": 11' in out.buffer.getvalue().decode("utf-8")  # bytes of it
    monkeypatch.setattr(sys, "stdin", Piped("schön".encode("latin-1"), **options))
    monkeypatch.setattr(sys, "stdout", Piped(**options))
    run = mla("generate", mla_folder, "-", "--raw")
    assert (run.status, run.err.startswith("mla: error: standard input is not readable as text")) == (2, True)
