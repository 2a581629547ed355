"""`python -m bench tradeoff` on short trainings: every curve is there, its bytes are the sockets', and there is a plot."""
import json
import os
import subprocess
import sys
from itertools import pairwise

import pytest

from bench.__main__ import main
from bench.ranks import ROOT

TINY = "--model-dim 16 --layers 1 --heads 2 --ff 32 --max-seq 16"


@pytest.mark.slow
def test_curves_of_both_examples_with_bytes_of_the_socket_and_a_plot(tmp_path):
    pytest.importorskip("matplotlib")
    pytest.importorskip("sklearn")
    png = tmp_path / "t.png"
    done = subprocess.run(
        [sys.executable, "-m", "bench", "tradeoff", "--rate", "none", "--methods", "none;int8;topk(ratio=0.01)", "--epochs", "2",
         "--steps", "24", "--gpt", TINY, "--png", str(png)], cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=200,
        check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert png.read_bytes().startswith(b"\x89PNG") and 10_000 < png.stat().st_size < 300_000
    record = json.loads(png.with_suffix(".json").read_text())
    curves = {(curve["workload"], curve["method"]): curve["points"] for curve in record["curves"]}
    assert set(curves) == {(workload, method) for workload in ("digits", "gpt") for method in ("none", "int8", "topk(ratio=0.01)")}
    num_elems = {"digits": 38_282, "gpt": 6_608}
    for (workload, method), points in curves.items():
        assert len(points) > 20 and points[0][0] == points[0][2] == 0
        assert all(earlier[0] < later[0] and earlier[2] < later[2] and earlier[3] < later[3]
                   for earlier, later in pairwise(points))
        assert points[0][1] == curves[workload, "none"][0][1]                  # the same weights to begin with
        assert points[-1][1] < points[0][1]
        share = {"none": 1.0, "int8": 0.256, "topk(ratio=0.01)": 0.0125}[method]
        exact, overhead = 4 * num_elems[workload] * points[-1][0], 1000 * points[-1][0] + 5000 * len(points)
        assert share * exact * 0.95 < points[-1][3] < share * exact + overhead
    assert main(["tradeoff", "--draw", str(png.with_suffix(".json")), "--png", str(tmp_path / "again.png")]) == 0
    assert (tmp_path / "again.png").read_bytes() == png.read_bytes()
    for method in ("int8", "topk(ratio=0.01)"):
        assert any(line.startswith("digits ") and method in line and "%" in line for line in done.stdout.splitlines())


@pytest.mark.parametrize(("wrong", "said"), [
    (["--workloads", "mnist"], "no workload called 'mnist'"), (["--methods", "tpok"], "did you mean topk"),
    (["--ranks", "1"], "2 ranks or more"), (["--methods", " ; "], "and a method")])
def test_arguments_that_make_no_sense_are_usage_errors(wrong, said, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["tradeoff", *wrong])
    assert ended.value.code == 2 and said in capsys.readouterr().err


def test_without_matplotlib_it_says_what_to_install_before_it_trains(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["tradeoff"]) == 2
    assert "pip install 'pyfleet[plot]'" in capsys.readouterr().err
