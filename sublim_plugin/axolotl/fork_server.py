"""What multiprocessing's fork server imports first: from then on it dies with whom it serves.

By itself it would notice that only after its last import, some seconds later.
"""

from __future__ import annotations

import gc
import os

from sublim_plugin.core.processes import die_with

die_with(os.getppid())
gc.disable()  # a fifth of the imports' time, for next to nothing; each child turns it on again
