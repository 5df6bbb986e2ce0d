"""Conversion of Llama-type models (MHA, GQA, MQA) to Multi-head Latent Attention, level 5 of the ladder."""

from mla.convert.check import check_convertible
from mla.convert.pipeline import budget_for, calibration_size, convert
from mla.convert.run import run
from mla.convert.saving import check_output, exclusive, save
from mla.convert.text import tokenize_windows, write_windows
from mla.convert.workspace import Request, check_request, holds_windows, read_texts, workspace

__all__ = [
    "Request",
    "budget_for",
    "calibration_size",
    "check_convertible",
    "check_output",
    "check_request",
    "convert",
    "exclusive",
    "holds_windows",
    "read_texts",
    "run",
    "save",
    "tokenize_windows",
    "workspace",
    "write_windows",
]
