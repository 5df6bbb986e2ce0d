"""These tests run where vLLM is installed: ``make vllm``."""

import pytest


@pytest.fixture(scope="session", autouse=True)
def vllm():
    return pytest.importorskip("vllm")
