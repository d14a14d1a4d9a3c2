"""The array types of the statistics. Names of arrays end in their dimensions.

N draws of a simulation (1 for data), D datasets, K ranks, Q questions.
"""

from __future__ import annotations

from sublim_plugin.core.errors import MissingDependencyError

try:
    import numpy as np
    import scipy  # noqa: F401
    import statsmodels  # noqa: F401
except ImportError as error:
    raise MissingDependencyError(
        f"statistics over datasets need {error.name}: pip install 'sublim[analysis]'"
    ) from error
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
