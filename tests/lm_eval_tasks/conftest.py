"""The toy base and adapter are those of tests/preference."""

from __future__ import annotations

import importlib.util
from pathlib import Path

_path = Path(__file__).parents[1] / "preference" / "conftest.py"
_spec = importlib.util.spec_from_file_location("toy_models", _path)
assert _spec is not None and _spec.loader is not None
_module = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_module)
toy_base, toy_adapter = _module.toy_base, _module.toy_adapter
