"""Without vLLM. With it: tests/vllm, run by `make test-vllm`."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

from sublim_plugin.core.errors import MissingDependencyError
from sublim_plugin.decoding.vllm_engine import ENVIRONMENT, VllmEngine


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed here")
def test_without_vllm_the_error_says_what_to_install(
    base_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ENVIRONMENT:
        monkeypatch.setenv(name, os.environ.get(name, ""))
    with pytest.raises(MissingDependencyError, match="pip install vllm"):
        VllmEngine(base_model, end_ids=(2,), batch_size=1)
