"""Run a program several times from one process that has imported everything: each rank of each run is a fork of it.

python forked_runs.py '[{"world": 2, "program": "train", "arguments": [...]}, ...]'

The programs are train, the default, and evaluate; the ranks find what torchrun would tell them.
"""

import json
import os
import socket
import sys
import traceback

import torch

from ldm.cli import evaluate, train

PROGRAMS = {"train": train.main, "evaluate": evaluate.main}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(rank: int, world: int, port: int, program: str, arguments: list[str]) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        torch.set_num_threads(1)
        numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "GROUP_RANK": 0}
        told = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test", **numbers}
        os.environ |= {name: str(value) for name, value in told.items()} if world > 1 else {}
        status = PROGRAMS[program](arguments) or 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    for job in json.loads(sys.argv[1]):
        port = free_port()
        program, world = job.get("program", "train"), job["world"]
        ranks = [start(rank, world, port, program, job["arguments"]) for rank in range(world)]
        if any([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in ranks]):
            raise SystemExit(f"failed: {job}")
