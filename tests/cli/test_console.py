"""What the bar says of the time that is left."""

import pytest
from rich.progress import Progress

from mla.cli import console


@pytest.fixture
def bar(monkeypatch):
    """A bar on a clock of its own: (its task, advance, wait)."""
    now = [0.0]
    monkeypatch.setattr(console.people, "get_time", lambda: now[0])
    made = []

    class Kept(Progress):
        def __init__(self, *columns, **options):
            super().__init__(*columns, **options)
            made.append(self)

    monkeypatch.setattr(console, "Progress", Kept)

    def wait(seconds):
        now[0] += seconds

    with console.progress("working") as advance:
        yield made[0].tasks[0], advance, wait


def test_steps_of_minutes_tell_the_time_left(bar):
    task, advance, wait = bar
    for layer in (1, 2, 3):
        wait(80)
        advance(layer, 30, "converting")
    assert task.time_remaining == 27 * 80


def test_more_to_do_keeps_the_speed_and_another_count_begins_anew(bar):
    task, advance, wait = bar
    for point in (1, 2, 3):
        wait(80)
        advance(point, 3, "searching")
    assert task.finished
    advance(3, 5, "searching")
    assert task.time_remaining == 2 * 80
    advance(0.0, 600.0, "healing")
    assert task.time_remaining is None
    for seconds in (10.0, 20.0):
        wait(10)
        advance(seconds, 600.0, "healing")
    assert task.time_remaining == 580
