"""`python -m bench compress` end to end."""
import json
import subprocess
import sys

import pytest

from bench.ranks import ROOT


def run(*arguments):
    return subprocess.run([sys.executable, "-m", "bench", "compress", *arguments], cwd=ROOT, capture_output=True, text=True,
                          timeout=120, check=False)


@pytest.mark.feature("M36")
def test_every_method_has_its_bytes_its_error_and_its_times(tmp_path):
    done = run("--sizes", "64KB,1MB", "--rounds", "2", "--methods", "none;fp16;bf16;int8;int4;sign",
               "--json", str(tmp_path / "all.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "int8 against torch int8: encode " in done.stdout
    assert "fp16 against torch float16, memory made: encode " in done.stdout
    rows = json.loads((tmp_path / "all.json").read_text())["rows"]
    assert len(rows) == 2 * (6 + 6)
    by_name = {row["method"]: row for row in rows if row["size_bytes"] == 1 << 20}
    shares = {name: row["encoding_bytes"] / row["size_bytes"] for name, row in by_name.items()}
    assert shares["none"] == 1 and shares["fp16"] == shares["bf16"] == 0.5
    assert shares["int8"] <= 0.26 and shares["int4"] <= 0.135 and shares["sign"] <= 0.04
    errors = [by_name[name]["error"] for name in ("none", "fp16", "bf16", "int8", "int4", "sign")]
    assert errors == sorted(errors) and errors[0] == 0 and errors[-1] < 0.7
    assert by_name["int8"]["error"] == pytest.approx(by_name["torch int8"]["error"], rel=1e-3)
    for row in rows:
        what = {"encode", "decode", "decode_add"} | ({"feedback"} if row["error"] and not row["rival"] else set())
        assert row["seconds"].keys() == what
        assert all(len(samples) == 2 and min(samples) > 0 for samples in row["seconds"].values())


@pytest.mark.parametrize("arguments,complaint", [
    (["--methods", "int9"], "did you mean int8"), (["--sizes", "4"], "from 1024 on"), (["--rounds", "0"], "at least one round"),
    (["--methods", ";"], "one method")])
def test_arguments_that_make_no_sense_are_usage_errors(arguments, complaint):
    refused = run(*arguments)
    assert refused.returncode == 2
    assert complaint in refused.stderr
