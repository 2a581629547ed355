"""`python -m bench sparsify` on little data: every row is there, and what it prints is what it measured."""
import json

from bench.__main__ import main
from fleetcore.kernels import sparsify


def test_it_prints_and_writes_every_row(tmp_path, capsys):
    best, file = sparsify.isa(), tmp_path / "rows.json"
    assert main(["sparsify", "--elements", "2e5", "--ratios", "0.1,0.01", "--reps", "2", "--json", str(file)]) == 0
    printed, record = capsys.readouterr().out, json.loads(file.read_text())
    assert record["elements"] == 200_000 and {row["k"] for row in record["rows"]} == {20_000, 2000}
    how = {(row["k"], row["what"], row["how"]) for row in record["rows"]}
    for k in (20_000, 2000):
        assert {(k, "top k", best), (k, "top k", "torch.topk"), (k, "top k", "numpy.argpartition"),
                (k, "sparse sum", "numpy.add.at"), (k, "indices, decode", "Rice")} <= how
    assert all(0 < row["seconds"]["min"] <= row["seconds"]["median"] <= row["seconds"]["max"] for row in record["rows"])
    assert "bits each, bound 4.6" in printed and "bits each, bound 8.0" in printed
    assert sparsify.isa() == best
