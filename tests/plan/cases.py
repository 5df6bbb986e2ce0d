"""Plans in one line."""

from mla.plan import Plan, Question, get_hardware, load_shape, make_plan


def plan(
    model: str, hardware: str = "h100", *, context: int = 4096, rank: int | None = None, **question
) -> Plan:
    """A plan for a known model or a path."""
    shape = load_shape(str(model), rank=rank)
    return make_plan(shape, get_hardware(hardware), Question(context=context, **question))
