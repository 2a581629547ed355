"""Loss against bytes and against time: what each compression costs and spares in training the examples, as a plot.

Ranks train on hosts of the test network (or on one host over loopback, with --rate none) with each method in turn, from the
same weights on the same samples. Losses are of samples that are held out; bytes are what rank 0 sent to other hosts, counted
at the socket; seconds are those of training alone.
"""
from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterator

import torch
from torch.nn import functional

from bench.options import OtherWork, ended_by_signals, print_machine
from bench.ranks import Ranks, RanksFailed, Team
from bench.report import parse_list, table, tell_troubles
from pyfleet.compressors import parse_spec
from pyfleet.errors import ConfigError
from pyfleet.trainer import Callback, Trainer

# Momentum correction and warm-up are what lets a hundredth of the gradient do: see pyfleet.compressors.topk.
METHODS = ("none", "bf16", "int8", "int4", "topk(ratio=0.01)", "topk(ratio=0.01, warmup=100)",
           "topk(ratio=0.01, warmup=100, momentum=0.9)", "powersgd(rank=4)")
RATE = "100mbit"            # of old switches and good WiFi: where a gradient of half a megabyte takes longer than the step
EPOCHS, STEPS = 40, 400     # of digits, of gpt: half a minute each on two cores
SMOOTHING = 0.1             # of the labels of digits: without it the loss goes to 1e-4, where nothing can be compared
POINTS = 20                 # of a curve
SKIPPED = 2                 # of them, at the start, may lie above the plot: all methods fall from the same height


class Curve(Callback):
    """Steps, held-out loss, seconds of training, bytes sent so far: at POINTS places of a training."""

    def __init__(self, num_steps: int):
        self._every, self._seconds, self._since = max(1, num_steps // POINTS), 0.0, 0.0
        self.points: list[tuple[int, float, float, int]] = []

    def on_fit_start(self, trainer: Trainer) -> None:
        self._before = sent_bytes(trainer)
        self._look(trainer)

    def on_step_end(self, trainer: Trainer) -> None:
        if trainer.num_steps % self._every == 0:
            self._seconds += time.perf_counter() - self._since
            self._look(trainer)

    def on_fit_end(self, trainer: Trainer) -> None:
        if self.points[-1][0] != trainer.num_steps:
            self._seconds += time.perf_counter() - self._since
            self._look(trainer)

    def _look(self, trainer: Trainer) -> None:
        sent = sent_bytes(trainer) - self._before
        self.points.append((trainer.num_steps, trainer.evaluate()["loss"], self._seconds, sent))
        self._since = time.perf_counter()


def sent_bytes(trainer: Trainer) -> int:
    """What this rank sent to the others, as its sockets count it."""
    return sum(link["sent_bytes"] for link in trainer.engine.stats()["links"].values())


# The ranks' side.

def digits_trainer(method: str, options: dict) -> tuple[Trainer, Curve]:
    """The digits example, with smoothed labels and a rate that falls to zero."""
    from pyfleet.config import TrainingConfig
    from pyfleet.data import seed_all
    from pyfleet.examples import digits, gpt

    training, held_out = digits.load_digits()
    seed_all(options["seed"])
    config = TrainingConfig(epochs=options["epochs"], seed=options["seed"], compression=method, device="cpu", progress=False)
    num_steps = config.epochs * -(-len(training[1]) // config.batch_size)
    curve = Curve(num_steps)
    return Trainer(digits.make_model(), training, config, eval_dataset=held_out,
                   loss_fn=lambda output, target: functional.cross_entropy(output, target, label_smoothing=SMOOTHING),
                   callbacks=[curve, gpt.Schedule(num_steps, config.learning_rate, 0.0, 0)]), curve


def gpt_trainer(method: str, options: dict) -> tuple[Trainer, Curve]:
    """The GPT example, by SGD: what stands in for its momentum, or works on it, can be compared."""
    from pyfleet.examples import gpt

    settings = gpt.parse(["--optimizer", "sgd", "--batch-size", "16", "--warmup", "30", "--steps", str(options["steps"]),
                          "--seed", str(options["seed"]), "--compression", method, *options["gpt"]])
    curve = Curve(settings.steps)
    return gpt.make_trainer(settings, curve), curve


WORKLOADS: dict[str, Callable[[str, dict], tuple[Trainer, Curve]]] = {"digits": digits_trainer, "gpt": gpt_trainer}


def rank_main(team: Team, options: dict) -> None:
    """Train every workload with every method; all ranks run this, each on its host."""
    import pyfleet

    os.environ |= {"PYFLEET_RANK": str(team.rank), "PYFLEET_WORLD_SIZE": str(team.size), "PYFLEET_ENCRYPTION": "off",
                   "PYFLEET_RENDEZVOUS": f"file://{team.folder}/meet", "PYFLEET_TRANSPORT": "tcp"}
    torch.set_num_threads(1)
    pyfleet.init().engine.measure_links()       # now, and not in the bytes of the first training that sends enough for it
    for workload in options["workloads"]:
        for method in options["methods"]:
            team.progress(f"{workload} with {method}")
            trainer, curve = WORKLOADS[workload](method, options)
            trainer.callbacks.append(_Alive(team))
            trainer.fit()
            team.emit(kind="curve", workload=workload, method=method, points=curve.points)
    pyfleet.shutdown()


class _Alive(Callback):
    """Shows the parent that steps are made."""

    def __init__(self, team: Team):
        self._team = team

    def on_step_end(self, trainer: Trainer) -> None:
        self._team.tick()


# The parent's side.

def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench tradeoff", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", type=parse_list, default=list(WORKLOADS), metavar="A,B",
                        help="default " + ",".join(WORKLOADS))
    parser.add_argument("--methods", default=";".join(METHODS), metavar="A;B", help="specifications (default %(default)s)")
    parser.add_argument("--ranks", type=int, default=2, help="each on a host of its own (default 2)")
    parser.add_argument("--rate", default=RATE, help="of every host's link, each way (default %(default)s); none: loopback")
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="of digits (default %(default)s)")
    parser.add_argument("--steps", type=int, default=STEPS, help="of gpt (default %(default)s)")
    parser.add_argument("--gpt", default="", metavar="OPTIONS", help='more for gpt, such as "--model-dim 128 --layers 4"')
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--draw", metavar="FILE", help="train nothing: draw the figures of an earlier run again")
    parser.add_argument("--png", default="tradeoff.png", metavar="FILE", help="the plot; its figures go beside it, as .json")
    options = parser.parse_args(argv)
    options.methods = [method.strip() for method in options.methods.split(";") if method.strip()]
    options.gpt = options.gpt.split()
    if unknown := [name for name in options.workloads if name not in WORKLOADS]:
        parser.error(f"no workload called {unknown[0]!r}; there are: {', '.join(WORKLOADS)}")
    if options.ranks < 2 or min(options.epochs, options.steps) < 1 or not options.methods:
        parser.error("2 ranks or more, an epoch, a step and a method")
    try:
        for method in options.methods:
            parse_spec(None if method == "auto" else method)
    except ConfigError as error:
        parser.error(str(error))
    return options


def main(argv: list[str]) -> int:
    """Run the benchmark; 0 when every training came to its end."""
    options = _arguments(argv)
    try:
        import matplotlib  # noqa: F401 before minutes are spent
    except ImportError:
        print("bench: the plot needs matplotlib: pip install 'pyfleet[plot]'", file=sys.stderr)
        return 2
    if options.draw:
        plot(json.loads(pathlib.Path(options.draw).read_text()), pathlib.Path(options.png))
        print(f"wrote {options.png}")
        return 0
    record: dict = {"benchmark": "tradeoff", "ranks": options.ranks, "rate": options.rate, "curves": [], "troubles": []}
    png, others = pathlib.Path(options.png), OtherWork()
    with ended_by_signals(), _hosts(options) as prefix:
        if prefix is None:
            return 2
        record["machine"] = print_machine("cubic" if options.rate != "none" else "the machine's")
        job = {name: getattr(options, name) for name in ("workloads", "methods", "epochs", "steps", "gpt", "seed")}
        try:
            with Ranks("bench.tradeoff", options.ranks, job, prefix=prefix) as ranks:
                for event in ranks.events():
                    record["curves"].append({key: event[key] for key in ("workload", "method", "points")})
                    print(f"  {event['workload']} with {event['method']} done", file=sys.stderr, flush=True)
        except RanksFailed as error:
            record["troubles"].append({"system": "all", "size": None, "reason": str(error)})
    record["other_work_cores"] = others.cores()
    png.with_suffix(".json").write_text(json.dumps(record, indent=1))
    print(told(record), flush=True)
    if record["curves"]:
        plot(record, png)
        print(f"\nwrote {png} and {png.with_suffix('.json')}")
    return 1 if record["troubles"] else 0


@contextlib.contextmanager
def _hosts(options: argparse.Namespace) -> Iterator[Callable[[int], list[str]] | None]:
    """What starts a rank on its host; None, and a message, where there can be no hosts."""
    if options.rate == "none":
        yield lambda rank: []
        return
    from tests import network as networks

    if reason := networks.unavailable():
        print(f"bench: no network of hosts: {reason}; --rate none trains over loopback", file=sys.stderr)
        yield None
        return
    with networks.Network(options.ranks, options.rate) as network:
        yield lambda rank: ["nsenter", f"--net={network.namespace(rank)}", "--"]


def told(record: dict) -> str:
    """The ends of all curves, beside that of float32, as a table."""
    plain = {curve["workload"]: curve["points"][-1] for curve in record["curves"] if curve["method"] == "none"}
    lines = []
    for curve in record["curves"]:
        steps, loss, seconds, sent = curve["points"][-1]
        dense = plain.get(curve["workload"])
        against = (f"{100 * (loss / dense[1] - 1):+.1f} %", f"{100 * sent / dense[3]:.1f} %", f"{dense[2] / seconds:.2f}") \
            if dense else ("", "", "")
        lines.append([curve["workload"], curve["method"], str(steps), f"{loss:.4f}", against[0], f"{sent / 1e6:.2f} MB", against[1],
                      f"{seconds:.1f} s", against[2]])
    header = ["workload", "method", "steps", "held-out loss", "against none", "sent", "of none", "training", "times as fast"]
    where = f"{record['ranks']} hosts, {record['rate']}" if record["rate"] != "none" else f"{record['ranks']} ranks, loopback"
    return "\n\n".join(filter(None, [f"\n{where}; losses in nats, seconds without evaluation", table(header, lines, left=2),
                                     tell_troubles(record["troubles"], record["other_work_cores"])]))


def plot(record: dict, path: pathlib.Path) -> None:
    """Write the curves as a PNG: a row a workload, loss against bytes on the left and against time on the right."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image

    workloads = list(dict.fromkeys(curve["workload"] for curve in record["curves"]))
    methods = list(dict.fromkeys(curve["method"] for curve in record["curves"]))
    figure = Figure(figsize=(10, 3.6 * len(workloads) + 1.0), layout="constrained")
    FigureCanvasAgg(figure)
    for row, axes in zip(workloads, figure.subplots(len(workloads), 2, squeeze=False), strict=True):
        for curve in (curve for curve in record["curves"] if curve["workload"] == row):
            _, losses, seconds, sent = zip(*curve["points"], strict=True)
            style = {"color": f"C{methods.index(curve['method'])}", "linewidth": 1.5, "label": curve["method"]}
            axes[0].plot([max(each, 1) / 1e6 for each in sent[1:]], losses[1:], **style)
            axes[1].plot(seconds, losses, **style)
        axes[0].set(xscale="log", xlabel="MB sent by a rank, at the socket", ylabel=f"{row}: held-out loss (nats)")
        axes[1].set(xlabel=f"seconds of training, {record['rate'] if record['rate'] != 'none' else 'loopback'}")
        losses = [loss for curve in record["curves"] if curve["workload"] == row for _, loss, *_ in curve["points"]]
        begun = [curve["points"][min(SKIPPED, len(curve["points"]) - 1)][1]
                 for curve in record["curves"] if curve["workload"] == row]
        for each in axes:
            each.grid(alpha=0.3)
            each.set_ylim(min(losses) - 0.05 * (min(begun) - min(losses)) - 1e-3, max(begun) + 1e-3)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(4, len(labels)), fontsize="small")
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=90)
    Image.open(drawn).convert("RGB").quantize(64).save(path, optimize=True)     # a plot has few colours: half the bytes
