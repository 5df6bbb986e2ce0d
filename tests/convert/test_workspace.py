"""What a run keeps beside its result: the windows, what is finished, and for how long."""

from __future__ import annotations

import contextlib
import importlib
import itertools
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import DeepseekV3ForCausalLM

from mla.convert import Request, convert, run, workspace
from mla.convert.evaluation import evaluate
from mla.convert.text import cut_text, tokenize_windows
from mla.errors import MLAError
from tests.convert.tiny import Letters, teacher, tokens

# The package shows the functions of these names.
RUN, WORKSPACE = (importlib.import_module(f"mla.convert.{name}") for name in ("run", "workspace"))


def test_a_limit_counts_tokens_however_long_they_are() -> None:
    class Words(Letters):
        def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
            return {"input_ids": [1, *(len(word) for word in text.split())] if text else [1]}

    text = ("pneumonoultramicroscopic" + " ") * 1000
    assert cut_text(text, Words(), 8, limit=70).shape == (10, 8)
    assert cut_text(text, Words(), 8).shape == (142, 8)


@pytest.mark.parametrize(("bos", "fresh"), [(None, 8), (1, 7)])
def test_all_of_a_text_in_windows_that_begin_as_in_use(bos: int | None, fresh: int) -> None:
    text = "abcdefghijklmnopqrstuvwxyz"
    windows = cut_text(text, Letters(bos), 8, limit=100)
    assert windows.shape == (26 // fresh, 8)
    assert windows.dtype == torch.int64
    assert windows[:, -fresh:].flatten().tolist() == [3 + ord(letter) % 90 for letter in text][: 3 * fresh]
    assert torch.equal(windows, cut_text(text, Letters(bos), 8))
    assert cut_text("abc", Letters(bos), 8).shape == (0, 8)
    if bos is not None:
        assert (windows[:, 0] == bos).all()
        assert (tokenize_windows(text * 40, Letters(bos), 3, 8)[:, 0] == bos).all()


def test_training_windows_begin_as_in_use(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 100)
    request = Request(calibration=(str(text),), windows=2, window=32, heal=1.0)
    with workspace(teacher(), Letters(), tmp_path / "out", request, "converting") as work:
        assert len(work.training) > len(work.calibration) == 2
        for ids in (work.calibration, work.training, work.held_out):
            assert (ids[:, 0] == 1).all()


def test_healing_reads_no_more_of_a_file_than_it_has_time_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    longest = []

    class Counting(Letters):
        def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
            longest.append(len(text))
            return super().__call__(text, **options)

    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 2000)

    def training() -> torch.Tensor:
        longest.clear()
        request = Request(calibration=(str(text),), windows=2, window=32, heal=0.5)
        with workspace(teacher(), Counting(), tmp_path / "out", request, "converting") as work:
            return work.training

    everything = training()
    assert max(longest) == 30_000  # two of six parts
    monkeypatch.setattr(WORKSPACE, "_READ", 400)
    monkeypatch.setattr(WORKSPACE, "_READ_PER_MINUTE", 1200)
    some = training()
    assert max(longest) == 16 * 1000
    assert len(some) == 1000 // 31
    assert {tuple(row) for row in some.tolist()} <= {tuple(row) for row in everything.tolist()}


def test_what_is_wrong_with_a_file_is_known_before_the_model_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(WORKSPACE, "write_windows", lambda *_, **__: pytest.fail("the model wrote"))
    short = tmp_path / "short.txt"
    short.write_text("Too short.")
    request = Request(calibration=("self", str(short)), windows=4, window=32)
    with (
        pytest.raises(MLAError, match="too short"),
        workspace(teacher(), Letters(), tmp_path / "out", request, "converting"),
    ):
        pass
    assert list(tmp_path.iterdir()) == [short]


@pytest.mark.parametrize(("start", "end", "heal"), [(700, 2000, 0.0), (240, 320, 1.0)])
def test_tokens_that_the_model_does_not_know(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: int, end: int, heal: float
) -> None:
    """In the part that only measures, or that only healing reads: known before the conversion begins."""
    monkeypatch.setattr(RUN, "convert", lambda *_, **__: pytest.fail("the conversion began"))
    text = tmp_path / "text.txt"
    text.write_text("a" * start + "Y" * (end - start) + "a" * (2000 - end))  # tokens 10 and 92
    request = Request(cache=0.5, calibration=(str(text),), windows=2, window=16, heal=heal, seed=1)
    with pytest.raises(MLAError, match=r"token ids from 1 to 92, outside the model's vocabulary of 90"):
        run("tiny", teacher(vocab_size=90), Letters(), tmp_path / "out", request)
    assert list(tmp_path.iterdir()) == [text]


def test_windows_longer_than_the_model_reads_are_refused(tmp_path: Path) -> None:
    request = Request(cache=0.5, windows=2, window=257)
    with pytest.raises(MLAError, match="window: expected 2 to 256"):
        run("tiny", teacher(), Letters(), tmp_path / "out", request)
    assert list(tmp_path.iterdir()) == []


def test_the_windows_of_a_search_are_those_of_its_conversion(tmp_path: Path) -> None:
    model, out = teacher(), tmp_path / "out"
    search, request = (Request(windows=3, window=16, heal=minutes) for minutes in (0.0, 1.0))
    with workspace(model, Letters(), out, search, "exploring") as found:
        with workspace(model, Letters(), out, request, "converting", search=found) as work:
            assert (found.seen, work.seen) == (0, len(work.held_out))
            assert torch.equal(work.calibration, found.calibration)
            assert torch.equal(work.held_out, found.held_out)
            assert len(work.training) == 3 + 1536 // 16
            # Nothing that measures is learnt from.
            measuring = {tuple(row) for row in work.held_out.tolist()}
            assert not measuring & {tuple(row) for row in work.training.tolist()}
        # Without the search the same windows come out again.
        with workspace(model, Letters(), out, request, "converting") as again:
            assert torch.equal(again.calibration, found.calibration)
            assert torch.equal(again.training, work.training)
    assert list(tmp_path.iterdir()) == []


def test_a_failure_at_the_very_end_costs_no_healing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter(range(10**6))
    clock = SimpleNamespace(monotonic=lambda: 0.05 * next(ticks))
    monkeypatch.setattr("mla.convert.healing.time", clock)
    model, out = teacher(), tmp_path / "out"
    request = Request(cache=0.5, windows=3, window=16, heal=0.1)
    progress: list[str] = []
    lost: list[dict[str, Any]] = []

    def convert() -> dict[str, Any]:
        progress.clear()
        return run(
            "tiny", model, Letters(), out, request, on_progress=lambda stage, *_: progress.append(stage)
        )

    with monkeypatch.context() as full_disk:
        save = RUN.save

        def told(*given: Any, report: dict[str, Any], **more: Any) -> None:
            lost.append(report)
            save(*given, report=report, **more)

        def fails(*_: Any, **__: Any) -> None:
            raise OSError(28, "No space left on device")

        full_disk.setattr(RUN, "save", told)
        full_disk.setattr("mla.convert.saving.save_torch_state_dict", fails)
        with pytest.raises(MLAError, match=r"out cannot be written: No space.* the same command goes on"):
            convert()
    assert "healing" in progress
    facts = convert()
    assert "healing" not in progress
    assert facts["heal"]["tokens"] > 0
    assert facts["quality"]["kl"] == pytest.approx(lost[0]["quality"]["kl"], rel=1e-5)
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("written", range(4))
def test_a_full_disk_costs_nothing_that_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: int
) -> None:
    """After so many parts: none, the text that the model has written, the windows, a layer."""
    model, out, request = teacher(), tmp_path / "out", Request(cache=0.5, windows=3, window=16)
    pipeline = importlib.import_module("mla.convert.pipeline")
    fitted: list[int] = []
    real, factor = save_file, pipeline.factor_layer
    monkeypatch.setattr(pipeline, "factor_layer", lambda *given: fitted.append(1) or factor(*given))
    parts: list[Path] = []

    def fills(tensors: dict[str, torch.Tensor], path: Path) -> None:
        if len(parts) == written:
            raise SafetensorError("I/O error: No space left on device (os error 28)")
        parts.append(path)
        real(tensors, path)

    with monkeypatch.context() as full_disk:
        full_disk.setattr("mla.convert.parts.save_file", fills)
        with pytest.raises(MLAError, match=r"No space.* kept in .*converting: the same command") as told:
            run("tiny", model, Letters(), out, request)
    assert "\n" not in str(told.value)
    (place,) = tmp_path.iterdir()
    assert len([path for path in place.iterdir() if path.name != "request.json"]) == written
    run("tiny", model, Letters(), out, request)
    assert list(tmp_path.iterdir()) == [out]
    assert len(fitted) == 2 + (written > 1)  # the layer under way is fitted anew, the finished one is not


class StoppedError(Exception):
    """The end of a run, when all but the result is finished."""


@pytest.fixture
def stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """``stopped(request)``: a run up to its result; the parts that it made, and the notices it gave."""
    ticks = itertools.count(0.0, 0.05)
    monkeypatch.setattr("mla.convert.healing.time", SimpleNamespace(monotonic=lambda: next(ticks)))
    model, made, notices = teacher(), set(), []
    pipeline = importlib.import_module("mla.convert.pipeline")

    def told(owner: Any, name: str, part: str) -> None:
        real = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, **more: made.add(part) or real(*args, **more))

    told(WORKSPACE, "tokenize_windows", "text")
    told(WORKSPACE, "cut_text", "text to heal on")
    told(pipeline, "factor_layer", "layers")

    def fails(*_: Any, **__: Any) -> None:
        raise StoppedError

    monkeypatch.setattr(RUN, "save", fails)

    def stopped(request: Request) -> tuple[set[str], list[str]]:
        made.clear()
        notices.clear()
        with pytest.raises(StoppedError):
            run(
                "tiny",
                model,
                Letters(),
                tmp_path / "out",
                request,
                on_progress=lambda stage, *_: made.add(stage) if stage == "healing" else None,
                on_notice=notices.append,
            )
        return set(made), list(notices)

    return stopped


def test_what_does_not_depend_on_the_change_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stopped: Any
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 100)
    first = Request(cache=0.5, calibration=(str(text),), windows=2, window=16, heal=0.1)
    assert stopped(first) == ({"text", "text to heal on", "layers", "healing"}, [])
    assert stopped(first) == (set(), [])
    monkeypatch.chdir(tmp_path)
    assert stopped(replace(first, dtype="bfloat16", calibration=("./text.txt",))) == (set(), [])

    place = tmp_path / ".out.converting"
    made, (notice,) = stopped(replace(first, split_query=True))
    assert made == {"healing"}
    assert notice == (
        f"of the earlier work in {place} these parts begin anew: healing. "
        "They were made with another split_query"
    )
    made, (notice,) = stopped(replace(first, heal=0.2))
    assert made == {"text to heal on", "healing"}
    assert "text to heal on, healing. They were made with another heal, split_query" in notice
    made, (notice,) = stopped(replace(first, heal=0.2, cache=0.4))
    assert made == {"layers", "healing"}
    assert "layers, healing. They were made with another cache" in notice
    text.write_text(text.read_text() + "!")
    made, (notice,) = stopped(replace(first, heal=0.2, cache=0.4))
    assert made == {"text", "text to heal on", "layers", "healing"}
    assert "text, text to heal on, layers, healing. They were made with another calibration" in notice


def test_what_killed_processes_were_writing_goes(tmp_path: Path, stopped: Any) -> None:
    first = Request(cache=0.5, windows=2, window=16)
    stopped(first)
    place = tmp_path / ".out.converting"
    left = ".mla-writing-0123456789abcdef"
    for name in (f"{left}/healing.pt", f"points/{left}/.tmp6ft04y"):  # the last one as safetensors names them
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text("half")
    assert stopped(first) == (set(), [])
    assert not list(place.rglob(".*"))


def test_a_result_ends_an_earlier_search_for_it(tmp_path: Path) -> None:
    model, out, request = teacher(), tmp_path / "out", Request(cache=0.5, windows=2, window=16)
    search = replace(request, cache=None)
    with pytest.raises(StoppedError), workspace(model, Letters(), out, search, "exploring"):
        raise StoppedError
    assert [path.name for path in tmp_path.iterdir()] == [".out.exploring"]
    run("tiny", model, Letters(), out, request)
    assert list(tmp_path.iterdir()) == [out]


def test_another_current_folder_in_between_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    request = Request(cache=0.5, windows=2, window=16)
    run(
        "tiny",
        teacher(),
        Letters(),
        Path("out"),
        request,
        on_progress=lambda *_: monkeypatch.chdir(tmp_path / "elsewhere"),
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "out"]


def test_another_transformers_is_named_as_the_reason(tmp_path: Path, monkeypatch: Any, stopped: Any) -> None:
    first = Request(cache=0.5, windows=2, window=16)
    stopped(first)
    monkeypatch.setattr("transformers.__version__", "99.0")
    _, (notice,) = stopped(first)
    assert notice.endswith("They were made with another transformers")


def test_layers_of_another_converter_begin_anew(tmp_path: Path, monkeypatch: Any, stopped: Any) -> None:
    first = Request(cache=0.5, windows=2, window=16)
    stopped(first)
    monkeypatch.setattr(WORKSPACE, "_CONVERTER", 1)
    _, (notice,) = stopped(first)
    assert notice.endswith("these parts begin anew: layers. They were made with another converter")


def test_a_text_is_too_short_only_where_it_is(tmp_path: Path) -> None:
    for text, vocabulary, holds in (("a" * 2000, 93, True), ("a" * 60, 93, False)):
        given = (teacher(vocab_size=vocabulary), Letters(), Request(calibration=("x",), windows=4, window=32))
        assert WORKSPACE.holds_windows(*given, [text]) == holds
    given = (teacher(vocab_size=20), Letters(), Request(calibration=("x",), windows=4, window=32))
    with pytest.raises(MLAError, match="outside the model's vocabulary of 20"):
        WORKSPACE.holds_windows(*given, ["Y" * 2000])


def test_a_request_that_is_refused_removes_nothing(tmp_path: Path, stopped: Any) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 100)
    first = Request(cache=0.5, calibration=(str(text),), windows=2, window=16)
    stopped(first)
    with pytest.raises(MLAError, match="too short"):
        stopped(replace(first, windows=9999))
    assert stopped(first) == (set(), [])


def test_the_same_model_by_another_path_goes_on(tmp_path: Path) -> None:
    model, request = teacher(), Request(windows=2, window=16)
    with pytest.raises(StoppedError), workspace(model, Letters(), tmp_path / "out", request, "converting"):
        raise StoppedError
    model.config._name_or_path = "/elsewhere/tiny"
    model.config.quantization_config = {"quant_method": "gguf", "gguf_file": "tiny.gguf"}
    notices: list[str] = []
    out = tmp_path / "out"
    with workspace(model, Letters(), out, request, "converting", on_notice=notices.append):
        assert notices == []


@pytest.mark.parametrize(
    "change", [{"chat_template": "{{ messages }}"}, {"all_special_ids": (1, 2, 3)}, {"bos_token_id": 2}, {}]
)
def test_with_another_tokenizer_text_begins_anew(tmp_path: Path, change: dict[str, Any]) -> None:
    model, out, request = teacher(), tmp_path / "out", Request(windows=2, window=16)
    with pytest.raises(StoppedError), workspace(model, Letters(), out, request, "converting"):
        raise StoppedError
    other: Any = Letters()
    other.apply_chat_template = lambda *_, **__: "MARKER"
    for name, value in change.items():
        setattr(other, name, value)
    notices: list[str] = []
    with workspace(model, other, out, request, "converting", on_notice=notices.append):
        assert len(notices) == bool(change)
    assert not change or "begin anew: text. They were made with another tokenizer" in notices[0]


def test_what_the_model_has_written_is_not_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between two batches of either text, and the same text comes out."""
    monkeypatch.setattr("mla.convert.text._BATCH", 2)
    monkeypatch.setattr("mla.convert.text._PIECE", 16)
    model, request = teacher(), Request(windows=3, window=16, heal=0.05)
    with workspace(model, Letters(), tmp_path / "whole", request, "converting") as work:
        wanted = work
    text = importlib.import_module("mla.convert.text")
    draw, drawn = text._draw, []

    def stops(*arguments: Any) -> Any:
        if len(drawn) in stops_at:
            stops_at.remove(len(drawn))
            raise StoppedError
        drawn.append(len(arguments[1]))
        return draw(*arguments)

    monkeypatch.setattr(text, "_draw", stops)
    stops_at = [2, 5]
    batches = 4 + 2  # of at most two: 3 windows to calibrate on and 4 to measure on, then 4 to heal on
    for _ in range(3):
        with (
            contextlib.suppress(StoppedError),
            workspace(model, Letters(), tmp_path / "out", request, "converting") as work,
        ):
            assert len(drawn) == batches
            for name in ("calibration", "training", "held_out"):
                assert torch.equal(getattr(work, name), getattr(wanted, name)), name
    assert stops_at == []
    assert len(drawn) == batches


def test_finished_layers_are_only_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A healing that goes on does not wait for the calibration text to be read by both models."""
    model, calibration = teacher("qwen2"), tokens(2, 24)  # its biases leave a constant in every layer
    first = convert(model, calibration=calibration, cache=0.5, state=tmp_path)
    read = importlib.import_module("mla.convert.pipeline")
    with monkeypatch.context() as patch:
        blocks = ("teacher_block", "teacher_starts", "student_block", "student_starts")
        for name in (*blocks, "collect", "embedded"):
            patch.setattr(read, name, lambda *_, **__: pytest.fail("the text was read again"))
        again = convert(model, calibration=calibration, cache=0.5, state=tmp_path)
    for name, value in first.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    # One layer that is not finished: its input has to be found.
    (tmp_path / "layer-001.safetensors").unlink()
    other = convert(model, calibration=calibration, cache=0.5, state=tmp_path)
    for name, value in first.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], value, atol=1e-4, rtol=1e-3)


def test_the_report_measures_what_is_written(tmp_path: Path) -> None:
    model, request = teacher(), Request(cache=0.5, windows=2, window=32, dtype="bfloat16")
    facts = run("someone/tiny", model, Letters(), tmp_path / "out", request)
    assert facts["base_model"] == "someone/tiny"
    assert facts["command"].startswith(
        "mla convert someone/tiny out --cache 0.5 --calibration self --windows 2"
    )
    written = DeepseekV3ForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with workspace(model, Letters(), tmp_path / "again", request, "converting") as work:
        found = evaluate(written, work.held_out, against=model)
    assert facts["quality"]["kl"] == pytest.approx(found.kl, rel=1e-5)
    assert facts["quality"]["perplexity"] == pytest.approx(found.perplexity, rel=1e-5)


def test_an_exact_conversion_can_be_healed(tmp_path: Path) -> None:
    model = teacher(num_key_value_heads=1)
    request = Request(rank=12, rope=12, windows=2, window=16, heal=0.01)
    facts = run("tiny", model, Letters(), tmp_path / "out", request)
    assert facts["heal"]["kl_after"] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("matrix", ["o_proj", "v_proj"])
def test_a_head_that_writes_nothing(matrix: str) -> None:
    from mla.convert import convert

    model = teacher()
    with torch.no_grad():
        weight = getattr(model.model.layers[1].self_attn, matrix).weight
        (weight.T if matrix == "o_proj" else weight)[:12] = 0
    student = convert(model, calibration=tokens(4, 24), rank=12, rope=6)
    ids = tokens(2, 24, seed=7)
    with torch.no_grad():
        assert student(ids).logits.isfinite().all()
