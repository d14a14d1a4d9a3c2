"""The array types of the statistics. Names of arrays end in their dimensions.

N draws of a simulation (1 for data), D datasets, K ranks, Q questions.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

MIN_DATASETS = 3
"""Below this no interval or test over datasets is given: with 2, Student's t at 95% is 12.7."""


def too_few_datasets(n_datasets: int) -> str:
    """Why no interval over datasets is given, or "" if there is one."""
    if n_datasets >= MIN_DATASETS:
        return ""
    plural = "dataset" if n_datasets == 1 else "datasets"
    return f"{n_datasets} {plural}, at least {MIN_DATASETS} are needed"
