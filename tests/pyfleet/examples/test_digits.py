import sys

import pytest
import torch

from pyfleet.examples import digits


def test_digits_are_learnt_and_the_model_is_saved(alone, tmp_path, capsys):
    pytest.importorskip("sklearn")
    path = tmp_path / "digits.pt"
    alone(digits.main, "--output", str(path))
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if line.startswith("epoch ")]) == 20
    assert "samples/s" in lines[0]
    assert "MB exchanged" in lines[0]
    assert lines[-1] == f"saved the model to {path}"
    accuracy = float(lines[-2].split()[2])
    assert lines[-2].startswith(f"test accuracy {accuracy:.4f} on 360 pictures, 1 rank, ")
    assert accuracy >= 0.97
    model = digits.make_model()
    model.load_state_dict(torch.load(path))
    pictures, labels = digits.load_digits()[1]
    assert (model(pictures).argmax(1) == labels).float().mean().item() == pytest.approx(accuracy, abs=1e-4)


def test_options_are_honoured(alone, tmp_path, capsys):
    pytest.importorskip("sklearn")
    path = tmp_path / "double.pt"
    alone(digits.main, "--output", str(path), "--double", "--epochs", "1", "--batch-size", "500", "--lr", "0.01", "--seed", "3")
    assert capsys.readouterr().out.count("epoch ") == 1
    assert {tensor.dtype for tensor in torch.load(path).values()} == {torch.float64}


def test_the_split_is_the_same_each_time_and_shares_nothing():
    pytest.importorskip("sklearn")
    (train, _), (test, _) = digits.load_digits()
    (again, _), _ = digits.load_digits()
    assert (len(train), len(test)) == (1437, 360)
    assert torch.equal(train, again)


def test_without_scikit_learn_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(SystemExit, match="pip install scikit-learn"):
        digits.main([])
