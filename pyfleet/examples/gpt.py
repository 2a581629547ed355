"""A small language model of bytes, trained on all ranks:  pyfleet-launch --nproc 2 -m pyfleet.examples.gpt

By default the text is the source of Python's standard library on this machine, so nothing is downloaded. One file in
twenty is held out; what is printed is the loss on those, in bits per byte: 8 before anything is learnt. Larger:
--model-dim 256 --layers 6 --heads 4 --ff 1024 --max-seq 128 --dropout 0.1 --lr 6e-4 --min-lr 6e-5 --warmup 100.
Of a gradient's largest hundredth AdamW makes little, for it divides by what comes rarely and is large then: with top-k
take --optimizer sgd, and a compression that has the momentum.
"""
from __future__ import annotations

import argparse
import math
import os
import sysconfig
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional

import pyfleet
from pyfleet.data import seed_all
from pyfleet.trainer import Callback

BYTES = 256                 # the vocabulary
HELD_OUT = 20               # every 20th file
NOT_OURS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
EVAL_WINDOWS = 128          # of the held-out text, evenly spaced: a second's work
RATES = {"adamw": 2e-3, "sgd": 0.3}     # for the sizes that are the default; found by trying


@dataclass(frozen=True)
class Shape:
    """The sizes of a model."""

    model_dim: int = 64
    layers: int = 2
    heads: int = 4
    ff: int = 256
    max_seq: int = 128
    dropout: float = 0.0
    vocabulary: int = BYTES


class GPT(nn.Module):
    """A decoder-only transformer, normalised before each part; the embedding of tokens is also what reads them out."""

    def __init__(self, shape: Shape):
        super().__init__()
        if shape.model_dim % shape.heads:
            raise ValueError(f"model_dim must be a multiple of heads, got {shape.model_dim} and {shape.heads}")
        self.tokens = nn.Embedding(shape.vocabulary, shape.model_dim)
        self.places = nn.Embedding(shape.max_seq, shape.model_dim)
        self.dropout = nn.Dropout(shape.dropout)
        self.blocks = nn.Sequential(*(Block(shape) for _ in range(shape.layers)))
        self.norm = nn.LayerNorm(shape.model_dim)
        self.apply(_start)
        for block in self.blocks:       # as many parts add to the stream: together they start as one (GPT-2)
            for part in (block.out, block.narrow):
                nn.init.normal_(part.weight, std=0.02 / math.sqrt(2 * shape.layers))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Scores of what follows each token: (batch, vocabulary, length) for (batch, length <= max_seq)."""
        x = self.tokens(tokens) + self.places.weight[:tokens.shape[1]]
        x = self.norm(self.blocks(self.dropout(x)))
        return (x @ self.tokens.weight.T).transpose(1, 2)       # classes second, as cross entropy wants them


class Block(nn.Module):
    """Attention to what came before, then two layers for each place."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.heads, self.drop = shape.heads, shape.dropout
        self.norm_1, self.norm_2 = nn.LayerNorm(shape.model_dim), nn.LayerNorm(shape.model_dim)
        self.query_key_value = nn.Linear(shape.model_dim, 3 * shape.model_dim)
        self.out = nn.Linear(shape.model_dim, shape.model_dim)
        self.wide, self.narrow = nn.Linear(shape.model_dim, shape.ff), nn.Linear(shape.ff, shape.model_dim)
        self.dropout = nn.Dropout(shape.dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, dim = x.shape
        parts = self.query_key_value(self.norm_1(x)).view(batch, length, 3, self.heads, dim // self.heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        seen = functional.scaled_dot_product_attention(query, key, value, is_causal=True,
                                                       dropout_p=self.drop if self.training else 0.0)
        x = x + self.dropout(self.out(seen.transpose(1, 2).reshape(batch, length, dim)))
        return x + self.dropout(self.narrow(functional.gelu(self.wide(self.norm_2(x)))))


def _start(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)


# ---- text ------------------------------------------------------------------------------------------------------

def load_text(source: str | None = None) -> tuple[np.ndarray, np.ndarray]:
    """(bytes to train on, bytes held out), uint8. The same files give the same split: every 20th, in order of their names.

    Args:    source: a file (its last twentieth is held out), or a folder whose .py files are read; None: the standard
             library's modules and packages, without its tests and what was installed beside it.
    Raises:  ValueError where there is not enough text.
    """
    if source is not None and os.path.isfile(source):
        text = np.fromfile(source, np.uint8)
        train, held_out = np.split(text, [len(text) - len(text) // HELD_OUT])
    else:
        folder = Path(sysconfig.get_path("stdlib") if source is None else source)
        left_out = NOT_OURS if source is None else set()
        files = sorted(path for path in folder.rglob("*.py") if not left_out & set(path.relative_to(folder).parts))
        parts, nothing = [np.fromfile(path, np.uint8) for path in files], np.empty(0, np.uint8)
        train = np.concatenate([nothing, *(part for i, part in enumerate(parts) if i % HELD_OUT != HELD_OUT - 1)])
        held_out = np.concatenate([nothing, *parts[HELD_OUT - 1::HELD_OUT]])
    if min(len(train), len(held_out)) < 2:
        raise ValueError(f"{source or 'the standard library'} has no text to train on and hold out: {len(train)} and "
                         f"{len(held_out)} bytes")
    return train, held_out


class Windows:
    """Pieces of a text with what follows each byte of them: a dataset of (length,) and (length,) int64."""

    def __init__(self, text: np.ndarray, starts: Sequence[int] | np.ndarray, length: int):
        self._text, self._starts, self._length = torch.from_numpy(text), starts, length

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        start = int(self._starts[index])
        piece = self._text[start:start + self._length + 1].long()
        return piece[:-1], piece[1:]


def random_windows(text: np.ndarray, num: int, length: int, seed: int) -> Windows:
    """Windows that begin anywhere.

    Raises:  ValueError when the text is shorter than one.
    """
    return Windows(text, np.random.default_rng(seed).integers(0, _num_starts(text, length), num), length)


def even_windows(text: np.ndarray, num: int, length: int) -> Windows:
    """At most num windows, spread over the whole text, that share nothing.

    Raises:  ValueError when the text is shorter than one.
    """
    most = (_num_starts(text, length) - 1) // length + 1
    return Windows(text, np.linspace(0, most - 1, min(num, most)).astype(np.int64) * length, length)


def _num_starts(text: np.ndarray, length: int) -> int:
    if len(text) <= length:
        raise ValueError(f"a window of {length} bytes and the one after it do not fit into a text of {len(text)}")
    return len(text) - length


# ---- training --------------------------------------------------------------------------------------------------

def learning_rate(step: int, steps: int, top: float, least: float, warmup: int) -> float:
    """The rate of a step, counted from 0: up a line to `top` in `warmup` steps, then half a cosine down to `least`."""
    if step < warmup:
        return top * (step + 1) / warmup
    way = (step - warmup) / max(1, steps - 1 - warmup)
    return least + (top - least) * 0.5 * (1 + math.cos(math.pi * min(1.0, way)))


class Schedule(Callback):
    """Sets the optimiser's rate before each step."""

    def __init__(self, *plan: float):
        self._plan = plan

    def on_fit_start(self, trainer):
        self._set(trainer)

    def on_step_end(self, trainer):
        self._set(trainer)

    def _set(self, trainer):
        for group in trainer.optimizer.param_groups:
            group["lr"] = learning_rate(trainer.num_steps, *self._plan)


class Report(Callback):
    """A line now and then, on rank 0: steps, held-out loss, speed, and what was sent.

    Attributes:
        rows: (steps, held-out bits per byte, seconds of training, bytes exchanged so far) of every line.
    """

    def __init__(self, every: int, batch_bytes: int, quiet: bool = False):
        self._every, self._batch_bytes, self._quiet = every, batch_bytes, quiet
        self._seconds, self._since = 0.0, 0.0
        self.rows: list[tuple[int, float, float, int]] = []

    def on_fit_start(self, trainer):
        self._look(trainer)

    def on_step_end(self, trainer):
        if trainer.num_steps % self._every == 0:
            self._look(trainer)

    def on_fit_end(self, trainer):
        if self.rows[-1][0] != trainer.num_steps:
            self._look(trainer)

    def _look(self, trainer):
        now = time.perf_counter()
        if self.rows:
            self._seconds += now - self._since
        sent = sent_bytes(trainer.engine.stats())
        loss = trainer.evaluate()["loss"] / math.log(2)
        earlier = self.rows[-1] if self.rows else (0, 0.0, 0.0, sent)
        self.rows.append((trainer.num_steps, loss, self._seconds, sent))
        if trainer.engine.rank == 0 and not self._quiet:
            bytes_per_s = (trainer.num_steps - earlier[0]) * self._batch_bytes / max(1e-9, self._seconds - earlier[2])
            print(f"step {trainer.num_steps:5}   held out {loss:.3f} bits per byte   {bytes_per_s:8,.0f} bytes/s   "
                  f"{(sent - earlier[3]) / 1e6:8.2f} MB exchanged", flush=True)
        self._since = time.perf_counter()


def sent_bytes(stats: dict) -> int:
    """What this rank sent to other hosts, and read from the memory of ranks on its own."""
    return sum(link["sent_bytes"] for link in stats["links"].values()) + stats["shared_memory"].get("read_bytes", 0)


def adamw(model: nn.Module, rate: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW, which draws matrices to zero, but no biases and norms."""
    kinds = [[p for p in model.parameters() if p.ndim >= 2], [p for p in model.parameters() if p.ndim < 2]]
    return torch.optim.AdamW([{"params": kinds[0], "weight_decay": weight_decay}, {"params": kinds[1], "weight_decay": 0.0}],
                             lr=rate, betas=(0.9, 0.95))


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The options, with what follows from others filled in."""
    shape = Shape()
    parser = argparse.ArgumentParser(prog="python -m pyfleet.examples.gpt", description=__doc__.splitlines()[0])
    sizes = parser.add_argument_group("model")
    for name in ("model_dim", "layers", "heads", "ff", "max_seq"):
        sizes.add_argument(f"--{name.replace('_', '-')}", type=_count, default=getattr(shape, name),
                           help="default %(default)s")
    sizes.add_argument("--dropout", type=float, default=shape.dropout, help="default %(default)s")
    parser.add_argument("--steps", type=_count, default=600, help="updates of the model (default %(default)s)")
    parser.add_argument("--batch-size", type=_count,
                        help="windows of a step, over all ranks together (default: 32, or 16 of more than 128 bytes)")
    parser.add_argument("--optimizer", choices=list(RATES), default="adamw",
                        help="sgd has momentum, or its compression has (default %(default)s)")
    parser.add_argument("--lr", type=float, help="highest learning rate (default: " +
                        ", ".join(f"{rate:g} for {name}" for name, rate in RATES.items()) + ")")
    parser.add_argument("--min-lr", type=float, help="the last step's (default: a tenth of --lr)")
    parser.add_argument("--warmup", type=int, default=50, help="steps up to --lr (default %(default)s)")
    parser.add_argument("--weight-decay", type=float, default=0.01, help="of adamw (default %(default)s)")
    parser.add_argument("--clip-norm", type=float, default=1.0, help="of the gradient; 0: never (default %(default)s)")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--text", metavar="PATH", help="a file, or a folder of .py files (default: Python's standard library)")
    parser.add_argument("--every", type=_count, default=100, help="steps from line to line (default %(default)s)")
    parser.add_argument("--output", help="where rank 0 saves the model (default: nowhere)")
    parser.add_argument("--compression", default="none", metavar="SPEC",
                        help='how gradients travel: auto, int8, "topk(ratio=0.01, warmup=100, momentum=0.9)", ... '
                             "(default %(default)s)")
    options = parser.parse_args(argv)
    if options.batch_size is None:
        options.batch_size = 32 if options.max_seq <= 128 else 16
    if options.lr is None:
        options.lr = RATES[options.optimizer]
    if options.min_lr is None:
        options.min_lr = options.lr / 10
    if options.model_dim % options.heads:
        parser.error("--model-dim must be a multiple of --heads")
    return options


def _count(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)


def make_trainer(options: argparse.Namespace, report: Report) -> pyfleet.Trainer:
    """A trainer for the options of `parse`, of the ranks of the fleet."""
    train, held_out = load_text(options.text)
    seed_all(options.seed)
    model = GPT(Shape(**{name: getattr(options, name) for name in
                         ("model_dim", "layers", "heads", "ff", "max_seq", "dropout")}))
    return pyfleet.Trainer(
        model, random_windows(train, options.steps * options.batch_size, options.max_seq, options.seed),
        eval_dataset=even_windows(held_out, EVAL_WINDOWS, options.max_seq),
        optimizer=adamw(model, options.lr, options.weight_decay) if options.optimizer == "adamw" else None,
        callbacks=[report, Schedule(options.steps, options.lr, options.min_lr, options.warmup)],
        training_config=pyfleet.TrainingConfig(
            epochs=1, batch_size=options.batch_size, learning_rate=options.lr, seed=options.seed, device="cpu", progress=False,
            clip_norm=options.clip_norm or None, compression=options.compression))


def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    fleet = pyfleet.init()
    if fleet.local_world_size > 1:
        torch.set_num_threads(1)        # ranks that share a machine: a thread each
    report = Report(options.every, options.batch_size * options.max_seq)
    trainer = make_trainer(options, report)
    if fleet.rank == 0:
        num = sum(parameter.numel() for parameter in trainer.model.parameters())
        print(f"{num:,} parameters; " + ", ".join(f"{name} {value}" for name, value in vars(options).items()), flush=True)
    trainer.fit()
    if fleet.rank == 0:
        steps, loss, seconds, _ = report.rows[-1]
        print(f"held out {loss:.4f} bits per byte after {steps} steps, {fleet.world_size} "
              f"rank{'s' * (fleet.world_size > 1)}, {seconds:.1f} s")
        if options.output:
            torch.save(trainer.model.state_dict(), options.output)
            print(f"saved the model to {os.path.abspath(options.output)}")
    pyfleet.shutdown()


if __name__ == "__main__":
    main()
