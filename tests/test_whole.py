"""Files that are whole or not there."""

import errno
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from mla import whole as module
from mla.errors import MLAError
from mla.whole import UnwrittenError, remove_abandoned, whole


@pytest.mark.parametrize("before", [None, "old"])
def test_a_file_appears_when_it_is_finished(tmp_path, before):
    path = tmp_path / "page.html"
    if before is not None:
        path.write_text(before)
    with whole(path) as partial:
        partial.write_text("new")
        assert partial.parent.parent == tmp_path
        assert (path.read_text() if path.exists() else None) == before
    assert [file.name for file in tmp_path.iterdir()] == ["page.html"]
    assert path.read_text() == "new"


def test_the_disk_has_the_content_before_the_name(tmp_path, monkeypatch):
    done, fsync, replace = [], os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda handle: done.append("content") or fsync(handle))
    monkeypatch.setattr(Path, "replace", lambda *paths: done.append("name") or replace(*paths))
    with whole(tmp_path / "page.html") as partial:
        partial.write_text("new")
    assert done == ["content", "name", "content"]  # the last is the folder's


def _end(path: Path, error: BaseException, *others: type[Exception]) -> None:
    with whole(path, *others) as partial:
        partial.write_text("ha")
        raise error


@pytest.mark.parametrize(
    ("error", "told", "words"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), MLAError, "cannot be written: No space left"),
        (ZeroDivisionError("a defect"), ZeroDivisionError, "a defect"),
        (KeyboardInterrupt(), KeyboardInterrupt, None),
    ],
    ids=["full-disk", "defect", "ctrl-c"],
)
def test_what_ends_early_leaves_everything_as_it_was(tmp_path, error, told, words):
    path = tmp_path / "page.html"
    path.write_text("old")
    with pytest.raises(told, match=words):
        _end(path, error)
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("page.html", "old")]


def test_folders_on_the_way_are_made(tmp_path):
    path = tmp_path / "deep" / "er" / "page.html"
    with whole(path) as partial:
        partial.write_text("new")
    assert path.read_text() == "new"


def test_what_killed_processes_left_goes(tmp_path):
    old, new, growing = (f".mla-writing-{each * 16}" for each in "abc")
    mine = {".mla-models", ".mla-writing-about-mla"}  # a person's
    for name, age, of_file in (
        (old, 4000, 4000),
        (new, 10, 10),
        (growing, 4000, 10),
        *((name, 4000, 4000) for name in mine),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / ".tmp6ft04y").write_text("half")
        os.utime(tmp_path / name / ".tmp6ft04y", (time.time() - of_file,) * 2)
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    with whole(tmp_path / "page.html") as partial:
        partial.write_text("new")
    assert {file.name for file in tmp_path.iterdir()} == {"page.html", new, growing} | mine
    remove_abandoned(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"page.html"} | mine


def test_a_folder_that_cannot_be_flushed_has_the_file(tmp_path, monkeypatch):
    def fail(path):
        if path.is_dir():
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(module, "flush", fail)
    with whole(tmp_path / "page.html") as partial:
        partial.write_text("new")
    assert (tmp_path / "page.html").read_text() == "new"


def test_what_a_writer_raises_instead(tmp_path):
    with pytest.raises(UnwrittenError, match="x cannot be written: unexpected pos"):
        _end(tmp_path / "x", RuntimeError("unexpected pos"), RuntimeError)
    with pytest.raises(RuntimeError, match="a defect"):
        _end(tmp_path / "x", RuntimeError("a defect"))
    assert list(tmp_path.iterdir()) == []


def test_the_longest_name_is_no_problem(tmp_path):
    path = tmp_path / ("ä" * 127)
    with whole(path) as partial:
        partial.write_text("new")
    assert path.read_text() == "new"


@pytest.mark.parametrize("name", ["file/page.html", "", "folder", "n" * 300])
def test_places_that_cannot_be_written(tmp_path, name):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(MLAError, match="cannot be written: "), whole(tmp_path / name) as partial:
        partial.write_text("new")
    assert {file.name for file in tmp_path.iterdir()} == {"folder", "file"}


def test_the_present_folder_is_no_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in (".", "", ".."):
        with pytest.raises(MLAError, match="expected a file, got a folder"), whole(Path(name)):
            pass


def test_links_stay_links(tmp_path):
    path, link = tmp_path / "page.html", tmp_path / "link.html"
    link.symlink_to(path)
    with whole(link) as partial:
        partial.write_text("new")
    assert link.is_symlink()
    assert path.read_text() == "new"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_pipes_are_written_to(tmp_path):
    pipe, got = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: got.append(pipe.read_text()), daemon=True)
    reader.start()
    with whole(pipe) as partial:
        partial.write_text("new")
    reader.join(10)
    assert got == ["new"]
    assert pipe.is_fifo()


@pytest.mark.skipif(not Path("/dev/stdout").exists(), reason="needs /dev")
def test_standard_output_is_written_to():
    lines = ("from pathlib import Path", "from mla.whole import whole")
    program = "\n".join([*lines, "with whole(Path('/dev/stdout')) as partial: partial.write_text('new')"])
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("new", "")


def test_a_file_that_is_mounted_alone_is_written_in_place(tmp_path, monkeypatch):
    path = tmp_path / "page.html"
    path.write_text("the old one, which is longer")
    inode = path.stat().st_ino

    def busy(self, target):
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))

    monkeypatch.setattr(Path, "replace", busy)
    with whole(path) as partial:
        partial.write_text("new")
    assert (path.read_text(), path.stat().st_ino) == ("new", inode)
    assert [file.name for file in tmp_path.iterdir()] == ["page.html"]
