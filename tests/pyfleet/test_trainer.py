import io
import sys
import threading

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

from pyfleet.config import TrainingConfig
from pyfleet.errors import ConfigError, ShapeError
from pyfleet.trainer import Callback, Trainer, default_loss, select_device

GENERATOR = threading.Lock()        # ranks are threads and torch's generator is one per process
N, FEATURES, CLASSES = 37, 6, 3


def make_model(seed=0, norm=False, dtype=torch.float64):
    with GENERATOR:
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(FEATURES, 12), nn.BatchNorm1d(12) if norm else nn.Tanh(),
                             nn.Linear(12, CLASSES)).to(dtype)


def make_data(n=N, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, FEATURES, generator=generator, dtype=dtype)
    return x, (x[:, :CLASSES] * 3).argmax(1)


def config(**settings):
    return TrainingConfig(**{"epochs": 3, "batch_size": 8, "learning_rate": 0.05, "progress": False, "device": "cpu",
                             "bucket_size_mb": 0.0005} | settings)


def train(thread_ranks, world_size, dataset=None, weights=None, norm=False, options=None, **settings):
    """The trainers of all ranks, after fit."""
    def rank(engine):
        trainer = Trainer(make_model(seed=engine.rank, norm=norm), make_data() if dataset is None else dataset,
                          config(**settings), engine=engine, **(options or {}))
        trainer.weights = weights
        trainer.fit()
        return trainer
    return thread_ranks(world_size, rank)


def state(trainer):
    return list(trainer.model.state_dict().values())


def difference(mine, theirs):
    return max(float((a - b).norm() / b.norm()) for a, b in zip(mine, theirs, strict=True))


def identical(trainers):
    return all(torch.equal(a, b) for other in trainers for a, b in zip(state(trainers[0]), state(other), strict=True))


def reference(epochs=3, batch_size=8, clip_norm=None):
    """Plain torch: the same order of samples, whole batches, one process."""
    from pyfleet.data import global_order
    model, (x, y) = make_model(), make_data()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for epoch in range(epochs):
        order = torch.from_numpy(global_order(N, 42, epoch))
        for batch in order.split(batch_size):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
            if clip_norm is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
            optimizer.step()
    return list(model.state_dict().values())


@pytest.mark.parametrize("world_size,weights", [(1, None), (2, None), (3, None), (2, [62, 38]), (3, [1, 0, 2])])
@pytest.mark.parametrize("batch_size", [8, 12, 37, 100])       # of 37: a ragged last batch of 5, of 1 (some get none), ...
def test_any_number_of_ranks_trains_like_one_process(thread_ranks, world_size, weights, batch_size):
    trainers = train(thread_ranks, world_size, weights=weights, batch_size=batch_size)
    assert identical(trainers)
    assert difference(state(trainers[0]), reference(batch_size=batch_size)) < 1e-9
    assert trainers[0].num_steps == 3 * -(-N // batch_size)


@pytest.mark.feature("C74")
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_accumulated_batches_equal_large_ones(thread_ranks, world_size):
    trainers = train(thread_ranks, world_size, batch_size=5, accumulation_steps=3)      # 37 = 15 + 15 + (5 + 2)
    assert identical(trainers)
    assert difference(state(trainers[0]), reference(batch_size=15)) < 1e-9
    averaged = [call for call in trainers[0].engine.calls if call[0] == "all_reduce" and call[3] == "mean"]
    assert len(averaged) == 3 * 3 * trainers[0].strategy.num_buckets


@pytest.mark.feature("S12")
@pytest.mark.parametrize("world_size", [1, 2])
def test_clipping_bounds_the_norm_of_the_global_gradient(thread_ranks, world_size):
    norms = []

    class Norms(Callback):
        def on_step_end(self, trainer):
            norms.append(sum(norm ** 2 for norm in trainer.gradient_norms().values()) ** 0.5)
    trainers = train(thread_ranks, world_size, clip_norm=0.1, options={"callbacks": [Norms()]})
    assert difference(state(trainers[0]), reference(clip_norm=0.1)) < 1e-9
    assert max(norms) <= 0.1 + 1e-6
    assert max(norms) > 0.09


def test_running_statistics_are_equal_on_all_ranks(thread_ranks):
    assert identical(train(thread_ranks, 2, norm=True, batch_size=10))


@pytest.mark.feature("C56")
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_loss_is_the_mean_over_all_samples(thread_ranks, world_size):
    trainers = train(thread_ranks, world_size, epochs=2, learning_rate=1e-12)       # nearly still, so losses are known
    x, y = make_data()
    expected = nn.functional.cross_entropy(make_model()(x), y).item()
    for trainer in trainers:
        assert [record["epoch"] for record in trainer.history] == [0, 1]
        assert [record["samples"] for record in trainer.history] == [N, N]
        assert [record["loss"] for record in trainer.history] == pytest.approx([expected] * 2, rel=1e-9)
        assert trainer.global_loss == trainer.history[-1]["loss"] == trainers[0].global_loss
        assert (trainer.stats["steps"], trainer.stats["epochs"], trainer.stats["samples"]) == (10, 2, 2 * N)
        assert trainer.stats["seconds"] > 0
        assert trainer.stats["engine"]["shared_memory"]["read_bytes"] > 0


@pytest.mark.parametrize("world_size,n", [(1, 37), (2, 37), (3, 2)])
def test_evaluation_counts_every_sample_once(thread_ranks, world_size, n):
    def rank(engine):
        trainer = Trainer(make_model(norm=True), make_data(), config(), eval_dataset=make_data(n), engine=engine)
        trainer.model[1].eval()
        result = trainer.evaluate()
        assert trainer.model.training
        assert not trainer.model[1].training
        return result
    x, y = make_data(n)
    model = make_model(norm=True).eval()
    for result in thread_ranks(world_size, rank):
        assert result == {"loss": pytest.approx(nn.functional.cross_entropy(model(x), y).item(), rel=1e-12),
                          "samples": n, "accuracy": pytest.approx((model(x).argmax(1) == y).double().mean().item())}


def test_evaluation_takes_other_data_and_says_no_accuracy_without_classes(thread_ranks):
    x, _ = make_data(10)

    def rank(engine):
        trainer = Trainer(make_model(), make_data(), config(), engine=engine)
        return trainer.evaluate()["samples"], trainer.evaluate((x, torch.zeros(10, CLASSES, dtype=torch.float64)))
    for trained_on, result in thread_ranks(2, rank):
        assert trained_on == N
        assert result == {"loss": pytest.approx(make_model()(x).square().mean().item()), "samples": 10}


@pytest.mark.parametrize("eval_steps,evaluations", [(None, 3), (4, 3), (1, 15)])
def test_evaluation_runs_when_asked(thread_ranks, eval_steps, evaluations):
    def rank(engine):
        count = 0
        trainer = Trainer(make_model(), make_data(), config(eval_steps=eval_steps), eval_dataset=make_data(20),
                          engine=engine)
        evaluate = trainer.evaluate

        def counted():
            nonlocal count
            count += 1
            return evaluate()
        trainer.evaluate = counted
        history = trainer.fit()
        assert all({"eval_loss", "eval_accuracy", "eval_samples"} <= set(record) for record in history)
        return count
    assert thread_ranks(2, rank) == [evaluations] * 2


@pytest.mark.feature("C52")
def test_predict_is_forward_in_evaluation_mode(thread_ranks):
    def rank(engine):
        trainer = Trainer(make_model(norm=True), make_data(), config(), engine=engine)
        trainer.fit()
        x = make_data(5)[0]
        before, predicted = len(engine.calls), trainer.predict(x)
        assert torch.equal(trainer.predict(x.numpy()), predicted)
        assert len(engine.calls) == before
        assert not predicted.requires_grad
        assert trainer.model.training
        return torch.equal(predicted, trainer.model.eval()(x))
    assert thread_ranks(2, rank) == [True] * 2


@pytest.mark.feature("M25", "M26", "M27")
def test_settings_are_honoured(thread_ranks):
    trainer, = train(thread_ranks, 1, epochs=2, batch_size=10, learning_rate=0.03)
    assert len(trainer.history) == 2
    assert trainer.num_steps == 2 * 4
    assert trainer.optimizer.defaults["lr"] == 0.03
    assert trainer.optimizer.defaults["momentum"] == 0.9


def test_fit_goes_on_where_it_stopped(thread_ranks):
    def rank(engine):
        trainer = Trainer(make_model(), make_data(), config(epochs=1), engine=engine)
        for _ in range(3):
            history = trainer.fit()
        assert [record["epoch"] for record in history] == [0, 1, 2]
        return trainer
    assert difference(state(thread_ranks(2, rank)[0]), reference()) < 1e-9


@pytest.mark.feature("A22")
@pytest.mark.parametrize("make", [
    lambda model: torch.optim.Adam,
    lambda model: lambda parameters: torch.optim.Adam(parameters, lr=0.05),
    lambda model: torch.optim.Adam(model.parameters(), lr=0.05),
], ids=["class", "factory", "instance"])
def test_optimizers_come_in_three_forms(thread_ranks, make):
    def rank(engine):
        model = make_model()
        trainer = Trainer(model, make_data(), config(), optimizer=make(model), engine=engine)
        assert isinstance(trainer.optimizer, torch.optim.Adam)
        assert trainer.optimizer.defaults["lr"] == 0.05
        losses = [record["loss"] for record in trainer.fit()]
        assert losses[-1] < losses[0]
        return trainer
    assert identical(thread_ranks(2, rank))


def test_an_optimizer_of_another_model_is_refused(thread_ranks):
    def rank(engine):
        with pytest.raises(ConfigError, match="built for other parameters"):
            Trainer(make_model(), make_data(), config(), optimizer=torch.optim.SGD(make_model().parameters(), lr=1),
                    engine=engine)
        return True
    assert thread_ranks(1, rank) == [True]


@pytest.mark.feature("C85")
def test_callbacks_are_told_once_per_epoch_on_every_rank(thread_ranks):
    class Recorder:         # no base class needed
        def __init__(self):
            self.events = []

        def on_fit_start(self, trainer):
            self.events.append("start")

        def on_epoch_end(self, trainer, record):
            self.events.append(record["epoch"])

    def rank(engine):
        told, recorder = [], Recorder()
        trainer = Trainer(make_model(), make_data(), config(), callbacks=[lambda *event: told.append(event), recorder],
                          engine=engine)
        trainer.fit()
        return told, recorder.events, trainer.history
    for told, events, history in thread_ranks(2, rank):
        assert told == [(record["epoch"], record["loss"]) for record in history]
        assert events == ["start", 0, 1, 2]


def test_a_callback_must_be_callable(thread_ranks):
    def rank(engine):
        with pytest.raises(ConfigError, match="a callback is a function"):
            Trainer(make_model(), make_data(), config(), callbacks=["print"], engine=engine)
        return True
    assert thread_ranks(1, rank) == [True]


def test_a_map_style_dataset_trains_like_its_tensors(thread_ranks):
    x, y = make_data()

    class Mapped(Dataset):
        def __len__(self):
            return N

        def __getitem__(self, i):
            return x[i], y[i]
    trainers = train(thread_ranks, 2, dataset=Mapped())
    assert difference(state(trainers[0]), reference()) < 1e-9


@pytest.mark.parametrize("name,value", [
    ("amp", True), ("loss_scale", 2.0), ("checkpoint_every", 1), ("strategy", "local_sgd"),
    ("sync_every", 2), ("resume", "some/path"),
])
def test_settings_that_would_be_ignored_are_refused(name, value):
    with pytest.raises(ConfigError, match=f"{name}={value!r} is not offered in this release; choose from "):
        Trainer(make_model(), make_data(), config(**{name: value}), engine=object())


@pytest.mark.parametrize("settings,message", [
    ({"seed": 1}, r"ranks differ in seed \(1 to 2\)"),
    ({"batch_size": 4, "epochs": 7}, r"epochs \(7 to 8\), batch_size \(4 to 5\)"),
])
def test_ranks_with_different_settings_all_learn_it(thread_ranks, settings, message):
    def rank(engine):
        mine = {name: value + (engine.rank == 1) for name, value in settings.items()}
        with pytest.raises(ConfigError, match=message):
            Trainer(make_model(), make_data(), config(**mine), engine=engine)
        return True
    assert thread_ranks(3, rank) == [True] * 3


def test_ranks_with_different_data_all_learn_it(thread_ranks):
    def rank(engine):
        with pytest.raises(ConfigError, match=r"ranks differ in the length of the dataset \(37 to 38\)"):
            Trainer(make_model(), make_data(N + engine.rank), config(), engine=engine)
        return True
    assert thread_ranks(2, rank) == [True] * 2


def test_an_empty_dataset_is_refused():
    with pytest.raises(ConfigError, match="the dataset is empty"):
        Trainer(make_model(), make_data(0), config(), engine=object())


def test_losses_that_are_no_mean_are_refused(thread_ranks):
    with pytest.raises(ConfigError, match="reduction='sum'"):
        Trainer(make_model(), make_data(), config(), loss_fn=nn.CrossEntropyLoss(reduction="sum"), engine=object())

    def rank(engine):
        trainer = Trainer(make_model(), make_data(), config(), loss_fn=lambda output, target: output[:, 0], engine=engine)
        with pytest.raises(ShapeError, match=r"must return a scalar, the mean over the batch, and returned \[8\]"):
            trainer.fit()
        return True
    assert thread_ranks(1, rank) == [True]


def test_the_default_loss_follows_the_targets():
    output = torch.tensor([[1.0, 2.0], [0.5, -1.0]])
    classes = torch.tensor([1, 0], dtype=torch.uint8)
    assert torch.equal(default_loss(output, classes), nn.functional.cross_entropy(output, classes.long()))
    column, row = torch.tensor([[1.0], [3.0]]), torch.tensor([1.0, 1.0], dtype=torch.float64)
    assert default_loss(column, row) == 2           # (n, 1) against (n,) does not become (n, n)
    with pytest.raises(ShapeError, match=r"output is \[2, 2\] and the targets are \[2\]"):
        default_loss(output, row)


@pytest.mark.feature("S30")
@pytest.mark.parametrize("mps,gpus,expected", [(True, 2, "mps"), (False, 2, "cuda:1"), (False, 0, "cpu")])
def test_auto_takes_mps_then_cuda_then_cpu(monkeypatch, mps, gpus, expected):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert select_device("auto", local_rank=3) == torch.device(expected)


@pytest.mark.feature("M31")
def test_a_device_is_taken_by_name_or_refused(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert select_device("cpu") == torch.device("cpu")
    assert select_device("cuda:1") == torch.device("cuda:1")
    for name in ("mps", "cuda:2"):
        with pytest.raises(ConfigError, match=f"device '{name}' is not there; this machine has cuda, cpu"):
            select_device(name)


@pytest.mark.parametrize("progress,terminal", [(True, False), (True, True), (False, True)])
def test_rank_0_alone_tells_of_progress(thread_ranks, monkeypatch, progress, terminal):
    out = io.StringIO()
    out.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stdout", out)
    train(thread_ranks, 2, progress=progress, options={"eval_dataset": make_data(9)})
    lines = [line for line in out.getvalue().splitlines() if "samples/s" in line]
    assert len(lines) == (3 if progress else 0)
    assert bool(out.getvalue()) == progress
    if progress and not terminal:
        assert lines == out.getvalue().splitlines()
        for epoch, line in enumerate(lines):
            assert line.startswith(f"epoch {epoch + 1}/3  loss ")
            assert "eval_accuracy 0." in line or "eval_accuracy 1." in line


@pytest.mark.feature("A20", "S19")
def test_the_same_seed_gives_the_same_run(thread_ranks):
    first, second, other = (train(thread_ranks, 2, seed=seed)[0] for seed in (5, 5, 6))
    assert identical([first, second])
    assert not identical([first, other])


def test_a_momentum_of_the_compression_replaces_the_optimisers(thread_ranks):
    def momenta(engine, compression, optimizer=None):
        trainer = Trainer(make_model(), make_data(), config(compression=compression), optimizer=optimizer, engine=engine)
        return [group["momentum"] for group in trainer.optimizer.param_groups]
    assert thread_ranks(1, lambda engine: momenta(engine, "topk")) == [[0.9]]
    assert thread_ranks(1, lambda engine: momenta(engine, "topk(momentum=0.5)")) == [[0.0]]

    def both(parameters):
        return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
    with pytest.raises(ConfigError, match="leave one of them out"):
        thread_ranks(1, lambda engine: momenta(engine, "topk(momentum=0.5)", both))


def test_momentum_in_the_compression_needs_its_feedback(thread_ranks):
    with pytest.raises(ConfigError, match="leave error_feedback on"):
        thread_ranks(1, lambda engine: Trainer(make_model(), make_data(), config(
            compression="topk(momentum=0.5)", error_feedback=False), engine=engine))
