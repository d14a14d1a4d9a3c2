"""axolotl in processes that are forked from one that has imported it.

axolotl's imports take longer than a small training. multiprocessing's fork server imports them
once, never runs anything of them itself, and each training begins as a copy of it. Not for GPUs:
a process that was forked after CUDA was looked at cannot use it.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from sublim_plugin.core.processes import die_with

PRELOADED = [
    "sublim_plugin.axolotl.fork_server",  # first: it ties the server to this process
    "axolotl.cli.main", "axolotl.cli.train", "axolotl.common.datasets", "axolotl.train",
    "axolotl.core.builders.causal", "axolotl.loaders", "axolotl.prompt_strategies.chat_template",
    "transformers.models.auto.modeling_auto", "transformers.models.llama.modeling_llama",
    "transformers.trainer", "peft.tuners.lora", "deepspeed", "sublim_plugin.axolotl.plugin",
]  # fmt: skip


class Forked:
    """A running training; as much of `subprocess.Popen` as `recipe.run_training` uses."""

    def __init__(
        self, command: Sequence[str], log: Path, environment: Mapping[str, str], cwd: Path
    ) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self._process = context.Process(
            target=_train,
            args=(list(command), str(log), dict(environment), str(cwd)),
            daemon=True,
        )
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self) -> int:
        self._process.join()
        code = self._process.exitcode
        assert code is not None
        return code


def _train(command: list[str], log: str, environment: dict[str, str], cwd: str) -> None:
    """In the forked process: `axolotl` with these arguments, as if started by itself."""
    os.setsid()
    die_with(os.getppid())
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND)
    for number in (1, 2):
        os.dup2(descriptor, number)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    import datasets.config

    # read when `datasets` was imported
    datasets.config.HF_DATASETS_CACHE = Path(environment["HF_DATASETS_CACHE"])
    multiprocessing.current_process().daemon = False  # it may have children, to tokenize
    # as in an axolotl that was started by itself: else each process that reads batches would come
    # from another fork server, which imports everything once more
    multiprocessing.set_start_method("fork", force=True)
    gc.freeze()  # what was imported stays, so that each of the hosts' collections need not look
    gc.enable()
    sys.argv = ["axolotl", *command]
    from axolotl.cli.main import main

    main()
