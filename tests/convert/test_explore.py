"""Several budgets on one calibration, and the smallest that keeps a promise."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from mla.cli.explore import check_page, choose_command, explore_command
from mla.convert import explore as module
from mla.convert import explore_page, pipeline
from mla.convert.explore import Exploration, Point, explore, find_knee, frontier, smallest
from mla.convert.factorise import Terms, spectrum
from mla.convert.promise import Promise
from mla.errors import MLAError

from .test_report import check
from .tiny import teacher, tokens

TEACHER = teacher()
CALIBRATION, HELD_OUT = tokens(2, 24), tokens(2, 24, seed=9)
FULL = 2 * 2 * 12


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The (rank, rope) of every conversion that really runs."""
    done: list[tuple[int, int]] = []
    real = module.convert

    def counted(*args: object, **options: object) -> object:
        done.append((options["rank"], options["rope"]))
        return real(*args, **options)

    monkeypatch.setattr(module, "convert", counted)
    return done


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("explore") / "state"


@pytest.fixture(scope="module")
def explored(state: Path) -> Exploration:
    return explore(TEACHER, CALIBRATION, HELD_OUT, state=state)


def point(numbers: int, kl: float) -> Point:
    return Point(numbers - 4, 4, numbers, numbers / 100, 2 * numbers, kl, 10 + kl, 0.5, 1.0)


def test_points_cost_less_and_less(explored: Exploration) -> None:
    sizes = [each.bytes_per_token for each in explored.points]
    assert sizes == sorted(sizes, reverse=True)
    assert {each.numbers for each in explored.points} == {round(share * FULL) for share in module.BUDGETS}
    assert len({(each.rank, each.rope) for each in explored.points}) == len(explored.points) > 5
    for each in explored.points:
        assert each.bytes_per_token == 2 * 2 * (each.rank + each.rope)  # bf16, two layers
        assert each.cache == pytest.approx(each.numbers / FULL)
        assert each.kl > 0
    assert explored.original_bytes_per_token == 2 * 2 * FULL
    kls = [each.kl for each in explored.frontier]
    assert kls == sorted(kls)
    assert explored.knee is None or explored.knee in explored.frontier[1:-1]


def test_every_layer_has_a_spectrum(explored: Exploration) -> None:
    assert len(explored.spectra) == 2
    for each in explored.spectra:
        assert 1 <= each.directions_90 <= each.directions_99 <= each.ranks[-1]
        assert list(each.left_out) == sorted(each.left_out, reverse=True)
        assert each.left_out[-1] == pytest.approx(0, abs=1e-9)


def test_the_spectrum_sums_to_what_there_is() -> None:
    chance = torch.Generator().manual_seed(0)
    factor = torch.randn(1, 9, 6, dtype=torch.float64, generator=chance)
    cov = (factor.mT @ factor).expand(3, 6, 6)
    targets = torch.randn(3, 2, 6, dtype=torch.float64, generator=chance)
    terms = Terms(targets, torch.eye(2, dtype=torch.float64).expand(3, 2, 2), cov)
    energy = torch.einsum("idm,imk,idk->", targets, cov, targets)
    found = spectrum(terms)
    assert float(found.sum()) == pytest.approx(float(energy))
    assert torch.equal(found, found.sort(descending=True).values)


def test_a_finished_exploration_converts_nothing(
    explored: Exploration, state: Path, conversions: list[tuple[int, int]]
) -> None:
    assert explore(TEACHER, CALIBRATION, HELD_OUT, state=state) == explored
    assert not conversions
    (state / f"r{explored.points[1].rank}-p{explored.points[1].rope}.json").unlink()
    again = explore(TEACHER, CALIBRATION, HELD_OUT, state=state)
    assert conversions == [(explored.points[1].rank, explored.points[1].rope)]
    assert [each.kl for each in again.points] == pytest.approx([each.kl for each in explored.points])
    assert not [path for path in state.iterdir() if path.is_dir()], "factors of finished budgets are left"


def test_a_killed_budget_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(stage: str, done: float, total: float) -> None:
        if stage.endswith("measuring"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        explore(TEACHER, CALIBRATION, HELD_OUT, budgets=[0.5], state=tmp_path, on_progress=stop)
    collected = []
    real = pipeline.collect
    monkeypatch.setattr(pipeline, "collect", lambda *given: collected.append(1) or real(*given))
    found = explore(TEACHER, CALIBRATION, HELD_OUT, budgets=[0.5], state=tmp_path)
    assert len(collected) == 2 * (len(found.points) - 1), "the first budget's two layers were finished"


def test_a_state_of_another_run_is_refused(explored: Exploration, state: Path) -> None:
    with pytest.raises(MLAError, match="another exploration"):
        explore(TEACHER, tokens(2, 24, seed=77), HELD_OUT, state=state)


def test_the_page_and_the_json_have_every_point(explored: Exploration) -> None:
    text = explore_page.page(explored, "tiny <model>")
    check(text)
    assert "tiny &lt;model&gt;" in text
    assert text.count("<svg") == 4
    for each in explored.points:
        assert f"{each.kl:.4f}" in text
        assert f"{each.perplexity:.2f}" in text
    stored = json.loads(json.dumps(asdict(explored)))
    assert stored["points"][0]["kl"] == explored.points[0].kl


def test_the_knee_lies_furthest_below_the_line() -> None:
    points = [
        point(100, 0.1),
        point(75, 0.15),
        point(50, 0.2),
        point(40, 0.9),
        point(25, 2.0),
        point(60, 3.0),
    ]
    best = frontier(points)
    assert [each.numbers for each in best] == [100, 75, 50, 40, 25]
    assert find_knee(best) == points[2]
    assert find_knee(best[:2]) is None
    assert find_knee([point(100, 0.0), point(50, 1.0), point(25, 1.2)]) is None  # bends the other way


@pytest.mark.parametrize("wanted", [4, 5, 17, 24, 31, 46, 47])
def test_the_smallest_cache_that_keeps_the_promise(
    wanted: int, state: Path, explored: Exploration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A teacher as it should be: more cache, less loss.
    monkeypatch.setattr(module._Lab, "_convert", lambda _lab, _name, rank, rope: made(rank, rope))

    def made(rank: int, rope: int) -> Point:
        numbers = rank + rope
        return Point(rank, rope, numbers, numbers / FULL, 4 * numbers, 10 / numbers, 200.0, 0.5, 1.0)

    found = smallest(TEACHER, CALIBRATION, HELD_OUT, Promise(max_kl=10 / wanted), state=tmp_path)
    assert found.point.numbers == wanted
    assert len(found.tried) <= 6
    assert wanted == 4 or any(each.numbers == wanted - 1 for each in found.tried)
    monkeypatch.setattr(module, "convert", None)
    assert smallest(TEACHER, CALIBRATION, HELD_OUT, Promise(max_kl=10 / wanted), state=tmp_path) == found


def test_an_exploration_spares_the_search_conversions(
    explored: Exploration, state: Path, tmp_path: Path, conversions: list[tuple[int, int]]
) -> None:
    limit = explored.points[0].kl
    found = smallest(TEACHER, CALIBRATION, HELD_OUT, Promise(max_kl=limit), state=state)
    assert found.point.kl <= limit
    assert {(each.rank, each.rope) for each in explored.points} <= {
        (each.rank, each.rope) for each in found.tried
    }
    spared = len(conversions)
    fresh = smallest(TEACHER, CALIBRATION, HELD_OUT, Promise(max_ppl_increase=3.0))
    assert fresh.point.perplexity <= 4 * fresh.teacher_perplexity
    assert spared < len(conversions) - spared == len(fresh.tried) <= 6


def test_a_promise_nothing_keeps_names_the_best_seen(state: Path, explored: Exploration) -> None:
    with pytest.raises(MLAError, match=r"no cache below .* 48 numbers .* KL of at most 1e-09 .* best seen"):
        smallest(TEACHER, CALIBRATION, HELD_OUT, Promise(max_kl=1e-9), state=state)


@pytest.mark.parametrize(
    "promise", [{}, {"max_kl": 0.0}, {"max_ppl_increase": -0.1}, {"max_kl": float("nan")}]
)
def test_a_promise_that_makes_no_sense(promise: dict[str, float]) -> None:
    with pytest.raises(MLAError):
        Promise(**promise)


def test_the_command_writes_the_page_and_prints(
    explored: Exploration, state: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "curve.html"
    told = {"source": "tiny", "out": out, "state": state}
    explore_command(TEACHER, CALIBRATION, HELD_OUT, **told, as_json=True)
    check(out.read_text(encoding="utf-8"))
    printed = json.loads(capsys.readouterr().out)
    assert [each["rank"] for each in printed["points"]] == [each.rank for each in explored.points]
    with pytest.raises(MLAError, match=r"curve\.html exists"):
        explore_command(TEACHER, CALIBRATION, HELD_OUT, **told)
    explore_command(TEACHER, CALIBRATION, HELD_OUT, **told, overwrite=True)
    shown = capsys.readouterr()
    assert "perplexity" in shown.out
    assert f"{explored.points[0].kl:.4f}" in shown.out
    assert "what every layer needs" in shown.err
    chosen = choose_command(TEACHER, CALIBRATION, HELD_OUT, Promise(max_kl=100.0), state=state)
    assert f"rank {chosen.rank}" in capsys.readouterr().err
    explore_command(TEACHER, CALIBRATION, HELD_OUT, **(told | {"out": tmp_path / "new" / "x.html"}))
    assert (tmp_path / "new" / "x.html").is_file()
    with pytest.raises(MLAError, match="--explore: expected a file"):
        check_page(tmp_path, overwrite=True)
    with pytest.raises(MLAError, match="cannot be written"):
        check_page(out / "x.html", overwrite=True)
