"""The restricted arithmetic: what it computes, what it refuses, what it becomes in JavaScript."""

import math

import pytest

from mla.plan.formulas import Formula, Sheet, Values
from mla.plan.steps import SHEET


def sheet(**texts):
    rows = [Formula(name, text, "1", "", "", layer=name.startswith("layer")) for name, text in texts.items()]
    return Sheet(rows)


def value(text, groups=({"k": 2.0}, {"k": 3.0}), **inputs):
    return Values(sheet(x=text), inputs, groups)["x"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2 * h + p / 4 - 1", 2 * 3 + 8 / 4 - 1),
        ("-h ** 2", -9),
        ("min(h, p, 1) + max(h, p)", 9),
        ("ceil(p / h) + floor(p / h)", 5),
        ("where(h > p, 1 / 0, p)", 8),
        ("total(k * h)", 15),
        ("main(k)", 2),
        ("inf", math.inf),
        ("ceil(inf)", math.inf),
    ],
)
def test_arithmetic(text, expected):
    assert value(text, h=3, p=8) == expected


@pytest.mark.parametrize(
    "text",
    [
        "h.real",
        "'text'",
        "[h]",
        "(lambda: h)()",
        "open(h)",
        "h if h else p",
        "h and p",
        "min(h, key=p)",
        "where(h, p)",
        "1 < h < 3",
        "True",
        "h % 2",
    ],
)
def test_everything_else_is_refused(text):
    with pytest.raises(ValueError, match="formula x"):
        value(text, h=1, p=1)


def test_names_of_a_layer_stay_in_the_layer():
    values = Values(sheet(layer_x="2 * k", x="total(layer_x)", y="layer_x", z="k"), {}, [{"k": 2}, {"k": 5}])
    assert values["x"] == 14
    for name in ("y", "z"):
        with pytest.raises(KeyError):
            values[name]


def test_a_figure_says_what_went_into_it():
    values = Values(sheet(layer_x="2 * k", x="h + total(layer_x)"), {"h": 1}, [{"k": 2}, {"k": 5}])
    figure = values.figure("x")
    assert figure.numbers == {"h": 1, "layer_x[group 1]": 4, "layer_x[group 2]": 10}
    assert figure.result == 15
    assert values.figure("layer_x").numbers == {"k": 2}


def test_crossing():
    lines = sheet(
        f="3 * t + 100", g="5 * t", x="crossing(t, f, g)", never="crossing(t, g, more)", more="g + 1"
    )
    values = Values(lines, {"t": 7}, [])
    assert values["x"] == pytest.approx(50)
    assert values["never"] == math.inf
    assert values["f"] == 121  # the search leaves no trace


def test_another_input_moves_only_what_depends_on_it():
    lines = sheet(f="h * t", g="h + 1", x="f + g")
    values = Values(lines, {"h": 2, "t": 3}, [])
    assert values["x"] == 9
    assert lines.moved_by("t") == {"f", "x"}
    assert values.replaced("t", 10)["x"] == 23
    assert values["x"] == 9


def test_javascript():
    code = sheet(x="where(h > 2, h ** 2, inf)", y="total(min(h, k))").javascript()
    assert '(v("h") > 2) ? (v("h") ** 2) : Infinity' in code
    assert 'total(v => Math.min(v("h"), v("k")))' in code


def test_every_formula_parses_and_says_where_it_comes_from():
    for name, formula in SHEET.formulas.items():
        SHEET.tree(name)
        assert formula.unit, name
        assert formula.meaning, name
        assert formula.source, name
    with pytest.raises(ValueError, match="two formulas"):
        Sheet([*SHEET.formulas.values(), SHEET.formulas["ridge"]])
