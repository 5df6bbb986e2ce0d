"""Columns of the comparison, and the way the tables of formulas are written."""

from __future__ import annotations

from mla.plan.formulas import Formula

CLASSIC = ("mha", "gqa", "mqa")
LATENT = ("mla", "expanded")
COLUMNS = (*CLASSIC, *LATENT)
#: The four that are shown side by side; "expanded" is a way to run the fourth.
SIDE_BY_SIDE = (*CLASSIC, "mla")

COUNTED = "counted from the layer's weights"
NOTATION = "docs/notation.md"
V2 = "DeepSeek-V2, arXiv:2405.04434, section 2.1"
ROOFLINE = "Williams et al., Roofline, CACM 2009"
MEGATRON = "Shoeybi et al., Megatron-LM, arXiv:1909.08053, section 3; a latent has no heads to split"


class Rows(list[Formula]):
    """A table of formulas under construction."""

    def add(self, name: str, text: str, unit: str, meaning: str, source: str, *, layer: bool = False) -> None:
        """One formula; line breaks in ``text`` do not count."""
        self.append(Formula(name, " ".join(text.split()), unit, meaning, source, layer))

    def each(
        self,
        columns: tuple[str, ...],
        name: str,
        text: str,
        unit: str,
        meaning: str,
        source: str,
        *,
        layer: bool = False,
    ) -> None:
        """One formula per column: ``{a}`` is its name, ``{c}`` the name of the cache it reads."""
        for column in columns:
            cache = "mla" if column in LATENT else column
            filled = text.replace("{a}", column).replace("{c}", cache)
            self.add(name.replace("{a}", column), filled, unit, meaning, source, layer=layer)
