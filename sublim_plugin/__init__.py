"""sublim: subliminal-learning studies on axolotl and lm-evaluation-harness."""

__version__ = "0.1.0"
