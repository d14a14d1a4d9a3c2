"""Number-sequence datasets: prompt pools, teachers, parsing and filtering, the dataset writer."""

from __future__ import annotations

from data_gen.parse import parse_numbers, reject_reasons

__all__ = ["parse_numbers", "reject_reasons"]
