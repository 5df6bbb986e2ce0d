"""Conversion of Llama-type models (MHA, GQA, MQA) to Multi-head Latent Attention, level 5 of the ladder."""

from mla.convert.check import check_convertible
from mla.convert.pipeline import convert
from mla.convert.saving import check_output, save
from mla.convert.text import calibration_text, tokenize_windows

__all__ = [
    "calibration_text",
    "check_convertible",
    "check_output",
    "convert",
    "save",
    "tokenize_windows",
]
