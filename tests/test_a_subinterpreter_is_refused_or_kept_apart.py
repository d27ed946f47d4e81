"""B50: the engine's threads belong to the interpreter that started them."""

import pytest
from helpers import run_python

# Each version has another name for it, and another way to say that the code failed.
INTERPRETERS = """
try:
    import _interpreters as interpreters
except ImportError:
    import _xxsubinterpreters as interpreters

def run(code):
    other = interpreters.create()
    try:
        if hasattr(interpreters, "exec"):
            failure = interpreters.exec(other, code)
            return None if failure is None else f"{failure.type.__name__}: {failure.msg}"
        interpreters.run_string(other, code)
    except Exception as error:
        return str(error)
    finally:
        interpreters.destroy(other)
"""

BESIDE_A_RUNNING_POOL = """
import socket
import tstpool

class Echo(tstpool.TstHandler):
    def on_message(self, sock, data):
        sock.send(data)

with tstpool.TstPool(Echo(), workers=2) as pool:
    address = pool.listen("127.0.0.1", 0)
    with socket.create_connection(address, 10) as client:
        for _ in range(5):
            failure = run("import tstpool; pool = tstpool.TstPool(lambda sock: None); pool.start(); pool.stop()")
            assert failure is None or "ImportError" in failure, failure
            client.sendall(b"hello")
            assert client.recv(5) == b"hello"
print("refused" if failure else "kept apart")
"""

BEFORE_THE_MAIN_ONE = """
failure = run("import tstpool")
assert failure is None or "ImportError" in failure, failure
import tstpool  # at most one of the two may have it
print("done")
"""


def skip_without_interpreters():
    if run_python("-c", INTERPRETERS, check=False).returncode:
        pytest.skip("this Python has no module for subinterpreters")


def test_beside_a_running_pool():
    """B50: the import raises ImportError, or the other interpreter's pool is its own; the pool that runs goes on."""
    skip_without_interpreters()
    done = run_python("-c", INTERPRETERS + BESIDE_A_RUNNING_POOL)
    assert done.stdout in ("refused\n", "kept apart\n")
    assert "Fatal" not in done.stderr


def test_before_the_main_interpreter():
    """B50: whoever comes second gets an ImportError, or both may have it; nobody crashes."""
    skip_without_interpreters()
    done = run_python("-c", INTERPRETERS + BEFORE_THE_MAIN_ONE, check=False)
    assert "Fatal" not in done.stderr
    assert (done.returncode, done.stdout) == (0, "done\n") or "ImportError" in done.stderr, done.stderr
