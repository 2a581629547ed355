"""The names, defaults and manners that scripts rely on."""
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import pyfleet

ROOT = Path(__file__).parents[2]

SIGNATURES = {
    "init": "backend='fleet', rank=None, world_size=None, peers=None, namespace=None, psk_file=None, min_nodes=None, "
            "timeout=None, config=None",
    "AutoDiscovery": "namespace=None, psk_file=None, config=None",
    "shutdown": "", "rank": "", "world_size": "", "local_rank": "", "is_leader": "", "is_initialized": "",
    "all_reduce": "x, op=<ReduceOp.SUM: 0>, *, group=None, async_op=False, algorithm='auto', compression=None, timeout=None",
    "all_reduce_sum": "x", "all_reduce_mean": "x", "ring_all_reduce": "x",
    "broadcast": "x, src=0, *, group=None, async_op=False, timeout=None",
    "barrier": "*, group=None, async_op=False, timeout=None",
    "reduce": "x, dst=0, op=<ReduceOp.SUM: 0>, *, group=None, async_op=False, timeout=None",
    "all_gather": "x, *, group=None, async_op=False, timeout=None",
    "all_gather_into": "out, x, *, group=None, async_op=False, timeout=None",
    "gather": "x, dst=0, *, group=None, async_op=False, timeout=None",
    "scatter": "xs, src=0, *, group=None, async_op=False, timeout=None",
    "reduce_scatter": "x, op=<ReduceOp.SUM: 0>, *, group=None, async_op=False, timeout=None",
    "all_to_all": "xs, *, group=None, async_op=False, timeout=None",
    "send": "x, dst, tag=0, *, group=None, timeout=None",
    "recv": "x=None, src=None, tag=0, *, group=None, return_source=False, timeout=None",
    "isend": "x, dst, tag=0, *, group=None, timeout=None",
    "irecv": "x=None, src=None, tag=0, *, group=None, return_source=False, timeout=None",
    "new_group": "ranks, *, timeout=None",
    "broadcast_object": "obj, src=0, *, group=None, timeout=None",
    "all_gather_object": "obj, *, group=None, timeout=None",
    "empty": "shape, dtype=None, *, like='torch'", "zeros": "shape, dtype=None, *, like='torch'",
    "from_numpy": "x", "register": "x",
    "DistributedDataParallel": "model, bucket_size_mb=25.0, broadcast_buffers=True, compression=None, *, "
                               "error_feedback=True, dense_below=0, engine=None",
    "Trainer": "model, dataset, training_config=None, cluster_config=None, loss_fn=None, optimizer=None, eval_dataset=None, "
               "callbacks=(), *, engine=None",
    "balance_workload": "task_costs, world_size",
    "log_metric": "name, value, /, **labels",
    "GradientCompressor": "compression='none', error_feedback=False, **parameters",
    "quantize_gradients": "g, num_bits=8",
}
ERRORS = ("AuthFailed", "ConfigError", "Evicted", "NotEnoughPeers", "OutOfStep", "PeerLost", "ShapeError", "Timeout")


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_are_kept(name):
    parameters = inspect.signature(getattr(pyfleet, name)).parameters.values()
    plain = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in parameters]
    assert re.sub(r"^\((.*)\)$", r"\1", str(inspect.Signature(plain))) == SIGNATURES[name]


@pytest.mark.parametrize("name", pyfleet.__all__)
def test_every_public_name_exists_and_says_what_it_is(name):
    thing = getattr(pyfleet, name)
    assert thing.__doc__ and len(thing.__doc__.split()) >= 3
    if inspect.isclass(thing) and not issubclass(thing, (Exception, int)):
        for method, member in vars(thing).items():
            if inspect.isfunction(member) and not method.startswith("_"):
                assert inspect.getdoc(getattr(thing, method)), f"{name}.{method}"


@pytest.mark.parametrize("name", ERRORS)
def test_every_error_is_a_fleet_error(name):
    assert issubclass(getattr(pyfleet, name), pyfleet.FleetError)


def test_errors_are_also_what_python_calls_them():
    assert issubclass(pyfleet.Timeout, TimeoutError)
    assert issubclass(pyfleet.ConfigError, ValueError)
    assert issubclass(pyfleet.ShapeError, ValueError)
    assert issubclass(pyfleet.DTypeError, TypeError)


def test_ops_have_all_their_names():
    ops = pyfleet.ReduceOp
    assert ops.MEAN is ops.AVG is ops.AVERAGE and ops.PRODUCT is ops.PROD
    assert {op.name for op in ops} == {"SUM", "MEAN", "MIN", "MAX", "PRODUCT"}


@pytest.mark.parametrize("statement", ("import pyfleet", "import pyfleet; pyfleet.init(); pyfleet.barrier()"))
def test_a_script_without_torch_never_loads_it(statement):
    code = f"{statement}\nimport sys; assert 'torch' not in sys.modules, 'torch was imported'"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=60)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no_such_thing"):
        pyfleet.no_such_thing  # noqa: B018
    assert "all_reduce" in dir(pyfleet)


def test_the_readme_names_only_what_exists():
    text = (ROOT / "README.md").read_text()
    for name in set(re.findall(r"pyfleet\.(\w+)\(", text)):
        assert hasattr(pyfleet, name), name
    for path in set(re.findall(r"`((?:pyfleet|fleetcore|tests|bench)/[\w/.]+?)`", text)):
        assert (ROOT / path).exists(), path
    for target in set(re.findall(r"^make (\w+)", text, re.MULTILINE)):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), target
