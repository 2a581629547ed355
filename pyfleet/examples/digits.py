"""Handwritten digits, trained on all ranks:  pyfleet-launch --nproc 2 -m pyfleet.examples.digits

The 1797 pictures come with scikit-learn, so nothing is downloaded. Whatever --nproc is, the result is the same but
for rounding, and with --double there is little of that.
"""
from __future__ import annotations

import argparse
import os
import sys

import torch
from torch import nn

import pyfleet
from pyfleet.data import global_order, seed_all
from pyfleet.trainer import Callback


def load_digits() -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """(pictures, digits) to train on, four fifths, and to test with; the same split each time."""
    try:
        from sklearn import datasets
    except ImportError:
        sys.exit("This example needs scikit-learn for its pictures: pip install scikit-learn")
    digits = datasets.load_digits()
    pictures = (torch.from_numpy(digits.images).float().unsqueeze(1) - 4.9) / 6.0       # mean 0, deviation 1
    labels = torch.from_numpy(digits.target).long()
    order = torch.from_numpy(global_order(len(labels), seed=0, epoch=0))
    train, test = order.split([len(order) * 4 // 5, len(order) - len(order) * 4 // 5])
    return (pictures[train], labels[train]), (pictures[test], labels[test])


def make_model() -> nn.Module:
    """A small convolutional network for 8x8 pictures."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 10))


class Report(Callback):
    """One line per epoch, on rank 0."""

    def __init__(self):
        self.sent_before = 0

    def on_epoch_end(self, trainer, record):
        sent = sent_bytes(trainer.engine.stats())
        if trainer.engine.rank == 0:
            print(f"epoch {record['epoch'] + 1:3}   loss {record['loss']:.4f}   "
                  f"{record['samples_per_second']:8,.0f} samples/s   {(sent - self.sent_before) / 1e6:6.2f} MB exchanged",
                  flush=True)
        self.sent_before = sent


def sent_bytes(stats: dict) -> int:
    """What this rank sent to other hosts, and read from the memory of ranks on its own."""
    return sum(link["sent_bytes"] for link in stats["links"].values()) + stats["shared_memory"].get("read_bytes", 0)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m pyfleet.examples.digits", description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=128, help="over all ranks together (default %(default)s)")
    parser.add_argument("--lr", type=float, default=0.1, help="learning rate (default %(default)s)")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--output", default="digits.pt", help="where rank 0 saves the model (default %(default)s)")
    parser.add_argument("--compression", default="none", metavar="SPEC",
                        help='how gradients travel: auto, int8, fp16, "topk(ratio=0.01)+fp16", ... (default %(default)s)')
    parser.add_argument("--double", action="store_true", help="compute in float64")
    arguments = parser.parse_args(argv)

    training, test = load_digits()
    fleet = pyfleet.init()
    torch.set_num_threads(1)        # pictures this small: a second thread would only wait for the first
    seed_all(arguments.seed)
    model = make_model()
    if arguments.double:
        model, training, test = model.double(), (training[0].double(), training[1]), (test[0].double(), test[1])

    trainer = pyfleet.Trainer(
        model, training, eval_dataset=test, callbacks=[Report()], training_config=pyfleet.TrainingConfig(
            epochs=arguments.epochs, batch_size=arguments.batch_size, learning_rate=arguments.lr, seed=arguments.seed,
            compression=arguments.compression, device="cpu", progress=False))
    trainer.fit()

    accuracy = trainer.evaluate()["accuracy"]
    if fleet.rank == 0:
        print(f"test accuracy {accuracy:.4f} on {len(test[1])} pictures, {fleet.world_size} "
              f"rank{'s' * (fleet.world_size > 1)}, {trainer.stats['seconds']:.1f} s")
        torch.save(model.state_dict(), arguments.output)
        print(f"saved the model to {os.path.abspath(arguments.output)}")
    pyfleet.shutdown()


if __name__ == "__main__":
    main()
