"""Explain and plan: cache, operations, bytes moved, roofline, from a config.json, without torch."""

from mla.plan.formulas import Figure, Formula
from mla.plan.hardware import Hardware, all_hardware, get_hardware
from mla.plan.known import known_hardware, known_models, load_shape
from mla.plan.planner import FORMATS, Plan, Question, make_plan
from mla.plan.shape import Shape, read_shape
from mla.plan.weight_format import WEIGHT_BYTES

__all__ = [
    "FORMATS",
    "WEIGHT_BYTES",
    "Figure",
    "Formula",
    "Hardware",
    "Plan",
    "Question",
    "Shape",
    "all_hardware",
    "get_hardware",
    "known_hardware",
    "known_models",
    "load_shape",
    "make_plan",
    "read_shape",
]
