"""P4: the one training loop."""
from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import islice
from typing import Any, Self

import numpy as np
import torch
from torch.nn import functional

from pyfleet.choice import AUTO
from pyfleet.compressors import Compressor, parse_spec
from pyfleet.config import ClusterConfig, TrainingConfig
from pyfleet.data import DataPartitioner, DistributedSampler, Samples, seed_all
from pyfleet.engines import Engine, current, is_current
from pyfleet.errors import ConfigError, ShapeError
from pyfleet.gradients import gradient_norms
from pyfleet.routes import is_auto
from pyfleet.strategies.data_parallel import DistributedDataParallel

MOMENTUM = 0.9      # of the optimiser that is used when none is given; its compression may have it instead

# What this release does of settings that name more; anything else is refused rather than ignored.
OFFERED = {
    "strategy": ("data_parallel",), "sync_every": (1,), "amp": (False,),
    "loss_scale": (None,), "checkpoint_every": (0,), "resume": ("auto", "never"),
}


class Callback:
    """What a trainer tells while it runs, on every rank. Overriding some of the methods is enough."""

    def on_fit_start(self, trainer: Trainer) -> None:
        """Before the first step."""

    def on_step_end(self, trainer: Trainer) -> None:
        """After each optimiser step; gradients are still there."""

    def on_epoch_end(self, trainer: Trainer, record: dict[str, Any]) -> None:
        """After each epoch, with what fit's history says of it."""

    def on_fit_end(self, trainer: Trainer) -> None:
        """After the last step."""


class Trainer:
    """Trains a model on all ranks together, each on its share of every global batch.

    The result does not depend on how many ranks there are or how unevenly batches split: gradients are weighted by
    true sample counts. Construction is collective, and joins the fleet (pyfleet.init) if that has not happened yet.

    Args:    model: the same on all ranks; rank 0's numbers count. Moved to the device.
             dataset: map-style, of (input, ..., target) samples, or a tuple of tensors or arrays.
             training_config: TrainingConfig(); batch_size is the global one, and a step of the optimiser takes
             accumulation_steps such batches.
             cluster_config: for pyfleet.init().
             loss_fn: (output, target) -> mean over the batch, a scalar; must be a mean over samples, unweighted, for
             ranks to count for their samples. None: cross entropy for integer targets, mean squared error for others.
             optimizer: an instance over the model's parameters, an optimiser class (given learning_rate), or a
             function of the parameters. None: SGD with momentum 0.9 at learning_rate; without, where the compression has one.
             eval_dataset: evaluated every eval_steps steps, or after each epoch.
             callbacks: Callback objects, or functions of (epoch, loss) called after each epoch; epochs count from 0.
    Attributes:
        weights: None for equal shares, or one weight per rank; read at the start of fit.
        model, strategy, optimizer, engine, device, history, num_steps.
    Raises:  ConfigError for settings that differ between ranks or that this release does not offer.
    """

    def __init__(self, model: torch.nn.Module, dataset: Any, training_config: TrainingConfig | None = None,
                 cluster_config: ClusterConfig | None = None, loss_fn: Callable[..., torch.Tensor] | None = None,
                 optimizer: Any = None, eval_dataset: Any = None, callbacks: Iterable[Any] = (), *,
                 engine: Engine | None = None):
        self.config = TrainingConfig() if training_config is None else training_config
        require_offered(self.config)
        if getattr(loss_fn, "reduction", "mean") != "mean":
            raise ConfigError(f"loss_fn must be the mean over the batch, not reduction={loss_fn.reduction!r}")
        self.engine = engine if engine is not None else join(cluster_config)
        self._samples = Samples(dataset)
        self._eval_samples = None if eval_dataset is None else Samples(eval_dataset)
        if not len(self._samples):
            raise ConfigError("the dataset is empty")
        self._require_same_everywhere()
        self.device = select_device(self.config.device, self.engine.local_rank)
        self.model = model.to(self.device)
        self.strategy = DistributedDataParallel(self.model, self.config.bucket_size_mb, compression=compression_of(self.config),
                                                error_feedback=self.config.error_feedback,
                                                dense_below=self.config.dense_below, engine=self.engine)
        self.optimizer = self._make_optimizer(optimizer)
        self.loss_fn = default_loss if loss_fn is None else loss_fn
        self.callbacks = [each if hasattr(each, "on_epoch_end") else _EveryEpoch(each) for each in callbacks]
        self.weights: Sequence[float] | None = None
        self.history: list[dict[str, Any]] = []
        self.num_steps = 0
        self._num_epochs = self._num_samples = 0
        self._seconds = 0.0

    # --- what users call ------------------------------------------------------------------------------------------

    def fit(self) -> list[dict[str, Any]]:
        """Train for config.epochs more epochs; return the history, one record per epoch since the beginning.

        A record has epoch, loss (mean over all samples of all ranks), samples, seconds, samples_per_second, and with
        an eval_dataset what evaluate() says as eval_loss and so on. Torch, numpy and random are seeded first, by the
        seed and the rank.
        """
        seed_all(self.config.seed, self.engine.rank)
        sampler = DistributedSampler(len(self._samples), self.weights, self.config.seed, rank=self.engine.rank,
                                     world_size=self.engine.world_size, batch_size=self.config.batch_size)
        last = self._num_epochs + self.config.epochs
        with _Progress(self.config.progress and self.engine.rank == 0, last, sampler.num_batches) as progress:
            for callback in self.callbacks:
                _tell(callback, "on_fit_start", self)
            while self._num_epochs < last:
                record = self._train_epoch(sampler, progress)
                self.history.append(record)
                progress.end_epoch(record)
                for callback in self.callbacks:
                    _tell(callback, "on_epoch_end", self, record)
            self.strategy.finish()
            for callback in self.callbacks:
                _tell(callback, "on_fit_end", self)
        return self.history

    def evaluate(self, dataset: Any = None) -> dict[str, Any]:
        """Loss, number of samples and, for integer targets, accuracy over a dataset split over the ranks. Collective.

        Args:    dataset: None is the eval_dataset, or else the dataset trained on.
        """
        fallback = self._samples if self._eval_samples is None else self._eval_samples
        samples = fallback if dataset is None else Samples(dataset)
        mine = DataPartitioner(len(samples), self.engine.world_size).get_indices(self.engine.rank)
        sums = np.zeros(4)      # loss * samples, samples, right answers, answers
        with _evaluating(self.model), torch.no_grad():
            for start in range(0, len(mine), self.config.batch_size):
                output, target = self._forward(self.model, samples.fetch(mine[start:start + self.config.batch_size]))
                sums[:2] += float(self._loss(output, target)) * len(target), len(target)
                if is_classes(target) and output.ndim == target.ndim + 1:
                    sums[2:] += int((output.argmax(1) == target).sum()), target.numel()
        self.engine.all_reduce(sums, "sum")
        loss_sum, num_samples, num_right, num_answers = sums.tolist()
        result = {"loss": loss_sum / num_samples if num_samples else float("nan"), "samples": int(num_samples)}
        return result | ({"accuracy": num_right / num_answers} if num_answers else {})

    def predict(self, *inputs: Any) -> torch.Tensor:
        """The model's output for a batch, in evaluation mode; on the input's device. Involves no other rank."""
        tensors = [torch.as_tensor(x) for x in inputs]
        with _evaluating(self.model), torch.no_grad():
            return self.model(*(x.to(self.device) for x in tensors)).to(tensors[0].device)

    @property
    def global_loss(self) -> float | None:
        """The last epoch's loss: the mean over all samples of all ranks. None before the first."""
        return self.history[-1]["loss"] if self.history else None

    @property
    def stats(self) -> dict[str, Any]:
        """What has been done so far: steps, epochs, samples (of all ranks), seconds, samples_per_second, engine."""
        return {"steps": self.num_steps, "epochs": self._num_epochs, "samples": self._num_samples,
                "seconds": self._seconds, "samples_per_second": self._num_samples / self._seconds if self._seconds else 0.0,
                "engine": self.engine.stats()}

    def gradient_norms(self) -> dict[str, float]:
        """The norm of each parameter's gradient after the last step, by name; the same on all ranks."""
        return gradient_norms(self.model.named_parameters())

    # --- one epoch, one step --------------------------------------------------------------------------------------

    def _train_epoch(self, sampler: DistributedSampler, progress: _Progress) -> dict[str, Any]:
        began, evaluated = time.perf_counter(), {}
        sums = np.zeros(2)                                              # loss * samples, samples
        loss_sum = torch.zeros((), dtype=torch.float64 if self.device.type != "mps" else torch.float32,
                               device=self.device)                      # stays there: reading it would wait for the step
        self.model.train()
        sampler.set_epoch(self._num_epochs)
        for batches in _groups(sampler.batches(), self.config.accumulation_steps):
            loss_sum += self._step(batches)
            sums[1] += sum(len(indices) for indices, _ in batches)
            self.num_steps += 1
            for callback in self.callbacks:
                _tell(callback, "on_step_end", self)
            if self._eval_samples is not None and self.config.eval_steps and not self.num_steps % self.config.eval_steps:
                evaluated = self.evaluate()
            progress.advance(len(batches))
        sums[0] = float(loss_sum)
        self.engine.all_reduce(sums, "sum")
        seconds = time.perf_counter() - began
        self._num_samples += int(sums[1])
        self._seconds += seconds
        if self._eval_samples is not None and not self.config.eval_steps:
            evaluated = self.evaluate()
        record = {"epoch": self._num_epochs, "loss": float(sums[0] / sums[1]), "samples": int(sums[1]),
                  "seconds": seconds, "samples_per_second": float(sums[1] / seconds)}
        self._num_epochs += 1
        return record | {f"eval_{name}": value for name, value in evaluated.items()}

    def _step(self, batches: list[tuple[np.ndarray, int]]) -> torch.Tensor | float:
        """One update of the parameters from this rank's shares of global batches; returns the sum of its losses."""
        filled = [indices for indices, _ in batches if len(indices)]
        local, total = sum(len(indices) for indices in filled), sum(count for _, count in batches)
        loss_sum = 0.0
        self.model.zero_grad(set_to_none=True)
        with self.strategy.set_samples(local, total):
            for i, indices in enumerate(filled):
                with self.strategy.no_sync() if i + 1 < len(filled) else nullcontext():
                    loss = self._loss(*self._forward(self.strategy, self._samples.fetch(indices)))
                    (loss * (len(indices) / local)).backward()          # .grad becomes the mean over `local` samples
                loss_sum = loss_sum + loss.detach() * len(indices)
            if not filled:
                self.strategy.participate()
        if self.config.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_norm)
        self.optimizer.step()
        self.strategy.after_step()
        return loss_sum

    def _forward(self, model: torch.nn.Module, batch: tuple[Any, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        *inputs, target = (part.to(self.device) if isinstance(part, torch.Tensor) else part for part in batch)
        return model(*inputs), target

    def _loss(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        loss = self.loss_fn(output, target)
        if loss.ndim:
            raise ShapeError(f"loss_fn must return a scalar, the mean over the batch, and returned {list(loss.shape)}")
        return loss

    # --- construction ---------------------------------------------------------------------------------------------

    def _make_optimizer(self, optimizer: Any) -> torch.optim.Optimizer:
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        compression = compression_of(self.config)
        momentum = 0.0 if isinstance(compression, str) else compression.momentum
        if optimizer is None:
            return torch.optim.SGD(parameters, lr=self.config.learning_rate, momentum=0.0 if momentum else MOMENTUM)
        if isinstance(optimizer, type) and issubclass(optimizer, torch.optim.Optimizer):
            return optimizer(parameters, lr=self.config.learning_rate)
        if not isinstance(optimizer, torch.optim.Optimizer):
            optimizer = optimizer(parameters)
        mine, known = set(map(id, self.model.parameters())), [p for g in optimizer.param_groups for p in g["params"]]
        if not all(id(parameter) in mine for parameter in known):
            raise ConfigError("the optimizer was built for other parameters than the model's")
        if momentum and any(group.get("momentum") for group in optimizer.param_groups):
            raise ConfigError("the compression has a momentum and so has the optimizer: leave one of them out")
        return optimizer

    def _require_same_everywhere(self) -> None:
        """All ranks must cut the same dataset into the same batches, or they would wait for each other for ever."""
        facts = {"the length of the dataset": len(self._samples), "epochs": self.config.epochs,
                 "batch_size": self.config.batch_size, "accumulation_steps": self.config.accumulation_steps,
                 "seed": self.config.seed, "eval_steps": self.config.eval_steps or 0,
                 "the length of eval_dataset": -1 if self._eval_samples is None else len(self._eval_samples)}
        lowest, highest = (np.array(list(facts.values()), dtype=np.int64) for _ in range(2))
        self.engine.all_reduce(lowest, "min")
        self.engine.all_reduce(highest, "max")
        differing = [f"{name} ({low} to {high})" for name, low, high in zip(facts, lowest, highest, strict=True)
                     if low != high]
        if differing:
            raise ConfigError("ranks differ in " + ", ".join(differing))


def join(cluster_config: ClusterConfig | None) -> Engine:
    """The engine in force, after joining the fleet if that has not happened yet."""
    if not is_current():
        from pyfleet.fleet import init

        init(config=cluster_config)
    return current()


def require_offered(config: TrainingConfig) -> None:
    """Refuse settings that this release does not act upon.

    Raises:  ConfigError naming the setting and what is offered.
    """
    compression_of(config)
    for name, offered in OFFERED.items():
        if (value := getattr(config, name)) not in offered:
            raise ConfigError(f"{name}={value!r} is not offered in this release; choose from "
                              + ", ".join(map(repr, offered)))


def compression_of(config: TrainingConfig) -> Compressor | str:
    """The compression that the settings name, with topk_ratio and seed where its text leaves them open; or "auto".

    Raises:  ConfigError naming the nearest known one.
    """
    if is_auto(config.compression):
        return AUTO
    return parse_spec(config.compression, ratio=config.topk_ratio, seed=config.seed)


def select_device(name: str = "auto", local_rank: int = 0) -> torch.device:
    """The device of that name; "auto" is the first there is of mps, cuda, cpu. Ranks of a host take GPUs in turn.

    Raises:  ConfigError for a device that this machine does not have.
    """
    there = {"mps": torch.backends.mps.is_available(), "cuda": torch.cuda.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, is_there in there.items() if is_there)
    kind, _, number = name.partition(":")
    if not there.get(kind) or (kind == "cuda" and number and int(number) >= torch.cuda.device_count()):
        raise ConfigError(f"device {name!r} is not there; this machine has "
                          + ", ".join(kind for kind, is_there in there.items() if is_there))
    if name == "cuda":
        return torch.device("cuda", local_rank % torch.cuda.device_count())
    return torch.device(name)


def is_classes(target: Any) -> bool:
    """Whether targets are class numbers."""
    return isinstance(target, torch.Tensor) and not (
        target.is_floating_point() or target.is_complex() or target.dtype is torch.bool)


def default_loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Cross entropy for integer targets (class numbers), mean squared error for others.

    Raises:  ShapeError where the squared error would broadcast targets of another size.
    """
    if is_classes(target):
        return functional.cross_entropy(output, target.long())
    if output.numel() != target.numel():
        raise ShapeError(f"the model's output is {list(output.shape)} and the targets are {list(target.shape)}")
    return functional.mse_loss(output, target.to(output.dtype).view_as(output))


# --- telling about it ---------------------------------------------------------------------------------------------

class _EveryEpoch(Callback):
    """A function of (epoch, loss) as a callback."""

    def __init__(self, function: Callable[[int, float], Any]):
        if not callable(function):
            raise ConfigError(f"a callback is a function of (epoch, loss) or a Callback, not {function!r}")
        self._function = function

    def on_epoch_end(self, trainer: Trainer, record: dict[str, Any]) -> None:
        self._function(record["epoch"], record["loss"])


def _tell(callback: Any, event: str, *arguments: Any) -> None:
    handler = getattr(callback, event, None)        # a callback need not derive from Callback
    if handler is not None:
        handler(*arguments)


class _Progress:
    """A bar per epoch on a terminal, a line per epoch elsewhere, nothing when not wanted."""

    def __init__(self, wanted: bool, num_epochs: int, num_batches: int):
        self._wanted, self._num_epochs, self._num_batches = wanted, num_epochs, num_batches
        self._bar = self._task = None

    def __enter__(self) -> Self:
        if self._wanted and sys.stdout.isatty():
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
            self._bar = Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
                                 TimeRemainingColumn(), transient=True)
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, num_batches: int) -> None:
        """So many global batches more are done."""
        if self._bar is not None:
            if self._task is None:
                self._task = self._bar.add_task("batches", total=self._num_batches)
            self._bar.advance(self._task, num_batches)

    def end_epoch(self, record: dict[str, Any]) -> None:
        """The epoch is over."""
        words = [f"epoch {record['epoch'] + 1}/{self._num_epochs}", f"loss {record['loss']:.4f}"]
        words += [f"{name} {record[name]:.4f}" for name in ("eval_loss", "eval_accuracy") if name in record]
        line = "  ".join([*words, f"{record['samples_per_second']:,.0f} samples/s"])
        if self._bar is not None:
            if self._task is not None:
                self._bar.remove_task(self._task)
                self._task = None
            self._bar.console.print(line, highlight=False)
        elif self._wanted:
            print(line, flush=True)


@contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode within, and each part's own mode after it."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _groups(batches: Iterator[Any], size: int) -> Iterator[list[Any]]:
    """Lists of `size` batches, the last one possibly shorter."""
    while group := list(islice(batches, size)):
        yield group
