"""Conversion of Llama-type models (MHA, GQA, MQA) to Multi-head Latent Attention, level 5 of the ladder."""

from mla.convert.check import check_convertible
from mla.convert.pipeline import budget_for, calibration_size, convert
from mla.convert.run import Request, run, workspace
from mla.convert.saving import check_output, save
from mla.convert.text import tokenize_windows, write_windows

__all__ = [
    "Request",
    "budget_for",
    "calibration_size",
    "check_convertible",
    "check_output",
    "convert",
    "run",
    "save",
    "tokenize_windows",
    "workspace",
    "write_windows",
]
