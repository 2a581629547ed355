import pytest

import pyfleet
from pyfleet.config import TrainingConfig
from pyfleet.engines import set_current
from pyfleet.trainer import Trainer


@pytest.fixture
def alone(thread_ranks, monkeypatch):
    """alone(example.main, *arguments): run it in a fleet of one."""
    def run(main, *argv):
        def rank(engine):
            set_current(engine)
            for name, value in {"init": lambda: engine, "shutdown": lambda: None, "Trainer": Trainer,
                                "TrainingConfig": TrainingConfig}.items():
                monkeypatch.setattr(pyfleet, name, value, raising=False)
            main(list(argv))
        try:
            thread_ranks(1, rank)
        finally:
            set_current(None)
    return run
