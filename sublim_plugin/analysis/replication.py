"""Datasets are the unit of replication: how many an interval or a test needs."""

from __future__ import annotations

MIN_DATASETS = 3
"""Below this no interval over datasets is drawn: with 2, Student's t at 95% is 12.7."""


def too_few_datasets(n_datasets: int) -> str:
    """Why no interval over datasets is given, or "" if there is one."""
    if n_datasets >= MIN_DATASETS:
        return ""
    plural = "dataset" if n_datasets == 1 else "datasets"
    return f"{n_datasets} {plural}, at least {MIN_DATASETS} are needed"
