"""A question and its answer: model, machine, context and batch in; every figure out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from mla.errors import MLAError
from mla.formats import CACHE_FORMATS, CacheFormat
from mla.plan.formulas import Figure, Values
from mla.plan.hardware import Hardware
from mla.plan.shape import Shape
from mla.plan.steps import SHEET
from mla.plan.weight_format import WEIGHT_BYTES
from mla.reading import expect_int

#: Formats of ``--cache-format``: those of the cache, and FlashMLA's fp8 layout, an fp32 scale for every 128
#: numbers.
FORMATS: Mapping[str, CacheFormat] = MappingProxyType({**CACHE_FORMATS, "fp8": CacheFormat(1, 2, 1, 4, 128)})


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is asked. ``context`` t tokens per sequence, ``batch`` b sequences, ``query_tokens`` s of each.

    ``memory`` in bytes replaces the hardware's; ``weight_format`` None keeps the model's own.
    """

    context: int
    batch: int = 1
    query_tokens: int = 1
    cache_format: str = "bf16"
    weight_format: str | None = None
    tensor_parallel: int = 1
    memory: float | None = None


@dataclass(frozen=True)
class Plan:
    """A model on a machine under a question: ``plan["step_time_mla"]``, ``plan.figure("step_time_mla")``."""

    shape: Shape
    hardware: Hardware
    question: Question
    values: Values

    def __getitem__(self, name: str) -> float:
        formula = SHEET.formulas.get(name)
        return self.values.value(name, 0 if formula and formula.layer else None)

    @property
    def weight_words(self) -> str:
        """The number format of the weights, or the two."""
        experts, others = weight_formats(self.shape, self.question)
        return experts if experts == others else f"{others} with experts in {experts}"

    def figure(self, name: str) -> Figure:
        """One figure with its formula, the numbers put in, unit and source."""
        return self.values.figure(name)

    def figures(self) -> list[Figure]:
        """Every figure; those of a layer for the model's main group of layers."""
        return [self.values.figure(name) for name in SHEET.formulas]


def weight_formats(shape: Shape, question: Question) -> tuple[str, str]:
    """Formats of the routed experts and of all other weights: the model's, or the one that is asked for."""
    asked = question.weight_format
    return asked or shape.weight_format, asked or shape.other_format


def weight_peak(shape: Shape, question: Question, hardware: Hardware) -> float:
    """Operations/s with weights: of two formats, in that in which the machine is slower."""
    return min(map(hardware.peak, weight_formats(shape, question)))


def make_plan(shape: Shape, hardware: Hardware, question: Question) -> Plan:
    """The plan; figures are computed when they are asked for.

    Raises:
        MLAError: a number out of range, an unknown format, heads that cannot be split.
    """
    for name, value in (
        ("--context", question.context),
        ("--batch", question.batch),
        ("--query-tokens", question.query_tokens),
        ("--tensor-parallel", question.tensor_parallel),
    ):
        expect_int(name, value, least=1)
    if question.query_tokens > question.context:
        raise MLAError(
            f"--query-tokens: expected at most the context of {question.context}, got {question.query_tokens}"
        )
    if question.cache_format not in FORMATS:
        raise MLAError(f"--cache-format: expected one of {', '.join(FORMATS)}, got {question.cache_format!r}")
    experts, others = weight_formats(shape, question)
    for stored in (experts, others):
        if stored not in WEIGHT_BYTES:
            got = f"got {stored!r}"
            if not question.weight_format:
                got = f"config.json has {stored}: say which is nearest"
            raise MLAError(f"--weight-format: expected one of {', '.join(WEIGHT_BYTES)}; {got}")
    for group in shape.groups:
        if group["h"] % question.tensor_parallel:
            raise MLAError(
                f"--tensor-parallel: {int(group['h'])} heads cannot be split over "
                f"{question.tensor_parallel} devices"
            )
    cached = FORMATS[question.cache_format]
    inputs = {
        **shape.inputs,
        "t": question.context,
        "b": question.batch,
        "s": question.query_tokens,
        "devices": question.tensor_parallel,
        "number_bytes": cached.number,
        "rope_bytes": cached.rope,
        "index_number_bytes": cached.index,
        "scale_bytes": cached.scale,
        "scale_block": cached.block or 0,
        "row_multiple": cached.row_multiple,
        "state_bytes": 4,  # the recurrent state is kept in fp32 whatever the cache's format
        "conv_bytes": 2 if cached.number < 4 else 4,
        "activation_bytes": 2 if question.cache_format != "fp32" else 4,
        "weight_bytes": WEIGHT_BYTES[others],
        "expert_bytes": WEIGHT_BYTES[experts],
        "memory": hardware.memory if question.memory is None else question.memory,
        "bandwidth": hardware.bandwidth,
        "peak_weights": weight_peak(shape, question, hardware),
        "peak_attention": hardware.peak("fp32" if question.cache_format == "fp32" else "bf16"),
    }
    return Plan(shape, hardware, question, Values(SHEET, inputs, shape.groups))
