"""The exception tree, and the numbers that errors.py and status.pxd must agree on."""
import pickle
import re
from pathlib import Path

import pytest

from fleetcore import errors
from fleetcore.errors import DType, OutOfStep, PeerLost, ReduceOp, Timeout, Verb

STATUS = (Path(errors.__file__).parent / "status.pxd").read_text()
NAMES = {"F32": "FLOAT32", "F64": "FLOAT64", "F16": "FLOAT16", "BF16": "BFLOAT16", "I8": "INT8", "I16": "INT16",
         "I32": "INT32", "I64": "INT64", "U8": "UINT8"}


@pytest.mark.parametrize(("prefix", "enum"), [("DT", DType), ("OP", ReduceOp), ("VERB", Verb)])
def test_both_languages_number_alike(prefix, enum):
    numbers = {NAMES.get(name, name): int(value) for name, value in re.findall(rf"^    {prefix}_(\w+) = (\d+)", STATUS, re.MULTILINE)}
    assert numbers == {member.name: member.value for member in enum}


@pytest.mark.parametrize("kind", (PeerLost, Timeout, OutOfStep))
def test_what_an_error_knows_survives_a_pickle(kind):
    error = pickle.loads(pickle.dumps(kind("lost rank 3", rank=3, operation="barrier()", epoch=7, done_bytes=11)))
    assert (str(error), error.rank, error.operation, error.epoch, error.done_bytes) == ("lost rank 3", 3, "barrier()", 7, 11)
