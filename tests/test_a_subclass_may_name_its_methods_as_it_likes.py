"""A subclass's methods are its own: the engine calls none of them, whatever they are called."""

import pytest
from contract_helpers import echo, handler, round_trip
from helpers import patient, run_python

from tstpool import TstPool

WITH_WORK = """
import os, socket, sys, tstpool

patience = float(sys.argv[1])
calls = []

class Pool(tstpool.TstPool):
    def work(self, *arguments):
        calls.append(arguments)
        return "mine"

class Echo(tstpool.TstHandler):
    def on_message(self, sock, data):
        return data

pool = Pool(Echo(), workers=2)
address = pool.listen("127.0.0.1", 0)
pool.start()
answers = []
for _ in range(3):
    with socket.create_connection(address, patience) as client:
        client.sendall(b"hello")
        try:
            answers.append(client.recv(5))
        except TimeoutError:
            break
print(answers, pool.work(1), calls, pool.stop(patience), flush=True)
os._exit(0)  # a pool that never ends would hold the interpreter
"""


def test_a_pool_with_a_method_of_its_own_called_work_serves_as_any():
    """In a process of its own, as such a pool once never ended."""
    printed = run_python("-c", WITH_WORK, str(patient(3))).stdout
    assert printed == "[b'hello', b'hello', b'hello'] mine [(1,)] True\n"


def test_what_a_worker_runs_is_no_method_of_the_pool(make_pool, make_client):
    """Nobody can call it by mistake."""
    pool = make_pool(handler(on_message=echo))
    assert not hasattr(TstPool, "work")
    with pytest.raises(AttributeError):
        pool.work(0, 0)
    assert round_trip(make_client(pool), b"hello") == b"hello"
