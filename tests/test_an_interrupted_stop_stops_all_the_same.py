"""B49: Ctrl-C inside stop(), while it takes the unix socket's file away."""

from helpers import patient, run_python

SCENE = """
import faulthandler, os, signal, socket, sys, threading, time
from tstpool import TstHandler, TstPool, _net

path, patience = sys.argv[1], float(sys.argv[2])
faulthandler.dump_traceback_later(patience, exit=True)
signal.signal(signal.SIGINT, signal.default_int_handler)
pool = TstPool(TstHandler(), workers=2)
pool.listen("unix:" + path)
pool.start()
real = _net.file_of

def interrupted(address):
    _net.file_of = real
    signal.raise_signal(signal.SIGINT)
    return real(address)

with socket.socket(socket.AF_UNIX) as client:
    client.settimeout(patience)
    client.connect(path)
    while len(pool) == 0:  # a client that is not accepted yet is reset
        time.sleep(0.001)
    _net.file_of = interrupted
    try:
        pool.stop(0)
    except KeyboardInterrupt:
        print("interrupted", pool.running, flush=True)
    if pool.running:
        os._exit(1)
    print(client.recv(1))
while threading.active_count() > 1:
    time.sleep(0.001)
print(pool.stop(0), os.path.exists(path))
"""


def test_the_pool_ends_and_the_next_stop_removes_the_file(tmp_path):
    """B49: it is as if the stop had begun, whatever has become of the call."""
    out = run_python("-c", SCENE, str(tmp_path / "socket"), str(patient(10))).stdout
    assert out == "interrupted False\nb''\nTrue False\n"
