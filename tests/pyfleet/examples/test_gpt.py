import math
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

from pyfleet.examples import gpt
from pyfleet.examples.gpt import GPT, Shape, even_windows, learning_rate, load_text, random_windows

TINY = ("--model-dim", "16", "--layers", "1", "--heads", "2", "--ff", "32", "--max-seq", "16", "--batch-size", "8")


@pytest.fixture
def text(tmp_path):
    """A file of text that is easy to learn."""
    path = tmp_path / "text.txt"
    path.write_bytes(b"the quick brown fox jumps over the lazy dog. " * 400)
    return str(path)


def num_parameters(shape):
    """Of GPT-2's kind of layers, embedding and read-out shared."""
    dim, ff = shape.model_dim, shape.ff
    block = 2 * 2 * dim + (dim + 1) * 3 * dim + (dim + 1) * dim + (dim + 1) * ff + (ff + 1) * dim
    return shape.vocabulary * dim + shape.max_seq * dim + shape.layers * block + 2 * dim


@pytest.mark.feature("S31")
@pytest.mark.parametrize(("shape", "count"), [
    (Shape(), 124_672), (Shape(256, 6, 4, 1024, 128, 0.1), 4_837_376),
    (Shape(256, 6, 4, 1024, 128, 0.1, vocabulary=50_257), 17_637_632)])
def test_models_have_the_parameters_that_their_sizes_say(shape, count):
    model = GPT(shape)
    assert sum(parameter.numel() for parameter in model.parameters()) == num_parameters(shape) == count
    assert [module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)] == [shape.dropout] * (1 + shape.layers)


@pytest.mark.feature("S31", "S32", "S33")
def test_the_options_reach_the_larger_model():
    options = gpt.parse([f"--{name}={value}" for name, value in {
        "model-dim": 256, "layers": 6, "heads": 4, "ff": 1024, "max-seq": 128, "dropout": 0.1, "lr": 6e-4, "min-lr": 6e-5,
        "warmup": 100, "weight-decay": 0.01, "clip-norm": 1.0}.items()])
    assert (options.model_dim, options.layers, options.heads, options.ff, options.max_seq, options.dropout) == (
        256, 6, 4, 1024, 128, 0.1)
    assert (options.lr, options.min_lr, options.warmup, options.weight_decay, options.clip_norm) == (6e-4, 6e-5, 100, 0.01, 1.0)
    assert options.batch_size == 32
    assert gpt.parse(["--max-seq", "256"]).batch_size == 16
    assert (gpt.parse([]).lr, gpt.parse(["--optimizer", "sgd"]).lr) == (2e-3, 0.3)
    assert gpt.parse(["--lr", "0.5"]).min_lr == 0.05


@pytest.mark.parametrize("wrong", [("--heads", "3"), ("--steps", "0"), ("--layers", "-1"), ("--optimizer", "adagrad")])
def test_sizes_that_make_no_sense_are_refused(wrong, capsys):
    with pytest.raises(SystemExit):
        gpt.parse(list(wrong))
    assert wrong[0].strip("-").replace("-", "_") in capsys.readouterr().err.replace("-", "_")


@pytest.mark.feature("S33")
def test_the_rate_climbs_a_line_and_falls_half_a_cosine():
    rates = [learning_rate(step, 500, 6e-4, 6e-5, 100) for step in range(500)]
    np.testing.assert_allclose(rates[:100], 6e-4 * np.arange(1, 101) / 100)
    assert rates[99] == rates[100] == max(rates)
    assert rates[-1] == pytest.approx(6e-5)
    np.testing.assert_allclose(np.diff(rates[100:]), -(6e-4 - 6e-5) * np.sin(np.pi * (np.arange(399) + 0.5) / 399)
                               * np.sin(np.pi / 798), rtol=1e-6)
    assert learning_rate(0, 1, 1.0, 0.1, 0) == 1.0


def test_no_score_depends_on_what_comes_later():
    torch.manual_seed(0)
    model = GPT(Shape(16, 2, 2, 32, 12)).eval()
    tokens = torch.randint(0, 256, (3, 12))
    scores = model(tokens)
    assert scores.shape == (3, 256, 12)
    for cut in (1, 5, 11):
        other = tokens.clone()
        other[:, cut:] = torch.randint(0, 256, (3, 12 - cut))
        assert torch.allclose(model(other)[:, :, :cut], scores[:, :, :cut], atol=1e-6)
        assert not torch.allclose(model(other)[:, :, cut:], scores[:, :, cut:], atol=1e-6)
        assert torch.allclose(model(tokens[:, :cut]), scores[:, :, :cut], atol=1e-6)


def test_the_text_is_the_standard_library_split_by_files_the_same_way_each_time():
    (train, held_out), (again, _) = load_text(), load_text()
    np.testing.assert_array_equal(train, again)
    assert len(train) > 2_000_000 and 0.01 < len(held_out) / len(train) < 0.2
    assert b"class Thread" in train.tobytes() + held_out.tobytes()
    assert b"import numpy" not in train.tobytes()


def test_a_folder_or_a_file_can_be_the_text(tmp_path):
    for i in range(40):
        (tmp_path / f"m{i:02}.py").write_bytes(bytes([i]) * 10)
    train, held_out = load_text(str(tmp_path))
    assert held_out.tolist() == [19] * 10 + [39] * 10
    assert len(train) == 380 and not {19, 39} & set(train.tolist())
    (tmp_path / "one.txt").write_bytes(bytes(range(200)))
    train, held_out = load_text(str(tmp_path / "one.txt"))
    assert np.concatenate([train, held_out]).tolist() == list(range(200)) and len(held_out) == 10
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no text"):
        load_text(str(tmp_path / "empty"))


def test_windows_are_pieces_with_what_follows_each_byte():
    text = np.arange(100, dtype=np.uint8)
    for window in (random_windows(text, 50, 9, seed=3), even_windows(text, 5, 9), even_windows(text, 100, 9)):
        for i in range(len(window)):
            inputs, targets = window[i]
            assert inputs.tolist() == list(range(int(inputs[0]), int(inputs[0]) + 9))
            assert targets.tolist() == [value + 1 for value in inputs.tolist()]
    starts = [int(even_windows(text, 5, 9)[i][0][0]) for i in range(5)]
    assert starts[0] == 0 and starts[-1] == 90 and sorted(set(starts)) == starts
    assert len(even_windows(text, 100, 9)) == 11
    assert len({int(random_windows(text, 500, 9, seed=3)[i][0][0]) for i in range(500)}) == 91       # the last one is text[90:]
    with pytest.raises(ValueError, match="do not fit"):
        random_windows(text[:9], 1, 9, seed=0)


@pytest.mark.feature("M39", "S32")
def test_it_learns_and_prints_what_it_resolved(alone, text, tmp_path, capsys):
    path = tmp_path / "gpt.pt"
    alone(gpt.main, *TINY, "--steps", "60", "--every", "25", "--warmup", "5", "--lr", "0.02", "--text", text,
          "--output", str(path))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("6,608 parameters; model_dim 16, layers 1, ")
    assert "batch_size 8, optimizer adamw, lr 0.02, min_lr 0.002, warmup 5" in lines[0]
    steps = [line.split() for line in lines if line.startswith("step ")]
    assert [int(line[1]) for line in steps] == [0, 25, 50, 60]
    losses = [float(line[4]) for line in steps]
    assert 7 < losses[0] < 9 and losses[-1] < 0.6 * losses[0]
    assert lines[-2].startswith(f"held out {losses[-1]:.2f}")
    model = GPT(Shape(16, 1, 2, 32, 16))
    model.load_state_dict(torch.load(path))
    held_out = even_windows(load_text(text)[1], gpt.EVAL_WINDOWS, 16)
    inputs, targets = (torch.stack(parts) for parts in zip(*(held_out[i] for i in range(len(held_out))), strict=True))
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(model(inputs), targets).item() / math.log(2)
    assert loss == pytest.approx(float(lines[-2].split()[2]), abs=1e-3)


@pytest.mark.slow
def test_two_ranks_learn_what_one_does(text):
    def last(num_ranks, *more):
        said = subprocess.run(
            [sys.executable, "-m", "pyfleet", "launch", "--nproc", str(num_ranks), "-m", "pyfleet.examples.gpt", *TINY,
             "--steps", "20", "--text", text, *more], capture_output=True, text=True, timeout=120, check=True).stdout
        return float(re.search(r"held out ([\d.]+) bits per byte after 20 steps", said)[1])
    assert last(2) == pytest.approx(last(1), abs=2e-3)
    assert last(2, "--compression", "auto", "--optimizer", "sgd") < 7.9
