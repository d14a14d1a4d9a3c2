"""Words between two real processes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest

TALK = """
import torch
from sublim_plugin.axolotl.process_group import from_first, is_first, wait_for_all
torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
assert is_first() == (rank == 0)
wait_for_all()
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
