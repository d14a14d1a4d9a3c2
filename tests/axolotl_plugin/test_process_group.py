"""Words between two real processes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest

TALK = """
import torch
from sublim_plugin.axolotl.process_group import first_then_all, from_first, is_first, wait_for_all
from sublim_plugin.core.errors import InputError
torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
assert is_first() == (rank == 0)
wait_for_all()
did = []
assert first_then_all(lambda: did.append(rank) or rank) == rank and did == [rank]


def refused():
    if rank == 0:
        raise InputError("no such checkpoint")
    raise AssertionError("the first refused, so the others do not begin")


try:
    first_then_all(refused)
except InputError as error:
    assert str(error) == "no such checkpoint"
else:
    raise AssertionError("nothing was refused")
print(from_first(rank + 0.1, "cpu"))
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_every_process_hears_the_first() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    talkers = [
        subprocess.Popen(
            [sys.executable, "-c", TALK],
            env=os.environ | group | {"RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    assert [talker.communicate(timeout=120)[0].split()[-1] for talker in talkers] == ["0.1", "0.1"]
