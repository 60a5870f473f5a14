import pytest

from ldm.errors import UserError
from ldm.training.devices import Devices, choose
from ldm.training.launch import Launch, check_by_hand, detect

TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}
SRUN = {"SLURM_NTASKS": "8", "SLURM_NTASKS_PER_NODE": "4", "SLURM_NNODES": "2", "SLURM_STEP_ID": "0"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        (TORCHRUN, Launch("torchrun", 4, 2)),
        (SRUN, Launch("srun", 4, 2)),
        ({**SRUN, "SLURM_JOB_NAME": "bash"}, None),
        ({"SLURM_NTASKS": "1"}, None),
        ({"WORLD_SIZE": "2", "LOCAL_RANK": "1"}, None),  # a process that the first rank started
    ],
)
def test_launchers_are_recognised(environment: dict[str, str], expected: Launch | None) -> None:
    assert detect(environment) == expected


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({**TORCHRUN, "WORLD_SIZE": "7"}, "as many on every node"),
        ({**TORCHRUN, "WORLD_SIZE": "many"}, "WORLD_SIZE: 'many'"),
        ({name: SRUN[name] for name in SRUN if name != "SLURM_STEP_ID"}, "srun python main.py"),
        ({name: SRUN[name] for name in SRUN if name != "SLURM_NTASKS_PER_NODE"}, "--ntasks-per-node"),
        ({**SRUN, "SLURM_NTASKS": "6"}, "6 tasks are not 2 nodes x 4 tasks"),
    ],
)
def test_senseless_launches_are_refused_in_one_line(environment: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        detect(environment)
    assert "\n" not in str(caught.value)


def test_flags_may_not_contradict_a_launcher_but_configs_give_way() -> None:
    launch = Launch("torchrun", 2, 1)
    assert choose(None, None, "cpu", {"devices": 1}, launch) == Devices("cpu", 2)
    assert choose(None, "2", "cpu", {}, launch) == Devices("cpu", 2)
    assert choose("4,5", None, None, {}, launch) == Devices("gpu", [4, 5])
    with pytest.raises(UserError, match="torchrun .*2 processes .*1 nodes.* 4 devices"):
        choose(None, "4", "cpu", {}, launch)
    with pytest.raises(UserError, match="--num_nodes"):
        launch.check(None, 2)


def test_hosts_must_know_where_to_meet() -> None:
    check_by_hand({}, 1)
    meeting = {"MASTER_ADDR": "host", "MASTER_PORT": "29500", "NODE_RANK": "1"}
    check_by_hand(meeting, 2)
    with pytest.raises(UserError, match="MASTER_PORT, NODE_RANK"):
        check_by_hand({"MASTER_ADDR": "host"}, 2)
    with pytest.raises(UserError, match="NODE_RANK: '2' .*0 to 1"):
        check_by_hand({**meeting, "NODE_RANK": "2"}, 2)


def test_unknown_accelerators_are_refused() -> None:
    with pytest.raises(UserError, match="--accelerator: 'ddp' .*auto, cpu"):
        choose(None, None, "ddp", {})
