"""P0: which rank this process is, read from whatever started it, and the environment a launcher gives to a rank."""
from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from pyfleet.config import CONFIG_VARIABLE, OVERRIDES_VARIABLE, environment
from pyfleet.errors import ConfigError

DEFAULT_PORT = 29500        # torch.distributed's own default

Environ = Mapping[str, str]


@dataclass(frozen=True)
class Placement:
    """Where this process stands among the ranks, as far as its launcher said; None where it did not say.

    Attributes:
        rendezvous: where the ranks meet. file:///dir: a private directory of this host; tcp://host:port: rank 0 listens
                    there; torch://host:port: a torch TCPStore of the launcher listens there already. None: not said.
        source:     what said so: arguments, pyfleet, torchrun, openmpi, slurm, pmi, mvapich2, kubernetes or alone.
    """

    rank: int
    world_size: int
    local_rank: int | None = None
    local_world_size: int | None = None
    node_rank: int | None = None
    master_addr: str | None = None
    master_port: int = DEFAULT_PORT
    rendezvous: str | None = None
    source: str = "alone"


# --- how values are written ---------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Found:
    """A value and the variable it stood in."""

    variable: str
    text: str


Read = Callable[[Environ], Found | None]


def _var(*names: str) -> Read:
    """The first of these variables that is set and not empty."""
    def read(environ: Environ) -> Found | None:
        return next((Found(name, environ[name]) for name in names if environ.get(name)), None)
    return read


def _ordinal(*names: str) -> Read:
    """As _var, and a pod's name stands for its ordinal: trainer-7 is 7."""
    def read(environ: Environ) -> Found | None:
        found = _var(*names)(environ)
        pod = found and re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.-]*-(\d+)", found.text)
        return Found(found.variable, pod[1]) if pod else found
    return read


_UNSAID, _ADDR, _PORT = _var(), _var("MASTER_ADDR"), _var("MASTER_PORT")


def _pod_rank(environ: Environ) -> Found | None:
    """The completion index of an indexed Job; else a StatefulSet pod's ordinal, where WORLD_SIZE says there are others."""
    index = _var("JOB_COMPLETION_INDEX")(environ)
    if index or not _var("WORLD_SIZE")(environ):
        return index
    pod = _ordinal("HOSTNAME")(environ)
    return pod if pod and pod.text.isdigit() else None


def first_host(nodelist: str) -> str:
    """The first host of a Slurm nodelist: 'rack[1-2]n[03,07],login' is rack1n03."""
    first = re.split(r",(?![^\[]*\])", nodelist.strip(), maxsplit=1)[0]
    return re.sub(r"\[([^\]]*)\]", lambda ranges: re.split(r"[,-]", ranges[1], maxsplit=1)[0], first)


def _slurm_host(environ: Environ) -> Found | None:
    found = _var("MASTER_ADDR", "SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST")(environ)
    return Found(found.variable, first_host(found.text)) if found and found.variable != "MASTER_ADDR" else found


def _slurm_port(environ: Environ) -> Found | None:
    """Lightning's rule, so that both meet: 15000 and the last four digits of the job's number."""
    found = _var("MASTER_PORT")(environ)
    job = _var("SLURM_JOB_ID", "SLURM_JOBID")(environ)
    if found or not job:
        return found
    return Found(job.variable, str(15000 + int(job.text[-4:])) if job.text[-4:].isdigit() else job.text)


def _slurm_tasks_here(environ: Environ) -> Found | None:
    """This node's entry of '2(x3),1', by SLURM_NODEID."""
    found = _var("SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE", "SLURM_NTASKS_PER_NODE")(environ)
    if not found or found.text.isdigit():
        return found
    counts = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", found.text):
        counts += [count] * int(times or 1)
    node = environ.get("SLURM_NODEID", "")
    return Found(found.variable, counts[int(node)]) if node.isdigit() and int(node) < len(counts) else None


def _slurm_started(environ: Environ) -> bool:
    """Whether srun started this very process, and not a shell or a mpirun inside an allocation."""
    size = _var("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS")(environ)
    by_mpi = _var("PMI_RANK", "MV2_COMM_WORLD_RANK")(environ)
    return (bool(size) and size.text != "1" and environ.get("SLURM_JOB_NAME") not in ("bash", "interactive")
            and (by_mpi is None or by_mpi.text == environ.get("SLURM_PROCID")))


def _always(environ: Environ) -> bool:
    return True


@dataclass(frozen=True)
class Row:
    """One launcher's names for the same facts; it applies when its rank is there and `when` agrees."""

    source: str
    rank: Read
    size: Read
    local_rank: Read = _UNSAID
    local_size: Read = _UNSAID
    node_rank: Read = _UNSAID
    addr: Read = _ADDR
    port: Read = _PORT
    needs_addr: bool = False
    size_name: str = "WORLD_SIZE"
    when: Callable[[Environ], bool] = _always


# First match wins. An mpirun inside a Slurm allocation inherits SLURM_PROCID from the daemon that srun started for it,
# so Open MPI stands before Slurm; srun with PMI sets both alike, and only Slurm's row knows where to meet.
LAUNCHERS = (
    Row("pyfleet", _ordinal("PYFLEET_RANK"), _var("PYFLEET_WORLD_SIZE"), _var("PYFLEET_LOCAL_RANK"),
        _var("PYFLEET_LOCAL_WORLD_SIZE"), _var("PYFLEET_NODE_RANK"), _var("PYFLEET_MASTER_ADDR", "MASTER_ADDR"),
        _var("PYFLEET_MASTER_PORT", "MASTER_PORT"), needs_addr=True, size_name="PYFLEET_WORLD_SIZE"),
    Row("torchrun", _ordinal("RANK"), _var("WORLD_SIZE"), _var("LOCAL_RANK"), _var("LOCAL_WORLD_SIZE"),
        _var("GROUP_RANK", "NODE_RANK"), needs_addr=True),
    Row("openmpi", _var("OMPI_COMM_WORLD_RANK"), _var("OMPI_COMM_WORLD_SIZE"), _var("OMPI_COMM_WORLD_LOCAL_RANK"),
        _var("OMPI_COMM_WORLD_LOCAL_SIZE"), size_name="OMPI_COMM_WORLD_SIZE"),
    Row("slurm", _var("SLURM_PROCID"), _var("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"), _var("SLURM_LOCALID"),
        _slurm_tasks_here, _var("SLURM_NODEID"), _slurm_host, _slurm_port, needs_addr=True, size_name="SLURM_NTASKS",
        when=_slurm_started),
    Row("pmi", _var("PMI_RANK"), _var("PMI_SIZE"), _var("MPI_LOCALRANKID"), _var("MPI_LOCALNRANKS"),
        size_name="PMI_SIZE"),
    Row("mvapich2", _var("MV2_COMM_WORLD_RANK"), _var("MV2_COMM_WORLD_SIZE"), _var("MV2_COMM_WORLD_LOCAL_RANK"),
        _var("MV2_COMM_WORLD_LOCAL_SIZE"), size_name="MV2_COMM_WORLD_SIZE"),
    Row("kubernetes", _pod_rank, _var("WORLD_SIZE"), lambda environ: Found("", "0"), lambda environ: Found("", "1"),
        _pod_rank, needs_addr=True),
)


def placement(rank: int | None = None, world_size: int | None = None, environ: Environ | None = None) -> Placement:
    """This process's place: from the arguments, else from the first launcher of LAUNCHERS that set one, else alone.

    Raises:  ConfigError naming the variable: a rank without a size or the reverse, a number that is none, a rank outside
             the size, no address to meet at. Open MPI, PMI and MVAPICH2 give no address: rendezvous may be None then, as
             it may when rank and size are arguments.
    """
    environ = environment() if environ is None else environ
    if rank is not None or world_size is not None:
        if rank is None or world_size is None:
            raise ConfigError("rank and world_size go together: give both, or neither")
        given = Row("arguments", lambda _: Found("rank", str(rank)), lambda _: Found("world_size", str(world_size)),
                    addr=_var("PYFLEET_MASTER_ADDR", "MASTER_ADDR"), port=_var("PYFLEET_MASTER_PORT", "MASTER_PORT"))
        return _place(given, environ)
    for row in LAUNCHERS:
        if row.rank(environ) and row.when(environ):
            return _place(row, environ)
    for name in ("PYFLEET_WORLD_SIZE", "WORLD_SIZE"):
        size = _var(name)(environ)
        if size and _number(size) > 1:
            raise ConfigError(f"{name} is {size.text}, but {name.replace('WORLD_SIZE', 'RANK')} is not set")
    return Placement(0, 1, 0, 1, 0)


def _place(row: Row, environ: Environ) -> Placement:
    rank, size = row.rank(environ), row.size(environ)
    if size is None:
        raise ConfigError(f"{rank.variable} is {rank.text}, but {row.size_name} is not set")
    place, world = _number(rank), _number(size, low=1)
    if place >= world:
        raise ConfigError(f"{rank.variable} is {place}, which is not below {size.variable}, {world}")
    local, local_size = (found and _number(found) for found in (row.local_rank(environ), row.local_size(environ)))
    if local is not None and local_size is not None and local >= local_size:
        raise ConfigError(f"{row.local_rank(environ).variable} is {local}, which is not below "
                          f"{row.local_size(environ).variable}, {local_size}")
    if world == 1:
        local, local_size = 0, 1
    node, addr, port = row.node_rank(environ), row.addr(environ), row.port(environ)
    port = DEFAULT_PORT if port is None else _number(port, high=65535)
    meeting = _meeting(environ, addr and addr.text, port, world)
    if row.needs_addr and world > 1 and meeting is None:
        raise ConfigError(f"MASTER_ADDR is not set, and {size.variable} is {world}: "
                          f"set it to an address of rank 0's machine that the others reach")
    return Placement(place, world, local, local_size, node and _number(node), addr and addr.text, port, meeting, row.source)


def _meeting(environ: Environ, addr: str | None, port: int, world: int) -> str | None:
    said = environ.get("PYFLEET_RENDEZVOUS")
    if said or addr is None or world == 1:
        return said or None
    scheme = "torch" if environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else "tcp"
    return f"{scheme}://[{addr}]:{port}" if ":" in addr else f"{scheme}://{addr}:{port}"


def _number(found: Found, low: int = 0, high: int | None = None) -> int:
    try:
        value = int(found.text)
    except ValueError:
        raise ConfigError(f"{found.variable} must be an integer, got {found.text!r}") from None
    if value < low or (high is not None and value > high):
        limit = f"at least {low}" if high is None else f"from {low} to {high}"
        raise ConfigError(f"{found.variable} must be {limit}, got {value}")
    return value


# --- what a launcher sets -----------------------------------------------------------------------------------------

def num_cores() -> int:
    """The processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def settings_environment(config_path: str | None, overrides: Iterable[str]) -> dict[str, str]:
    """The variables that hand a file of settings, and overrides, to another process."""
    values, overrides = {}, list(overrides)
    if config_path is not None:
        values[CONFIG_VARIABLE] = os.path.abspath(config_path)
    if overrides:
        values[OVERRIDES_VARIABLE] = json.dumps(overrides)
    return values


def launch_environment(
    place: Placement,
    *,
    run_id: str,
    config_path: str | None = None,
    overrides: Iterable[str] = (),
    num_nodes: int | None = None,
    environ: Environ | None = None,
) -> dict[str, str]:
    """The variables that tell a rank its place, for pyfleet and, in torchrun's names, for every framework.

    Args:    place: with local_rank, local_world_size, node_rank and master_addr filled in.
             num_nodes: how many machines there are; None: as many as have ranks when all have as many as this one.
             environ: what the rank inherits, to leave alone what the user has set (OMP_NUM_THREADS, PYTHONUNBUFFERED).
    """
    environ = environment() if environ is None else environ
    values = {
        "PYFLEET_RANK": place.rank, "PYFLEET_WORLD_SIZE": place.world_size,
        "PYFLEET_LOCAL_RANK": place.local_rank, "PYFLEET_LOCAL_WORLD_SIZE": place.local_world_size,
        "PYFLEET_NODE_RANK": place.node_rank,
        "RANK": place.rank, "WORLD_SIZE": place.world_size,
        "LOCAL_RANK": place.local_rank, "LOCAL_WORLD_SIZE": place.local_world_size,
        "GROUP_RANK": place.node_rank, "GROUP_WORLD_SIZE": num_nodes or place.world_size // place.local_world_size,
        "ROLE_RANK": place.rank, "ROLE_WORLD_SIZE": place.world_size, "ROLE_NAME": "default",
        "MASTER_ADDR": place.master_addr, "MASTER_PORT": place.master_port,
        "TORCHELASTIC_RUN_ID": run_id, "TORCHELASTIC_RESTART_COUNT": 0, "TORCHELASTIC_MAX_RESTARTS": 0,
        "TORCHELASTIC_USE_AGENT_STORE": False,      # nobody listens on MASTER_PORT yet: rank 0 may
    }
    if place.rendezvous:
        values["PYFLEET_RENDEZVOUS"] = place.rendezvous
    values |= settings_environment(config_path, overrides)
    unless_set = {"OMP_NUM_THREADS": max(1, num_cores() // place.local_world_size), "PYTHONUNBUFFERED": 1}
    values.update((name, value) for name, value in unless_set.items() if not environ.get(name))
    return {name: str(value) for name, value in values.items()}
