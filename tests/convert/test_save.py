"""A folder is whole or not there."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import signal
import time
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, DeepseekV3ForCausalLM, PreTrainedTokenizerFast

import mla
from mla.convert import check_output, convert, save, saving
from mla.errors import MLAError

from .tiny import VOCABULARY, teacher, tokens

FACTS = {"source": "tiny"}


@pytest.fixture(scope="module")
def student() -> DeepseekV3ForCausalLM:
    return convert(teacher(), cache=0.5, calibration=tokens(1, 16))


def _tokenizer() -> PreTrainedTokenizerFast:
    words = {f"w{index}": index for index in range(VOCABULARY)}
    inner = Tokenizer(models.WordLevel(words, unk_token="w0"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="w0", eos_token="w2")
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    return tokenizer


def test_everything_is_in_the_folder(student: DeepseekV3ForCausalLM, tmp_path: Path) -> None:
    out = save(student, _tokenizer(), tmp_path / "deep" / "out", report={**FACTS, "seed": 3})
    facts = json.loads((out / "report.json").read_text())
    assert facts["seed"] == 3
    assert facts["dims"]["rank"] == student.config.kv_lora_rank
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["versions"]["mla"] == mla.__version__
    assert "float16" in (out / "README.md").read_text()
    assert "tiny" in (out / "report.html").read_text()
    assert AutoTokenizer.from_pretrained(out).chat_template == _tokenizer().chat_template
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert len({path.stat().st_mode for path in out.iterdir()}) == 1, "one file is more private than the rest"


def test_fp16_is_refused_with_the_reason(student: DeepseekV3ForCausalLM, tmp_path: Path) -> None:
    with pytest.raises(MLAError, match=r"2\^-30.*bfloat16"):
        save(student, None, tmp_path / "out", report=FACTS, dtype=torch.float16)
    with pytest.raises(MLAError, match="float64"):
        save(student, None, tmp_path / "out", report=FACTS, dtype=torch.float64)
    assert not list(tmp_path.iterdir())


def test_a_full_folder_is_refused_unless_asked(student: DeepseekV3ForCausalLM, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    save(student, None, out, report=FACTS)  # an empty folder is fine
    with pytest.raises(MLAError, match="not empty"):
        save(student, None, out, report=FACTS)
    (out / "old").write_text("old")
    save(student, None, out, report=FACTS, overwrite=True)
    assert not (out / "old").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    (tmp_path / "file").write_text("")
    with pytest.raises(MLAError, match="not a folder"):
        save(student, None, tmp_path / "file", report=FACTS, overwrite=True)


def test_a_place_that_cannot_be_written_is_refused(
    student: DeepseekV3ForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file" / "out", tmp_path / "file" / "deep" / "out"):
        with pytest.raises(
            MLAError, match=f"cannot be written: {re.escape(str(tmp_path / 'file'))} is no folder"
        ):
            save(student, None, out, report=FACTS)
    (tmp_path / "file").unlink()
    monkeypatch.setattr(os, "access", lambda path, _: Path(path) != tmp_path)  # root may write anywhere
    with pytest.raises(MLAError, match=f"cannot be written: {re.escape(str(tmp_path))} is no folder"):
        save(student, None, tmp_path / "deep" / "out", report=FACTS)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_exception_leaves_nothing(
    student: DeepseekV3ForCausalLM,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: type[BaseException],
) -> None:
    def fail(*_: object) -> None:
        raise error

    keep = tmp_path / "keep"
    save(student, None, keep, report={**FACTS, "seed": 1})
    monkeypatch.setattr(saving, "flush", fail)
    expected = MLAError if error is OSError else error
    with pytest.raises(expected):
        save(student, None, tmp_path / "out", report=FACTS)
    with pytest.raises(expected):
        save(student, None, keep, report={**FACTS, "seed": 2}, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["keep"]
    assert json.loads((keep / "report.json").read_text())["seed"] == 1


def test_a_disk_that_is_full_of_weights_has_no_room_for_the_tokenizer(
    student: DeepseekV3ForCausalLM, tmp_path: Path
) -> None:
    class Tokenizer:
        error: Exception = Exception("No space left on device (os error 28)")

        def save_pretrained(self, folder: Path) -> None:
            raise self.error

    with pytest.raises(MLAError, match="out cannot be written: No space left on device"):
        save(student, Tokenizer(), tmp_path / "out", report=FACTS)  # type: ignore[arg-type]
    Tokenizer.error = ZeroDivisionError("a defect")
    with pytest.raises(ZeroDivisionError):
        save(student, Tokenizer(), tmp_path / "out", report=FACTS)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_a_failed_rename_brings_the_old_folder_back(
    student: DeepseekV3ForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    save(student, None, out, report={**FACTS, "seed": 1})
    rename = os.rename

    def fail(source: Path, target: Path) -> None:
        if source.name == ".out.partial":
            raise OSError("disk")
        rename(source, target)

    monkeypatch.setattr(saving.os, "rename", fail)
    with pytest.raises(MLAError, match="out cannot be written: disk"):
        save(student, None, out, report={**FACTS, "seed": 2}, overwrite=True)
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert json.loads((out / "report.json").read_text())["seed"] == 1


@pytest.mark.parametrize("full", [False, True])
def test_a_mount_point_is_refused_before_any_work(
    full: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    if full:
        (out / "old").write_text("old")
    number = errno.EBUSY

    def refused(*_: Path) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(saving.os, "rename", refused)
    with pytest.raises(MLAError, match=r"out is a mount point, .*: name a folder inside it"):
        check_output(out, dtype=torch.float32, overwrite=True)
    number = errno.EXDEV  # a container's folder that its image has: it may be removed, but not renamed
    with pytest.raises(MLAError, match="out cannot be written: ") if full else contextlib.nullcontext():
        check_output(out, dtype=torch.float32, overwrite=True)
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "old"][: 1 + full]


def test_the_current_folder_and_what_holds_it_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "here").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "in" / "here")
    for out in (".", "..", "../../link", tmp_path / "in" / "here", "/"):
        with pytest.raises(MLAError, match=r"is the current folder, or holds it, .*: choose another folder"):
            check_output(out, dtype=torch.float32, overwrite=True)
    check_output("out", dtype=torch.float32, overwrite=False)
    check_output("../beside", dtype=torch.float32, overwrite=False)


def test_what_was_left_of_a_file_of_that_name(student: DeepseekV3ForCausalLM, tmp_path: Path) -> None:
    (tmp_path / ".out.partial").write_text("half a page")
    save(student, None, tmp_path / "out", report=FACTS)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_drive_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """On Windows nothing on the way up from Z: exists, and it has no parent."""
    monkeypatch.setattr(os.path, "lexists", lambda _: False)
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(MLAError, match="cannot be written"):
        saving.check_place(Path("/nowhere/out"), None)


def _killed(
    student: DeepseekV3ForCausalLM,
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
    owner: object,
    point: str,
    *,
    at: Path | None = None,
) -> None:
    """Another process replaces ``out`` and dies where it calls this function, for a path if one is given."""
    reader, writer = os.pipe()
    real = getattr(owner, point)

    def stop(*given: object, **options: object) -> object:
        if at is not None and given[0] != at:
            return real(*given, **options)
        os.write(writer, b"here")
        time.sleep(60)
        return None

    with monkeypatch.context() as patch:
        patch.setattr(owner, point, stop)
        child = os.fork()
        if child == 0:
            try:
                save(student, None, out, report={**FACTS, "seed": 2}, overwrite=True)
            finally:
                os._exit(1)
    os.close(writer)  # a child that dies before it gets there ends the wait
    told = os.read(reader, 4)
    os.close(reader)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert told == b"here"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
@pytest.mark.parametrize("point", ["save_torch_state_dict", "flush", "_put_in_place"])
def test_a_killed_process_leaves_nothing_that_looks_whole(
    student: DeepseekV3ForCausalLM, point: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    _killed(student, out, monkeypatch, saving, point)
    (left,) = tmp_path.iterdir()
    assert left.name == ".out.partial"
    if point != "_put_in_place":  # the last step but the rename: all is flushed by then
        assert not (left / "config.json").exists()
        with pytest.raises((OSError, ValueError)):
            AutoModelForCausalLM.from_pretrained(left)
    check_output(out, dtype=torch.float32, overwrite=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
@pytest.mark.parametrize("in_place", [False, True])
def test_a_process_killed_while_it_replaces_loses_no_folder(
    student: DeepseekV3ForCausalLM, in_place: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    save(student, None, out, report={**FACTS, "seed": 1})
    if in_place:
        _killed(student, out, monkeypatch, saving, "flush", at=tmp_path)
    else:
        _killed(student, out, monkeypatch, saving.os, "rename", at=tmp_path / ".out.partial")
    assert out.exists() == in_place
    # Whoever looks whether the name is free finds the folder that was there, or the new one.
    with pytest.raises(MLAError, match="not empty"):
        check_output(out, dtype=torch.float32, overwrite=False)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert json.loads((out / "report.json").read_text())["seed"] == 1 + in_place
    AutoModelForCausalLM.from_pretrained(out)
