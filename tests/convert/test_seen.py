"""Whether text that measures is new to what was chosen before."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mla.convert import Request, workspace
from mla.convert.text import seen_before
from tests.convert.tiny import Letters, teacher, tokens


@pytest.mark.parametrize(("common", "seen"), [(63, False), (64, True), (100, True)])
def test_text_is_known_by_a_run_of_tokens(common: int, seen: bool) -> None:
    windows, others = tokens(3, 100), tokens(2, 120, seed=2)
    windows[1, 100 - common :] = others[1, :common]
    assert seen_before(windows, others) == [False, seen, False]
    # Windows of fewer tokens are known as a whole.
    assert seen_before(windows[:, -20:], others[:, :20]) == [False, common == 20, False]
    assert seen_before(windows[:, :20], windows[1:, :20]) == [False, True, True]


def test_what_measures_is_new_to_the_search_only_where_it_is(tmp_path: Path) -> None:
    """A search and its conversion cut one file differently: windows overlap without being the same ones."""
    letters = "".join(chr(97 + n) for n in torch.randint(26, (12_000,), generator=torch.Generator()).tolist())
    text = tmp_path / "text.txt"
    text.write_text(letters)
    model = teacher()
    search = Request(calibration=(str(text),), windows=6, window=100)

    def places(windows: torch.Tensor) -> list[set[int]]:
        """The characters of the file that are in every window; its first token is none."""
        starts = [letters.index("".join(chr(token + 87) for token in row)) for row in windows[:, 1:].tolist()]
        return [set(range(start, start + 99)) for start in starts]

    counts = set()
    with workspace(model, Letters(), tmp_path / "out", search, "exploring") as found:
        known = set().union(*places(found.calibration), *places(found.held_out))
        for seed, windows in ((0, 12), (1, 12), (0, 36), (2, 36)):
            request = replace(search, windows=windows, seed=seed)
            with workspace(model, Letters(), tmp_path / "out", request, "converting", search=found) as work:
                common = [len(known & each) for each in places(work.held_out)]
                assert sum(each >= 64 for each in common) == work.seen
                counts.add((work.seen > 0, work.seen < len(work.held_out)))
    assert (True, True) in counts
