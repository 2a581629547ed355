"""Which rank a process is, under every launcher, and what a launcher tells its ranks."""
import dataclasses
import json

import pytest

from pyfleet.errors import ConfigError
from pyfleet.placement import Placement, first_host, launch_environment, placement

ADDR = {"MASTER_ADDR": "10.0.0.1"}
TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "GROUP_RANK": "1",
            "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1234"}
SLURM = {"SLURM_PROCID": "3", "SLURM_NTASKS": "5", "SLURM_LOCALID": "1", "SLURM_NODEID": "1",
         "SLURM_STEP_TASKS_PER_NODE": "2(x2),1", "SLURM_STEP_NODELIST": "gpu[07-09,12],login", "SLURM_JOB_ID": "9120034"}


def test_alone():
    assert placement(environ={}) == Placement(0, 1, 0, 1, 0, None, 29500, None, "alone")


@pytest.mark.feature("A26", "A27", "A28", "A29", "A30")
def test_torchrun_set():
    assert placement(environ=TORCHRUN) == Placement(5, 8, 1, 4, 1, "10.0.0.1", 1234, "tcp://10.0.0.1:1234", "torchrun")
    bare = {"RANK": "4", "WORLD_SIZE": "8", "MASTER_ADDR": "fe80::1"}
    assert placement(environ=bare) == Placement(4, 8, None, None, None, "fe80::1", 29500, "tcp://[fe80::1]:29500", "torchrun")


def test_an_agent_that_listens_on_the_master_port_is_told_apart():
    assert placement(environ=TORCHRUN | {"TORCHELASTIC_USE_AGENT_STORE": "True"}).rendezvous == "torch://10.0.0.1:1234"
    assert placement(environ=TORCHRUN | {"TORCHELASTIC_USE_AGENT_STORE": "False"}).rendezvous == "tcp://10.0.0.1:1234"


def test_own_variables_come_first():
    own = {"PYFLEET_RANK": "1", "PYFLEET_WORLD_SIZE": "2", "PYFLEET_LOCAL_RANK": "0", "PYFLEET_LOCAL_WORLD_SIZE": "1",
           "PYFLEET_NODE_RANK": "1", "PYFLEET_RENDEZVOUS": "file:///tmp/x"}
    assert placement(environ=own | TORCHRUN | SLURM) == Placement(
        1, 2, 0, 1, 1, "10.0.0.1", 1234, "file:///tmp/x", "pyfleet")
    assert placement(environ=own).rendezvous == "file:///tmp/x"
    del own["PYFLEET_RENDEZVOUS"]
    with pytest.raises(ConfigError, match="MASTER_ADDR is not set"):
        placement(environ=own)
    own |= {"PYFLEET_MASTER_ADDR": "h", "PYFLEET_MASTER_PORT": "7"}
    assert placement(environ=own | TORCHRUN).rendezvous == "tcp://h:7"


def test_slurm():
    assert placement(environ=SLURM) == Placement(3, 5, 1, 2, 1, "gpu07", 15034, "tcp://gpu07:15034", "slurm")
    assert placement(environ=SLURM | ADDR | {"MASTER_PORT": "9"}).rendezvous == "tcp://10.0.0.1:9"
    assert placement(environ=SLURM | {"SLURM_STEP_NUM_TASKS": "4"}).world_size == 4, "a step may be smaller than the job"
    assert placement(environ=SLURM | {"SLURM_PROCID": "4", "SLURM_NODEID": "2", "SLURM_LOCALID": "0"}).local_world_size == 1
    for no_step in ({"SLURM_NTASKS": "1"}, {"SLURM_JOB_NAME": "bash"}, {"SLURM_JOB_NAME": "interactive"}):
        assert placement(environ=SLURM | no_step).source == "alone"


@pytest.mark.parametrize("nodelist,first", [
    ("node1", "node1"), ("a,b,c", "a"), ("node[1-3]", "node1"), ("node[007,1-3],x", "node007"),
    ("rack[1-2]n[03,07],login", "rack1n03"), ("n[1-2].lan,b[3-4]", "n1.lan"), (" a-b-[12]\n", "a-b-12"),
])
def test_first_host_of_a_nodelist(nodelist, first):
    assert first_host(nodelist) == first


OMPI = {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
        "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "PMIX_RANK": "3"}
PMI = {"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
MV2 = {"MV2_COMM_WORLD_RANK": "3", "MV2_COMM_WORLD_SIZE": "4", "MV2_COMM_WORLD_LOCAL_RANK": "1",
       "MV2_COMM_WORLD_LOCAL_SIZE": "2"}


@pytest.mark.parametrize("environ,source", [(OMPI, "openmpi"), (PMI, "pmi"), (MV2, "mvapich2")])
def test_mpi_gives_ranks_but_no_address(environ, source):
    assert placement(environ=environ) == Placement(3, 4, 1, 2, None, None, 29500, None, source)
    assert placement(environ=environ | ADDR).rendezvous == "tcp://10.0.0.1:29500"


def test_mpirun_inside_a_slurm_allocation_is_mpi_and_srun_with_pmi_is_slurm():
    daemon = SLURM | {"SLURM_PROCID": "0"}      # of the step that started the daemon, not the rank
    assert placement(environ=daemon | OMPI).source == "openmpi"
    assert placement(environ=daemon | PMI).source == "pmi"
    assert placement(environ=SLURM | PMI | {"PMI_SIZE": "5"}).source == "slurm"


@pytest.mark.feature("C84")
@pytest.mark.parametrize("environ", [
    {"HOSTNAME": "trainer-7"}, {"HOSTNAME": "a.b-2-7"}, {"JOB_COMPLETION_INDEX": "7", "HOSTNAME": "job-9-xk2p"},
])
def test_kubernetes_rank_from_the_index_or_the_pods_name(environ):
    pods = {"WORLD_SIZE": "16", "MASTER_ADDR": "trainer-0.trainer"}
    assert placement(environ=pods | environ) == Placement(
        7, 16, 0, 1, 7, "trainer-0.trainer", 29500, "tcp://trainer-0.trainer:29500", "kubernetes")


@pytest.mark.feature("C84")
def test_kubernetes_rank_from_metadata_name():
    assert placement(environ=ADDR | {"RANK": "distributed-training-7", "WORLD_SIZE": "16"}).rank == 7


def test_a_host_name_alone_says_nothing():
    assert placement(environ={"HOSTNAME": "trainer-7"}).source == "alone"
    assert placement(environ={"HOSTNAME": "trainer-7", "WORLD_SIZE": ""}).source == "alone"


def test_one_rank_needs_no_address():
    assert placement(environ={"RANK": "0", "WORLD_SIZE": "1"}) == Placement(0, 1, 0, 1, None, source="torchrun")
    assert placement(environ={"WORLD_SIZE": "1", "RANK": ""}).source == "alone"


def test_arguments_win():
    assert placement(1, 3, environ=TORCHRUN) == Placement(
        1, 3, None, None, None, "10.0.0.1", 1234, "tcp://10.0.0.1:1234", "arguments")
    assert placement(0, 2, environ={}).rendezvous is None


@pytest.mark.feature("C7")
@pytest.mark.parametrize("rank,world_size,message", [
    (4, 4, "rank is 4, which is not below world_size, 4"), (-1, 4, "rank must be at least 0, got -1"),
    (0, 0, "world_size must be at least 1, got 0"), ("x", 2, "rank must be an integer, got 'x'"),
    (1.5, 2, "rank must be an integer, got '1.5'"), (None, 2, "go together"), (1, None, "go together"),
])
def test_arguments_that_make_no_sense(rank, world_size, message):
    with pytest.raises(ValueError, match=message):
        placement(rank, world_size, environ={})


@pytest.mark.feature("A2")
@pytest.mark.parametrize("change,message", [
    ({"WORLD_SIZE": ""}, "RANK is 5, but WORLD_SIZE is not set"),
    ({"RANK": ""}, "WORLD_SIZE is 8, but RANK is not set"),
    ({"RANK": "five"}, "RANK must be an integer, got 'five'"),
    ({"RANK": "-1"}, "RANK must be at least 0, got -1"),
    ({"RANK": "8"}, "RANK is 8, which is not below WORLD_SIZE, 8"),
    ({"WORLD_SIZE": "0"}, "WORLD_SIZE must be at least 1, got 0"),
    ({"WORLD_SIZE": "2.0"}, "WORLD_SIZE must be an integer, got '2.0'"),
    ({"LOCAL_RANK": "4"}, "LOCAL_RANK is 4, which is not below LOCAL_WORLD_SIZE, 4"),
    ({"LOCAL_RANK": "x"}, "LOCAL_RANK must be an integer, got 'x'"),
    ({"MASTER_PORT": "70000"}, "MASTER_PORT must be from 0 to 65535, got 70000"),
    ({"MASTER_PORT": "http"}, "MASTER_PORT must be an integer, got 'http'"),
    ({"MASTER_ADDR": ""}, "MASTER_ADDR is not set, and WORLD_SIZE is 8"),
])
def test_environments_that_make_no_sense_name_the_variable(change, message):
    with pytest.raises(ConfigError, match=f"^{message}"):
        placement(environ=TORCHRUN | change)


@pytest.mark.parametrize("environ,message", [
    ({"OMPI_COMM_WORLD_RANK": "1"}, "OMPI_COMM_WORLD_RANK is 1, but OMPI_COMM_WORLD_SIZE is not set"),
    ({"PMI_RANK": "1"}, "PMI_RANK is 1, but PMI_SIZE is not set"),
    ({"JOB_COMPLETION_INDEX": "1"}, "JOB_COMPLETION_INDEX is 1, but WORLD_SIZE is not set"),
    ({"PYFLEET_RANK": "1"}, "PYFLEET_RANK is 1, but PYFLEET_WORLD_SIZE is not set"),
    ({"PYFLEET_WORLD_SIZE": "3"}, "PYFLEET_WORLD_SIZE is 3, but PYFLEET_RANK is not set"),
    ({"HOSTNAME": "t-7", "WORLD_SIZE": "8"}, "MASTER_ADDR is not set, and WORLD_SIZE is 8"),
    ({"HOSTNAME": "t-9", "WORLD_SIZE": "8"}, "HOSTNAME is 9, which is not below WORLD_SIZE, 8"),
])
def test_other_launchers_errors(environ, message):
    with pytest.raises(ConfigError, match=f"^{message}"):
        placement(environ=environ)


def test_reads_the_process_environment_by_default(monkeypatch):
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("PYFLEET_RANK", raising=False)
    assert placement().rank == 5


PLACE = Placement(5, 8, 1, 4, 1, "127.0.0.1", 4321, "file:///tmp/meet", "pyfleet")


def test_launch_environment_is_read_back_as_it_was():
    assert placement(environ=launch_environment(PLACE, run_id="x", environ={})) == PLACE


def test_launch_environment_holds_the_whole_torchrun_set():
    environ = launch_environment(PLACE, run_id="job", environ={})
    for name in [name for name in environ if name.startswith("PYFLEET_")]:
        del environ[name]
    assert int(environ.pop("OMP_NUM_THREADS")) >= 1
    assert environ == {
        "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "GROUP_RANK": "1",
        "GROUP_WORLD_SIZE": "2", "ROLE_RANK": "5", "ROLE_WORLD_SIZE": "8", "ROLE_NAME": "default",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "4321", "TORCHELASTIC_RUN_ID": "job",
        "TORCHELASTIC_RESTART_COUNT": "0", "TORCHELASTIC_MAX_RESTARTS": "0", "TORCHELASTIC_USE_AGENT_STORE": "False",
        "PYTHONUNBUFFERED": "1",
    }
    torchrun_says = {name: value for name, value in environ.items()}
    assert placement(environ=torchrun_says) == dataclasses.replace(
        PLACE, rendezvous="tcp://127.0.0.1:4321", source="torchrun")


def test_launch_environment_leaves_alone_what_the_user_set():
    environ = launch_environment(PLACE, run_id="x", environ={"OMP_NUM_THREADS": "3", "PYTHONUNBUFFERED": "1"})
    assert "OMP_NUM_THREADS" not in environ
    assert "PYTHONUNBUFFERED" not in environ


def test_launch_environment_hands_over_the_settings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    environ = launch_environment(PLACE, run_id="x", config_path="a.yaml", overrides=["seed=1"], environ={})
    assert environ["PYFLEET_CONFIG"] == str(tmp_path / "a.yaml")
    assert json.loads(environ["PYFLEET_OVERRIDES"]) == ["seed=1"]
