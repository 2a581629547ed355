"""The contract over MPI: one mpirun per number of ranks runs all checks; here each is one test."""
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

import pyfleet
from pyfleet.config import ClusterConfig
from pyfleet.engines.mpi import MpiEngine
from pyfleet.placement import Placement
from pyfleet.testing import run_ranks
from tests.pyfleet.engines import contract
from tests.pyfleet.test_testing import digits_training, one_thread  # noqa: F401 a fixture
from tests.ranks import ROOT

pytest.importorskip("mpi4py")
needs_mpirun = pytest.mark.skipif(shutil.which("mpirun") is None, reason="there is no mpirun")


def mpirun(size, *command, **env):
    """(exit code, stdout, stderr) of a command in `size` ranks."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYFLEET_", "OMPI_", "PMI"))}
    end = subprocess.run(["mpirun", "-n", str(size), "--oversubscribe", "--allow-run-as-root", sys.executable, *command],
                         cwd=ROOT, text=True, capture_output=True, timeout=250, check=False,
                         env=kept | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | env)
    return end.returncode, end.stdout, end.stderr


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """reports(size): what the ranks of that launch wrote, and how it ended."""
    found = {}

    def get(size):
        if size not in found:
            folder = tmp_path_factory.mktemp("reports")
            code, _, problems = mpirun(size, "-m", "tests.pyfleet.engines.mpi_ranks", str(folder), PYFLEET_TIMEOUT="30")
            lines = [json.loads(line) for path in folder.iterdir() for line in path.read_text().splitlines()]
            found[size] = lines, f"mpirun ended with {code}: {problems[-2000:]}"
        return found[size]
    return get


@needs_mpirun
@pytest.mark.feature("P8")
@pytest.mark.parametrize(("size", "name"), sorted((size, name) for name, size in contract.CASES))
def test_engine(reports, size, name):
    lines, end = reports(size)
    failed = [line for line in lines if line.get("failed") == name]
    assert not failed, failed[0]["trace"]
    results = {line["rank"]: line["result"] for line in lines if line.get("passed") == name}
    assert sorted(results) == list(range(size)), end
    contract.judge(name, [results[rank] for rank in range(size)])


@needs_mpirun
@pytest.mark.parametrize("size", (2, 3))
def test_a_late_rank_ends_the_group_at_the_deadline(reports, size):
    lines, end = reports(size)
    results = {line["rank"]: line["result"] for line in lines if line.get("passed") == "late"}
    assert sorted(results) == list(range(size)), end
    for rank in range(size - 1):
        first, second, text, took = results[rank]
        assert (first, second) == ("Timeout", "Timeout")
        assert "dead since" in text
        assert 0.2 < took < 3


@needs_mpirun
def test_training_equals_that_of_threads(reports, one_thread):        # noqa: F811
    lines, end = reports(2)
    results = [line["result"] for line in lines if line.get("passed") == "training"]
    assert len(results) == 2, end
    losses, weights = run_ranks(digits_training, 2, 1)[0]
    for other_losses, other in results:
        np.testing.assert_allclose(other, weights, rtol=0, atol=1e-6)
        np.testing.assert_allclose(other_losses, losses, rtol=1e-6)


@needs_mpirun
def test_a_rank_that_the_environment_tells_otherwise_is_refused():
    code, _, problems = mpirun(2, "-c", "import pyfleet; pyfleet.init(backend='mpi', rank=0, world_size=1)")
    assert code
    assert "of 2 in MPI, but 0 of 1 according to arguments: start the ranks with mpirun" in problems


def test_without_mpi4py_the_error_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(pyfleet.ConfigError, match="needs the package mpi4py: pip install mpi4py"):
        MpiEngine.open(Placement(0, 1), ClusterConfig(), 1.0)
