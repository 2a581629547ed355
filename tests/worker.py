"""The processes behind tests.ranks.

python -m tests.worker init|bare FD: one rank; runs the functions that come over FD until None comes.
python -m tests.worker nursery FD: imports what ranks need, then forks one for every request that comes over FD.
"""
import importlib
import json
import os
import pickle
import signal
import socket
import sys
import traceback
from multiprocessing.connection import Connection


def nursery(sock):
    for module in ("numpy", "torch", "pytest", "pyfleet.fleet", "pyfleet.collectives"):
        importlib.import_module(module)
    while True:
        data, fds, _, _ = socket.recv_fds(sock, 65536, 1)
        if not data:
            return
        mode, env, namespace = json.loads(data)
        said, tell = os.pipe()
        child = os.fork()
        if child == 0:
            grandchild = os.fork()
            if grandchild:
                os.write(tell, str(grandchild).encode())
                os._exit(0)
            for fd in (sock.fileno(), said, tell):
                os.close(fd)
            os.environ.update(env)
            if namespace:
                from tests.network import enter
                enter(namespace)
            rank(mode, fds[0])
            return
        os.close(tell)
        os.close(fds[0])
        sock.send(os.read(said, 100))
        os.close(said)
        os.waitpid(child, 0)


def rank(mode, fd):
    signal.signal(signal.SIGINT, signal.default_int_handler)
    pipe = Connection(fd)
    if mode == "init":
        answer(pipe, start)
    while True:
        try:
            task = pipe.recv()
        except EOFError:
            break
        if task is None:
            break
        answer(pipe, *task)
    import pyfleet
    pyfleet.shutdown()
    sys.stdout.flush()
    os._exit(0)             # torch takes half a second to take an interpreter apart


def start():
    import pyfleet
    pyfleet.init()


def answer(pipe, function, args=()):
    try:
        reply = (True, function(*args), None)
        pickle.dumps(reply)
    except BaseException as error:      # noqa: BLE001 whatever it is, the test wants to see it
        trace = traceback.format_exc()
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:               # noqa: BLE001 an exception may fail to travel in any way
            error = RuntimeError(f"{type(error).__name__}: {error}")
        reply = (False, error, trace)
    pipe.send(reply)


if __name__ == "__main__":
    if sys.argv[1] == "nursery":
        nursery(socket.socket(fileno=int(sys.argv[2])))
    else:
        rank(sys.argv[1], int(sys.argv[2]))
