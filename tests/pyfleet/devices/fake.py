"""A device without hardware: its tensors lie in host memory, its copies take the time that a bandwidth says."""
from __future__ import annotations

import queue
import threading
import time

import torch

from pyfleet import devices
from pyfleet.devices.base import Device

PATIENCE_S = 30
NAME = "fake"


class FakePlace:
    type, index = NAME, 0

    def __repr__(self):
        return NAME


class FakeTensor(torch.Tensor):
    """A tensor on the fake device."""

    device = property(lambda self: FakePlace())


def plain(tensor):
    """The same memory as an ordinary tensor."""
    return tensor.as_subclass(torch.Tensor)


class Lane:
    """One direction: copies one after the other on a thread. Bytes appear at the end, as late as they may."""

    def __init__(self, device, name):
        self.device, self.name, self.jobs, self.num_started = device, name, queue.SimpleQueue(), 0
        threading.Thread(target=self.serve, daemon=True, name=f"fake-{name}").start()

    def start(self, target, source):
        job = {"over": threading.Event(), "error": None, "number": self.num_started}
        self.num_started += 1
        self.jobs.put((job, target, source))

        def wait():
            assert job["over"].wait(PATIENCE_S), f"copy {self.name} {job['number']} hangs"
            if job["error"] is not None:
                raise job["error"]
        return wait

    def serve(self):
        while True:
            job, target, source = self.jobs.get()
            began = time.monotonic()
            try:
                self.device.on_copy(self.name, job["number"])
                if (self.name, job["number"]) == self.device.fail:
                    raise RuntimeError("the fake device is broken")
                if self.device.bytes_per_s:
                    time.sleep(source.numel() * source.element_size() / self.device.bytes_per_s)
                target.copy_(source)
            except BaseException as error:      # noqa: BLE001 wait() raises it
                job["error"] = error
            self.device.copies.append((self.name, job["number"], began, time.monotonic()))
            job["over"].set()


class FakeDevice(Device):
    """Attributes: bytes_per_s: of each direction, None for as fast as it goes. fail: (direction, number) of the copy that
    fails. copies: (direction, number, began, ended) in seconds of time.monotonic(). locked: {address: bytes} by now.
    marks, followed: what mark() gave out and follow() got. on_copy: called with (direction, number) as each begins.
    """

    def __init__(self):
        self.reset()
        self.locked, self.num_locks = {}, 0

    def reset(self, bytes_per_s=None, fail=None, on_copy=lambda direction, number: None):
        self.bytes_per_s, self.fail, self.on_copy, self.copies, self.marks, self.followed = bytes_per_s, fail, on_copy, [], [], []
        self.lanes = {name: Lane(self, name) for name in ("out", "in")}

    def present(self):
        return True

    def mark(self, tensor):
        self.marks.append(len(self.marks))
        return self.marks[-1]

    def follow(self, mark, tensor):
        self.followed.append(mark)

    def start_copy(self, target, source, mark):
        assert mark is None or mark in self.marks
        inward = isinstance(target, FakeTensor)
        assert inward or isinstance(source, FakeTensor)
        return self.lanes["in" if inward else "out"].start(plain(target), plain(source))

    def lock_pages(self, address, nbytes):
        assert address not in self.locked
        self.num_locks += 1
        self.locked[address] = nbytes
        return lambda: self.locked.pop(address)


def register():
    """Put the fake into the table of this process, and return it."""
    devices.DEVICES[NAME] = f"{__name__}:FakeDevice"
    return devices.open_device(NAME)


def unregister():
    """Take it out again."""
    devices.DEVICES.pop(NAME, None)
    devices._opened.pop(NAME, None)


def on_device(tensor):
    """The tensor, on the fake device."""
    return tensor.as_subclass(FakeTensor)
