"""What a conversion reads, and the hidden folder in which its finished parts survive a kill.

In the folder, beside the result, lie the windows of text, the factors of every layer and the state of the
healing. The same request finds it again and goes on; another one takes the parts that do not depend on what
is other, and removes the rest once it is clear that it can be done. The folder goes when the result is in
place.
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from mla import __version__
from mla.convert.parts import load, load_json, store
from mla.convert.pipeline import check_split_query
from mla.convert.text import (
    TooShortError,
    check_vocabulary,
    check_window,
    check_windows,
    cut_text,
    seen_before,
    tokenize_windows,
    write_windows,
)
from mla.digest import canonical, digest, digest_of_weights
from mla.errors import MLAError
from mla.textfile import read_text
from mla.whole import UnwrittenError, remove_abandoned, whole

Progress = Callable[[str, float, float], None]
Notice = Callable[[str], None]

_WINDOWS = "windows.safetensors"  # what to calibrate on and what to measure on
_TRAINING = "training.safetensors"  # what to heal on
# What the model has written of either so far; a generator of one kind of device is of no use on another.
_WRITING = "{}-writing-{}.safetensors"
# The parts of the folder, their files, and what of :func:`_identity` they depend on. On "dtype" none does.
_OF_TEXT = {"mla", "torch", "transformers", "model", "tokenizer", "calibration", "windows", "window", "seed"}
_OF_SEARCH = _OF_TEXT | {"converter"}
_OF_LAYERS = _OF_SEARCH | {"cache", "rank", "rope"}
_PARTS = (
    ("text", "windows*.safetensors", _OF_TEXT),
    ("search", "points", _OF_SEARCH),
    ("text to heal on", "training*.safetensors", _OF_TEXT | {"heal"}),
    ("layers", "layer-*.safetensors", _OF_LAYERS),
    ("healing", "healing.pt", _OF_LAYERS | {"heal", "split_query"}),
)
# Windows that only measure, beside every so many that calibrate, and how many are enough: what they take of a
# text is lost to learning.
_CALIBRATING_PER_MEASURING = 6
_MEASURING = 8
# Self-written tokens more per minute of healing: each is read a few times until the time is over.
_TOKENS_PER_MINUTE = 1536
# What makes the layers: one more with every change to what they come out as, or to what is kept on the way.
_CONVERTER = 2
# Tokens of a file that healing may read: so many, and so many more per minute, ten times what was measured.
_READ, _READ_PER_MINUTE = 2**20, 2**17


@dataclass(frozen=True)
class Request:
    """What the user asks for; two runs with equal requests of one model give the same result.

    Attributes:
        cache, rank, rope: see :func:`mla.convert.convert`.
        calibration: texts that share the windows: "self" (the model writes its own), paths of UTF-8 files.
        windows: calibration windows. ``window``: tokens per window. ``seed``: of text and training order.
        heal: minutes of training after the conversion; 0 for none.
        split_query: see :func:`mla.convert.convert`.
        dtype: of the written weights, "float32" or "bfloat16".
    """

    cache: float | None = None
    rank: int | None = None
    rope: int | None = None
    calibration: tuple[str, ...] = ("self",)
    windows: int = 24
    window: int = 1024
    seed: int = 0
    heal: float = 0.0
    split_query: bool = False
    dtype: str = "float32"


@dataclass(frozen=True)
class Workspace:
    """A folder for finished parts, token ids [w, t] to calibrate on, to heal on and to measure on, when work
    on them began (``time.monotonic``), and how many of those that measure hold text that a search for the
    budget has seen."""

    place: Path
    calibration: Tensor
    training: Tensor
    held_out: Tensor
    started: float
    seen: int


def check_request(request: Request) -> None:
    """Refuse, before any work, what no model could do.

    Raises:
        MLAError: minutes, seeds, windows or a choice of texts that make no sense.
    """
    if not 0 <= request.heal < math.inf:
        raise MLAError(f"heal takes minutes, 0 or more, got {request.heal}")
    if not 0 <= request.seed < 2**32:
        raise MLAError(f"seed takes an integer from 0 to {2**32 - 1}, got {request.seed}")
    check_windows(request.windows, request.window)
    if request.windows < 2:
        raise MLAError(
            "windows takes 2 or more, got 1: a layer's fit is kept where it helps on a window that it did "
            "not see"
        )
    if not 1 <= len(request.calibration) <= request.windows:
        raise MLAError(
            f"{request.windows} windows cannot be shared by {len(request.calibration)} texts: ask for as "
            "many windows as texts, or more"
        )
    if len(set(request.calibration)) < len(request.calibration):
        raise MLAError("a calibration text is given twice: ask for more windows of it instead")


def read_texts(request: Request) -> list[str | None]:
    """The calibration texts, None where the model writes one.

    Raises:
        MLAError: a file that cannot be read, or not again when a run that was interrupted goes on.
    """
    return [None if name == "self" else read_text(name, again=True) for name in request.calibration]


def holds_windows(
    teacher: PreTrainedModel, tokenizer: Any, request: Request, texts: Sequence[str | None]
) -> bool:
    """Whether the ``texts`` (of :func:`read_texts`) are long enough for the windows that are asked for."""
    try:
        _Texts(teacher, tokenizer, request, texts, None).cut()
    except TooShortError:
        return False
    return True


@contextlib.contextmanager
def workspace(
    teacher: PreTrainedModel,
    tokenizer: Any,
    out: Path,
    request: Request,
    purpose: str,
    *,
    texts: Sequence[str | None] | None = None,
    search: Workspace | None = None,
    on_progress: Progress | None = None,
    on_notice: Notice | None = None,
) -> Iterator[Workspace]:
    """The folder ``.OUT.PURPOSE`` beside ``out`` while inside: found again after failure, gone after success.

    Args:
        texts: of :func:`read_texts`, where they have been read.
        search: another workspace of the same request but for its budget, ``windows`` and ``heal``: its
            windows are taken if they are as many.
        on_notice: called with a sentence where parts of an earlier request cannot be used.
        Others: as for :func:`run`.

    Raises:
        MLAError: the model or the request cannot be used; then what was there is still there, and no more.
    """
    started = time.monotonic()
    check_split_query(teacher, request.split_query)
    check_window(teacher.config, request.window)
    check_request(request)
    read = read_texts(request) if texts is None else texts
    source = _Texts(teacher, tokenizer, request, read, on_progress)
    out = out.absolute()
    place = _place(out, purpose)
    identity = _identity(teacher, tokenizer, request, read)
    useless, notice = _useless(place, identity)
    new = not place.exists()
    taken = search if search is not None and len(search.calibration) == request.windows else None
    ready = False
    try:
        cut: dict[str, Tensor] = {}
        if taken is None and (place / _WINDOWS in useless or not (place / _WINDOWS).exists()):
            cut = source.cut()
        # Nothing more can be wrong with the request: what it cannot go on with goes only now.
        if useless and on_notice is not None:
            on_notice(notice)
        _enter(place, identity, useless)
        fitting = _keep(
            place / _WINDOWS,
            lambda: source.fitting(cut, place) if taken is None else load(taken.place / _WINDOWS),
        )
        calibration, held_out = (source.mixed(fitting, name) for name in ("calibration", "held_out"))
        training = calibration
        if request.heal:
            healing = _keep(place / _TRAINING, lambda: source.healing(fitting, place))
            training = source.mixed(_evened(healing), "training")
        begun, seen = started, 0
        if search is not None:
            # The search has chosen by what it measured on, and what it was fitted on it knows even better.
            begun = search.started
            seen = sum(seen_before(held_out, torch.cat([search.calibration, search.held_out])))
        ready = True
        yield Workspace(place, calibration, training, held_out, begun, seen)
    except UnwrittenError as error:
        raise MLAError(
            f"{error}. What is finished is kept in {place}: the same command goes on from there"
        ) from error
    except MLAError:
        if new and not ready:
            shutil.rmtree(place, ignore_errors=True)
        raise
    shutil.rmtree(place, ignore_errors=True)
    # There is a result now: what an earlier search for one has left is of no more use.
    shutil.rmtree(_place(out, "exploring"), ignore_errors=True)


def _place(out: Path, purpose: str) -> Path:
    return out.parent / f".{out.name}.{purpose}"


@dataclass(frozen=True)
class _Texts:
    """The texts of a request, each a string or None where the model writes it, and windows of them."""

    teacher: PreTrainedModel
    tokenizer: Any
    request: Request
    texts: Sequence[str | None]
    on_progress: Progress | None

    def cut(self) -> dict[str, Tensor]:
        """Every file's windows to calibrate on and to measure on: what is wrong with them is known before the
        model has written anything.
        """
        found: dict[str, Tensor] = {}
        for index, text in enumerate(self.texts):
            if text is not None:
                found[f"calibration {index}"], found[f"held_out {index}"] = self._cut(index, text)
        return self._checked(found)

    def fitting(self, cut: dict[str, Tensor], place: Path) -> dict[str, Tensor]:
        """Those windows, and as many that the model writes where it is asked to."""
        found = dict(cut)
        for index, text in enumerate(self.texts):
            if text is None:
                calibrating, measuring = self._shares(index)
                ids = self._write(calibrating + measuring, self.request.seed, place, "windows")
                found[f"calibration {index}"], found[f"held_out {index}"] = ids[measuring:], ids[:measuring]
        return self._checked(found)

    def healing(self, fitting: dict[str, Tensor], place: Path) -> dict[str, Tensor]:
        """Every text's windows to heal on: of a file all that the time allows to read, of what the model
        writes those that calibrated and more.
        """
        limit = _READ + int(self.request.heal * _READ_PER_MINUTE)
        more = int(self.request.heal * _TOKENS_PER_MINUTE) // self.request.window
        found = {}
        for index, text in enumerate(self.texts):
            calibration = fitting[f"calibration {index}"]
            if text is not None:
                learnt = self._parts(index, text)[0]
                ids = cut_text(learnt, self.tokenizer, self.request.window, limit=limit)
            elif count := (more + index) // len(self.texts):
                ids = torch.cat([calibration, self._write(count, self.request.seed + 1, place, "training")])
            else:
                ids = calibration
            found[f"training {index}"] = ids if len(ids) > len(calibration) else calibration
        return self._checked(found)

    def _checked(self, found: dict[str, Tensor]) -> dict[str, Tensor]:
        for ids in found.values():
            check_vocabulary(ids, self.teacher.config.vocab_size)
        return found

    def _shares(self, index: int) -> tuple[int, int]:
        """How many windows of a text calibrate, and how many measure."""
        calibrating, count = self.request.windows, len(self.texts)
        measuring = max(4, count, min(calibrating // _CALIBRATING_PER_MEASURING, _MEASURING))
        return (calibrating + index) // count, (measuring + index) // count

    def _parts(self, index: int, text: str) -> tuple[str, str]:
        """What of a file's text is learnt from, and its last part, which only measures."""
        calibrating, measuring = self._shares(index)
        border = int(len(text) * calibrating / (calibrating + measuring))
        return text[:border], text[border:]

    def _cut(self, index: int, text: str) -> list[Tensor]:
        """Windows of a file's text to calibrate on and to measure on."""
        name, size, seed = self.request.calibration[index], self.request.window, self.request.seed
        uses = zip(("calibrating", "measuring"), self._parts(index, text), self._shares(index), strict=True)
        return [
            tokenize_windows(
                part,
                self.tokenizer,
                windows,
                size,
                seed=seed,
                name=f"{name} ({len(text)} characters), its {use} part,",
            )
            for use, part, windows in uses
        ]

    def _write(self, windows: int, seed: int, place: Path, use: str) -> Tensor:
        return write_windows(
            self.teacher,
            self.tokenizer,
            windows,
            self.request.window,
            seed=seed,
            state=place / _WRITING.format(use, self.teacher.device.type),
            on_progress=self.on_progress,
        )

    def mixed(self, found: dict[str, Tensor], name: str) -> Tensor:
        """The windows of all texts in an order that the seed fixes."""
        windows = torch.cat([found[f"{name} {index}"] for index in range(len(self.texts))])
        order = torch.Generator().manual_seed(self.request.seed)
        return windows[torch.randperm(len(windows), generator=order)]


def _evened(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """As much of each text: shorter ones are repeated."""
    most = max(len(ids) for ids in found.values())
    return {name: ids[torch.arange(most) % len(ids)] for name, ids in found.items()}


def _keep(path: Path, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """What lies in the file, made where it does not lie there yet."""
    if not path.exists():
        store(path, make())
    return load(path)


def _identity(
    teacher: PreTrainedModel, tokenizer: Any, request: Request, texts: Sequence[str | None]
) -> dict[str, Any]:
    """Everything that the finished parts depend on: of model and texts what they are, not where they lie."""
    config = teacher.config.to_dict()
    # The path as it was typed, a GGUF file's name, and the version that reads it now.
    for name in ("_name_or_path", "quantization_config", "transformers_version"):
        config.pop(name, None)
    return {
        **asdict(request),
        "mla": __version__,
        "converter": _CONVERTER,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "model": digest(canonical(config), digest_of_weights(teacher).encode()),
        "tokenizer": _tokenizer_digest(tokenizer),
        "calibration": [None if text is None else digest(text.encode()) for text in texts],
    }


def _tokenizer_digest(tokenizer: Any) -> str:
    """Of what makes its token ids: the vocabulary, how it splits, the special ones, the chat template."""
    # A fast tokenizer's rules and merges, which a vocabulary does not tell.
    rules = getattr(tokenizer, "backend_tokenizer", None)
    return digest(
        canonical(tokenizer.get_vocab()),
        b"" if rules is None else rules.to_str().encode(),
        canonical([sorted(tokenizer.all_special_ids), tokenizer.bos_token_id, tokenizer("")["input_ids"]]),
        canonical(tokenizer.chat_template),
    )


def _useless(place: Path, identity: dict[str, Any]) -> tuple[list[Path], str]:
    """Finished parts in the folder that are not of this request, and a sentence that says why."""
    described = place / "request.json"
    stored = load_json(described) if described.exists() else {}
    differs = {name for name, value in identity.items() if stored.get(name) != value}
    useless, words, reasons = [], [], set()
    for word, pattern, needs in _PARTS:
        if needs & differs and (paths := sorted(place.glob(pattern))):
            useless += paths
            words.append(word)
            reasons |= needs & differs
    return useless, (
        f"of the earlier work in {place} these parts begin anew: {', '.join(words)}. "
        f"They were made with another {', '.join(sorted(reasons))}"
    )


def _enter(place: Path, identity: dict[str, Any], useless: list[Path]) -> None:
    """The folder as this request's own."""
    for path in useless:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    if place.is_dir():  # first, for it may be what fills the disk
        for folder in (place, *filter(Path.is_dir, place.iterdir())):
            remove_abandoned(folder)
    with whole(place / "request.json") as partial:
        partial.write_text(json.dumps(identity, sort_keys=True), encoding="utf-8")
