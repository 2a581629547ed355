import pytest

from pyfleet.compressors import ALIASES, COMPRESSORS, Compressor, parse_spec
from pyfleet.errors import ConfigError, DType


class Selector(Compressor):
    """Stands for a kind that selects values."""

    kind, route, takes_values = "selector", "gather", True

    def __init__(self, ratio=0.5, seed=0, values=None):
        super().__init__(ratio=ratio, seed=seed, values=values)

    def wire_bytes(self, n):
        return n

    def encode(self, x, out, *, step=0, offset=0, stream=0):
        return 0

    def decode(self, data, out):
        out[:] = 0


@pytest.fixture
def selector(monkeypatch):
    monkeypatch.setitem(COMPRESSORS, "selector", f"{__name__}:Selector")


@pytest.mark.parametrize("text,name", [
    ("none", "none"), (None, "none"), ("fp16", "fp16"), ("half", "fp16"), ("float16", "fp16"), (" BF16 ", "bf16"),
    ("bfloat16", "bf16"), ("fp8", "fp8"), ("float8", "fp8"), ("int8", "int8"), ("int4", "int4"), ("INT6", "int6"),
    ("quantize", "int8"), ("quantize(num_bits=6)", "int6"), ("quantize( num_bits = 3 )", "int3"), ("sign", "sign"),
    ("int8()", "int8"), ("int4(stochastic=true, seed=7)", "quantize(num_bits=4, stochastic=True, seed=7)"),
])
def test_specifications_name_compressors(text, name):
    assert parse_spec(text).name == name
    assert parse_spec(parse_spec(text).name).params == parse_spec(text).params


@pytest.mark.parametrize("alias", ALIASES)
def test_every_alias_works(alias):
    kind, implied = ALIASES[alias]
    assert parse_spec(alias).kind == kind
    assert parse_spec(alias).params.items() >= implied.items()


def test_a_compressor_is_returned_as_it_is():
    compressor = parse_spec("fp16")
    assert parse_spec(compressor, ratio=0.3) is compressor


@pytest.mark.feature("M20")
@pytest.mark.parametrize("text", ("selector+fp16", "selector_fp16", "Selector + FP16", "selector(ratio=0.5)_fp16()"))
def test_chains_code_the_values_that_the_first_selects(selector, text):
    chain = parse_spec(text)
    assert chain.name == "selector+fp16"
    assert chain.params["values"].wire_dtype == DType.FLOAT16
    assert parse_spec(chain.name).name == chain.name
    fresh = chain.fresh()
    assert fresh.name == chain.name and fresh.params["values"] is not chain.params["values"]
    assert parse_spec("selector(ratio=0.1)_int4").name == "selector(ratio=0.1)+int4"


def test_defaults_fill_what_is_not_said_and_go_only_where_they_fit(selector):
    assert parse_spec("selector", ratio=0.25, seed=9, num_bits=4).params == {"ratio": 0.25, "seed": 9, "values": None}
    assert parse_spec("selector(ratio=0.125)", ratio=0.25).params["ratio"] == 0.125
    assert parse_spec("int8", num_bits=4, ratio=0.25).name == "int8"
    assert parse_spec("quantize", num_bits=4).name == "int4"
    assert parse_spec("selector+int8", stochastic=True, seed=3).params["values"].params["seed"] == 3


@pytest.mark.feature("M28")
@pytest.mark.parametrize("text,told", [
    ("qantize", "unknown compression 'qantize'; did you mean quantize?"),
    ("int9", "did you mean int8?"), ("fp17", "did you mean fp16?"), ("gzip", "one of none, fp16, bf16, fp8"),
    ("", "cannot read"), ("+fp16", "cannot read"), ("fp16+", "cannot read"), ("int8)", r"from '\)' on"), ("in t8", "from 't8' on"),
    ("int8(3)", "written key=value, got '3'"), ("int8(=3)", "written key=value"), ("int8(seed=)", "written key=value"),
    ("quantize(numbits=3)", "no parameter 'numbits'; did you mean num_bits"), ("int8(num_bits=3)", "no parameter 'num_bits'"),
    ("fp16(ratio=0.5)", "fp16 has no parameter 'ratio': it takes none"), ("fp16+int8", "nothing can follow it"),
    ("selector+selector", "cannot code the values that selector selects"), ("selector+fp16+int8", "chains 3 kinds"),
    ("quantize(num_bits=0)", r"num_bits must be an integer >= 1 and <= 8, got 0"), ("quantize(num_bits=9)", "<= 8, got 9"),
    ("quantize(num_bits=2.5)", "an integer >= 1 and <= 8, got 2.5"), ("quantize(num_bits=True)", "got True"),
    ("quantize(num_bits=x)", "got 'x'"), ("int8(stochastic=1)", "stochastic must be True or False, got 1"),
    ("int8(seed=-1)", "seed must be an integer >= 0"), (8, "named by a text such as 'topk\\+fp16', got 8"),
])
def test_what_is_wrong_is_named(selector, text, told):
    with pytest.raises(ConfigError, match=told):
        parse_spec(text)
