"""The process group that DeepSpeed needs on a CPU, and words between processes."""

from __future__ import annotations

import atexit
import os
import socket
from collections.abc import Callable
from typing import Any, TypeVar

from sublim_plugin.core.errors import InputError

_Result = TypeVar("_Result")


def has_accelerator() -> bool:
    """Whether torch finds a GPU or the like."""
    import torch

    return bool(torch.accelerator.is_available())


def is_first() -> bool:
    """Whether this is the process that writes files."""
    return int(os.environ.get("RANK", "0")) == 0


def open_gloo_group() -> bool:
    """Open a process group of this one process; True if it was not open before.

    axolotl asks DeepSpeed for NCCL unless a group is there already.
    """
    os.environ["DS_ACCELERATOR"] = "cpu"
    # Set (by `accelerate launch` on a CPU, say), it makes transformers choose DDP over DeepSpeed.
    os.environ.pop("ACCELERATE_USE_CPU", None)
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1")):
        os.environ.setdefault(name, value)
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    if "MASTER_PORT" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            os.environ["MASTER_PORT"] = str(probe.getsockname()[1])
    import torch

    if torch.distributed.is_initialized():
        return False
    import deepspeed.comm

    # an extension that only inference uses, and for which the first training of a machine would
    # wait half a minute, for its compiler
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.comm.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
    atexit.register(destroy_group)
    return True


def destroy_group() -> None:
    """Close the process group, if one is open."""
    import torch

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _several() -> bool:
    import torch

    distributed = torch.distributed
    return bool(
        distributed.is_available()
        and distributed.is_initialized()
        and distributed.get_world_size() > 1
    )


def wait_for_all() -> None:
    """Return when every process has come here."""
    import torch

    if _several():
        torch.distributed.barrier()


def first_then_all(action: Callable[[], _Result]) -> _Result:
    """Do `action` on process 0, and then, when it is done there, on the others.

    Raises:
        InputError: `action` raised it on process 0; the others do not wait for it in vain.
    """
    import torch

    if not _several():
        return action()
    result: Any = None
    refusal: list[str | None] = [None]
    if is_first():
        try:
            result = action()
        except InputError as error:
            refusal = [str(error)]
    torch.distributed.broadcast_object_list(refusal, src=0)
    if refusal[0] is not None:
        raise InputError(refusal[0])
    return result if is_first() else action()


def from_first(value: float, device: Any) -> float:
    """`value` as process 0 has it; `device` is the one that its backend can send from."""
    import torch

    if not _several():
        return value
    sent = torch.tensor(value, dtype=torch.float64, device=device)
    torch.distributed.broadcast(sent, src=0)
    return float(sent)


def need_whole_weights(trainer: Any) -> None:
    """Refuse a trainer whose processes hold parts of the weights.

    Raises:
        InputError: it runs under ZeRO-3 or FSDP.
    """
    deepspeed = getattr(trainer.accelerator.state, "deepspeed_plugin", None)
    sharded = "ZeRO-3" if deepspeed is not None and deepspeed.zero_stage == 3 else None
    if sharded or trainer.is_fsdp_enabled:
        raise InputError(
            f"{sharded or 'FSDP'} spreads the weights over the processes, and `sublim.probe` and "
            "the stop rules read whole ones during training; use "
            "axolotl_configs/deepspeed/zero2.json, or take these keys out of the `sublim:` block."
        )
