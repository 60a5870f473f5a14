"""Devices and nodes as a launcher decided them: torchrun, srun, or one command on each host.

    torchrun --nproc_per_node 8 [--nnodes 2 ...] main.py ...        devices and nodes follow torchrun
    srun python main.py ...                                         devices and nodes follow the allocation
    MASTER_ADDR=HOST MASTER_PORT=29500 NODE_RANK=0 python main.py --devices 8 --num_nodes 2 ...    one command a host

Flags may repeat the launcher's numbers but not contradict them; those of a config, which may come from a run on other
machines, are replaced.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ldm.errors import UserError

_INTERACTIVE = ("bash", "interactive")  # names of SLURM jobs in which processes are started by hand
_BY_HAND = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK")


@dataclass(frozen=True)
class Launch:
    """Number of processes on each node (one a device) and of nodes, as a launcher started them."""

    launcher: str
    per_node: int
    nodes: int

    def check(self, devices: int | None, nodes: int | None) -> None:
        """Raise UserError for flags (None: not given) that contradict the launcher."""
        said = f"{self.launcher} started {self.per_node} processes on each of {self.nodes} nodes"
        if devices is not None and devices != self.per_node:
            raise UserError(f"--devices: {said}, but {devices} devices are asked for; drop the flag or start as many")
        if nodes is not None and nodes != self.nodes:
            raise UserError(f"--num_nodes: {said}, but {nodes} nodes are asked for; drop the flag or start as many")


def detect(environment: Mapping[str, str]) -> Launch | None:
    """Return what a launcher wrote into the environment, None without one. Raises UserError if it is inconsistent."""
    if "TORCHELASTIC_RUN_ID" in environment:
        world, per_node = _number(environment, "WORLD_SIZE"), _number(environment, "LOCAL_WORLD_SIZE")
        if world % per_node:
            raise UserError(f"torchrun: {world} processes on nodes of {per_node}; start as many on every node")
        return Launch("torchrun", per_node, world // per_node)
    if "SLURM_NTASKS" in environment and environment.get("SLURM_JOB_NAME") not in _INTERACTIVE:
        return _slurm(environment)
    return None


def _slurm(environment: Mapping[str, str]) -> Launch | None:
    tasks = _number(environment, "SLURM_NTASKS")
    if tasks == 1:
        return None
    nodes = _number(environment, "SLURM_NNODES")
    if "SLURM_STEP_ID" not in environment:
        raise UserError(
            f"SLURM: {tasks} tasks are allocated, but nothing started them; write `srun python main.py ...`"
        )
    if "SLURM_NTASKS_PER_NODE" not in environment:
        raise UserError("SLURM: --ntasks alone may spread unevenly; allocate with --nodes and --ntasks-per-node")
    per_node = _number(environment, "SLURM_NTASKS_PER_NODE")
    if per_node * nodes != tasks:
        raise UserError(
            f"SLURM: {tasks} tasks are not {nodes} nodes x {per_node} tasks; set --ntasks-per-node, no --ntasks"
        )
    return Launch("srun", per_node, nodes)


def check_by_hand(environment: Mapping[str, str], nodes: int) -> None:
    """Raise UserError if there are several nodes and the environment does not name the first and the rank of this."""
    if nodes == 1:
        return
    absent = [name for name in _BY_HAND if name not in environment]
    if absent:
        raise UserError(
            f"--num_nodes {nodes}: set {', '.join(absent)} on every host (or start with torchrun or srun); "
            "MASTER_ADDR and MASTER_PORT are those of the first, NODE_RANK counts the hosts from 0"
        )
    rank = environment["NODE_RANK"]
    if not rank.isdigit() or int(rank) >= nodes:
        raise UserError(f"NODE_RANK: '{rank}' is none of 0 to {nodes - 1} (--num_nodes {nodes})")


def _number(environment: Mapping[str, str], name: str) -> int:
    text = environment.get(name, "")
    if not text.isdigit() or int(text) < 1:
        raise UserError(f"{name}: '{text}' in the environment is no number of processes or nodes")
    return int(text)
