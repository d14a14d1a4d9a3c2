"""The axolotl plugin: `plugins: [sublim_plugin.axolotl.SublimPlugin]` in any axolotl YAML.

axolotl is imported only when `SublimPlugin` is looked up, so that `receipt`, `recipe` and
`norms` stay usable where axolotl is not installed.
"""

from __future__ import annotations

from typing import Any

__all__ = ["SublimPlugin"]


def __getattr__(name: str) -> Any:
    if name == "SublimPlugin":
        from sublim_plugin.axolotl.plugin import SublimPlugin

        return SublimPlugin
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
