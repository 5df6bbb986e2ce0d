"""Formulas as data: one text for Python, for ``--explain`` and for the page's JavaScript.

A formula is an arithmetic expression over names: numbers, ``+ - * / **``, comparisons, ``min``, ``max``,
``ceil``, ``floor``, ``where(condition, a, b)`` (only the chosen branch is computed), ``inf``, and three words
of this module:

- ``total(x)``: the sum of x over the model's groups of like layers; inside, names of one group are visible.
- ``main(x)``: x for the first group, the model's main attention.
- ``crossing(t, f, g)``: the smallest t of 1 and more at which the formulas f and g change order; inf if they
  never do below 2^30. Doubling finds the interval, bisection the place.

Nothing else parses, so the text can be evaluated here through :mod:`ast` and written out as JavaScript.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

_OPERATORS: dict[type[ast.AST], str] = {
    ast.Add: "+",
    ast.Sub: "-",
    ast.Mult: "*",
    ast.Div: "/",
    ast.Pow: "**",
    ast.Lt: "<",
    ast.LtE: "<=",
    ast.Gt: ">",
    ast.GtE: ">=",
    ast.Eq: "",  # written differently in the two languages
}
_ALLOWED = (ast.BinOp, ast.UnaryOp, ast.Name, ast.USub, ast.Load, *_OPERATORS)
_FUNCTIONS: dict[str, Callable[..., float]] = {
    "min": min,
    "max": max,
    "ceil": lambda x: x if math.isinf(x) else math.ceil(x),
    "floor": lambda x: x if math.isinf(x) else math.floor(x),
}
_WORDS = {"where": 3, "total": 1, "main": 1, "crossing": 3}
STEPS = 40
LAST_DOUBLING = 30


@dataclass(frozen=True)
class Formula:
    """How one figure is computed: ``unit`` of the result, ``meaning`` in words, ``source`` of the formula.

    ``layer``: the formula is about one layer of a group and may use the group's numbers.
    """

    name: str
    text: str
    unit: str
    meaning: str
    source: str
    layer: bool = False


@dataclass(frozen=True)
class Figure:
    """A formula with numbers put in. ``numbers``: the values of the names in its text."""

    name: str
    formula: str
    numbers: Mapping[str, float]
    result: float
    unit: str
    meaning: str
    source: str


class Sheet:
    """Formulas that know one another by name."""

    def __init__(self, formulas: Sequence[Formula]) -> None:
        self.formulas: dict[str, Formula] = {}
        self._functions: dict[str, Callable[[_Scope], float]] = {}
        self._trees: dict[str, ast.expr] = {}
        self._moved: dict[str, set[str]] = {}
        for formula in formulas:
            if formula.name in self.formulas:
                raise ValueError(f"two formulas are called {formula.name!r}")
            self.formulas[formula.name] = formula

    def tree(self, name: str) -> ast.expr:
        """The parsed text; ValueError if it holds anything that is not arithmetic."""
        if name not in self._trees:
            tree = ast.parse(self.formulas[name].text, mode="eval").body
            _check(tree, name)
            self._trees[name] = tree
        return self._trees[name]

    def names(self, name: str) -> tuple[str, ...]:
        """Names of the numbers that a formula uses, in the order they stand."""
        return tuple(dict.fromkeys(_names(self.tree(name))))

    def function(self, name: str) -> Callable[[_Scope], float]:
        """The formula as a function. All are compiled at first use, in one go: that takes milliseconds."""
        if not self._functions:
            rows = (f"{name!r}: lambda _x: {_emit(self.tree(name), _PYTHON)}" for name in self.formulas)
            # Every tree was checked: arithmetic and the words of this module, nothing else can be called.
            self._functions = eval(
                "{" + ",\n".join(rows) + "}", {"__builtins__": {}, "inf": math.inf, **_FUNCTIONS}
            )
        return self._functions[name]

    def moved_by(self, variable: str) -> set[str]:
        """Names of the formulas whose result may change with an input."""
        if variable not in self._moved:
            moved: set[str] = set()

            def depends(name: str, seen: set[str]) -> bool:
                if name == variable or name in moved:
                    return True
                if name in seen or name not in self.formulas:
                    return False
                seen.add(name)
                if any(depends(used, seen) for used in self.names(name)):
                    moved.add(name)
                return name in moved

            seen: set[str] = set()
            for name in self.formulas:
                depends(name, seen)
            self._moved[variable] = moved
        return self._moved[variable]

    def javascript(self) -> str:
        """All formulas as one JavaScript object ``{name: {layer, f(v, total, main, crossing)}}``."""
        rows = []
        for name, formula in self.formulas.items():
            code = _emit(self.tree(name), _JAVASCRIPT)
            layer = "true" if formula.layer else "false"
            rows.append(f"  {name}: {{layer: {layer}, f: (v, total, main, crossing) => {code}}}")
        return "{\n" + ",\n".join(rows) + "\n}"


class Values:
    """A sheet with numbers: ``values["name"]`` is an input or the result of a formula.

    Args:
        sheet: the formulas.
        inputs: numbers of the whole model, hardware and question.
        groups: for each group of like layers its numbers; the first is the main one.
    """

    def __init__(
        self, sheet: Sheet, inputs: Mapping[str, float], groups: Sequence[Mapping[str, float]]
    ) -> None:
        self.sheet = sheet
        self.inputs = dict(inputs)
        self.groups = groups
        self._memo: dict[tuple[str, int | None], float] = {}
        self._elsewhere: dict[tuple[str, float], Values] = {}

    def __getitem__(self, name: str) -> float:
        return self.value(name)

    def value(self, name: str, group: int | None = None) -> float:
        """An input or a result; KeyError for an unknown name, or a layer's name outside of a layer."""
        if group is not None and name in self.groups[group]:
            return self.groups[group][name]
        if name in self.inputs:
            return self.inputs[name]
        if name not in self.sheet.formulas:
            raise KeyError(f"{name}: neither a number nor a formula" + ("" if group is None else " here"))
        if not self.sheet.formulas[name].layer:
            group = None
        elif group is None:
            raise KeyError(f"{name} belongs to a layer: use total() or main()")
        key = (name, group)
        if key not in self._memo:
            self._memo[key] = self.sheet.function(name)(_Scope(self, group))
        return self._memo[key]

    def replaced(self, variable: str, value: float) -> Values:
        """The same sheet with another value of one input; what does not depend on it is kept."""
        key = (variable, value)
        if key not in self._elsewhere:
            there = Values(self.sheet, {**self.inputs, variable: value}, self.groups)
            moved = self.sheet.moved_by(variable)
            there._memo = {name: result for name, result in self._memo.items() if name[0] not in moved}
            self._elsewhere[key] = there
        return self._elsewhere[key]

    def turns(
        self, variable: str, first: str, second: str, *, by_way_of: float = 1.0
    ) -> Iterator[tuple[float, int]]:
        """Every place where two formulas change order between the marks 1, 2, 4 ... 2^30 and ``by_way_of``.

        With each place the order beyond it: 1 where ``first`` is larger, -1 where it is smaller, 0 where
        they are equal. Two changes between two marks are not seen.
        """

        def lead(at: float) -> int:
            there = self.replaced(variable, at)
            difference = there[first] - there[second]
            return (difference > 0) - (difference < 0)

        marks = sorted({by_way_of, *(2.0**step for step in range(LAST_DOUBLING + 1))})
        before = lead(marks[0])
        for low, high in pairwise(marks):
            after = lead(high)
            if after != before:
                for _ in range(STEPS):
                    middle = (low + high) / 2
                    low, high = (middle, high) if lead(middle) == before else (low, middle)
                yield high, after
            before = after

    def figure(self, name: str, group: int | None = None) -> Figure:
        """The result with everything that went into it."""
        formula = self.sheet.formulas[name]
        if formula.layer and group is None:
            group = 0
        numbers: dict[str, float] = {}
        for used in self.sheet.names(name):
            try:
                numbers[used] = self.value(used, group)
            except KeyError:  # a layer's name under total() or main(): one number per group
                for index in range(len(self.groups)):
                    label = used if len(self.groups) == 1 else f"{used}[group {index + 1}]"
                    numbers[label] = self.value(used, index)
        return Figure(
            name,
            formula.text,
            numbers,
            self.value(name, group),
            formula.unit,
            formula.meaning,
            formula.source,
        )


class _Scope:
    """What a compiled formula sees: ``v`` for names, and the three words."""

    def __init__(self, values: Values, group: int | None) -> None:
        self.values, self.group = values, group

    def v(self, name: str) -> float:
        return self.values.value(name, self.group)

    def total(self, inner: Callable[[_Scope], float]) -> float:
        return sum(inner(_Scope(self.values, index)) for index in range(len(self.values.groups)))

    def main(self, inner: Callable[[_Scope], float]) -> float:
        return inner(_Scope(self.values, 0))

    def crossing(self, variable: str, first: str, second: str) -> float:
        return next((place for place, _ in self.values.turns(variable, first, second)), math.inf)


def _check(tree: ast.expr, name: str) -> None:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            known = isinstance(node.func, ast.Name) and (node.func.id in _FUNCTIONS or node.func.id in _WORDS)
            if not known or node.keywords:
                raise ValueError(f"formula {name}: unknown function {ast.unparse(node.func)}")
            assert isinstance(node.func, ast.Name)
            if node.func.id in _WORDS and len(node.args) != _WORDS[node.func.id]:
                raise ValueError(f"formula {name}: {node.func.id} takes {_WORDS[node.func.id]} arguments")
        elif isinstance(node, ast.Constant):
            if isinstance(node.value, bool) or not isinstance(node.value, int | float):
                raise ValueError(f"formula {name}: {node.value!r} is not a number")
        elif isinstance(node, ast.Compare):
            if len(node.ops) != 1:
                raise ValueError(f"formula {name}: one comparison at a time")
        elif not isinstance(node, _ALLOWED):
            raise ValueError(f"formula {name}: {type(node).__name__} is not arithmetic")


def _names(tree: ast.expr) -> list[str]:
    """Names of numbers in the order they stand, without functions and without the formulas of crossing()."""
    if isinstance(tree, ast.Name):
        return [] if tree.id == "inf" else [tree.id]
    if isinstance(tree, ast.Call) and isinstance(tree.func, ast.Name) and tree.func.id == "crossing":
        return []
    found: list[str] = []
    for child in ast.iter_child_nodes(tree):
        if isinstance(tree, ast.Call) and child is tree.func:
            continue
        if isinstance(child, ast.expr):
            found += _names(child)
    return found


@dataclass(frozen=True)
class _Language:
    """How the words are written: ``{0}`` ... are their arguments."""

    number: str
    infinity: str
    where: str
    scoped: str
    crossing: str
    function: str
    equal: str


_PYTHON = _Language(
    number="_x.v({0!r})",
    infinity="inf",
    where="({1} if {0} else {2})",
    scoped="_x.{0}(lambda _x: {1})",
    crossing="_x.crossing({0!r}, {1!r}, {2!r})",
    function="{0}({1})",
    equal="==",
)
_JAVASCRIPT = _Language(
    number='v("{0}")',
    infinity="Infinity",
    where="({0} ? {1} : {2})",
    scoped="{0}(v => {1})",
    crossing='crossing("{0}", "{1}", "{2}")',
    function="Math.{0}({1})",
    equal="===",
)


def _emit(tree: ast.expr, language: _Language) -> str:
    """A checked tree as source text, every operation in parentheses."""
    if isinstance(tree, ast.Constant):
        return repr(tree.value)
    if isinstance(tree, ast.Name):
        return language.infinity if tree.id == "inf" else language.number.format(tree.id)
    if isinstance(tree, ast.UnaryOp):
        return f"(-{_emit(tree.operand, language)})"
    if isinstance(tree, ast.BinOp):
        left, right = _emit(tree.left, language), _emit(tree.right, language)
        return f"({left} {_OPERATORS[type(tree.op)]} {right})"
    if isinstance(tree, ast.Compare):
        left, right = _emit(tree.left, language), _emit(tree.comparators[0], language)
        sign = _OPERATORS[type(tree.ops[0])] or language.equal
        return f"({left} {sign} {right})"
    assert isinstance(tree, ast.Call)
    assert isinstance(tree.func, ast.Name)
    word = tree.func.id
    if word == "crossing":
        return language.crossing.format(*(arg.id for arg in tree.args if isinstance(arg, ast.Name)))
    inner = [_emit(arg, language) for arg in tree.args]
    if word == "where":
        return language.where.format(*inner)
    if word in _WORDS:
        return language.scoped.format(word, inner[0])
    return language.function.format(word, ", ".join(inner))
