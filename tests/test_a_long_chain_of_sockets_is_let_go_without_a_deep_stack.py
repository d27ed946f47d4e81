"""B56: letting go of one object lets go of the next, a hundred thousand times: in a loop, not by recursion in C."""

import pytest
from helpers import run_python

CHAIN = """
import gc, resource, socket, sys, threading, weakref
import tstpool

class Thing:
    pass

LENGTH = int(sys.argv[2])
over = threading.Semaphore(0)

class Ends(tstpool.TstHandler):
    def on_disconnect(self, sock, reason):
        over.release()

pool = tstpool.TstPool(Ends(), workers=1)
pool.listen("127.0.0.1", 0)
pool.start()
socks = []
for i in range(LENGTH):
    ours, theirs = socket.socketpair()
    socks.append(pool.addsocket(theirs))
    ours.close()
    over.acquire()
assert pool.stop() is True  # what they were given until now is let go, what they are given from now on stays
chain = None
alive = []
for i, sock in enumerate(socks):
    if sys.argv[1] == "user_data":
        sock.user_data = chain
    elif sys.argv[1] == "tuple":
        sock.user_data = (chain,)
    else:
        sock.user_data = Thing()
        sock.user_data.next = chain
    if i == 0:
        last = Thing()
        sock.user_data = last
        alive.append(weakref.ref(last))
        del last
    chain = sock
del sock, socks
assert alive[0]() is not None
if sys.argv[3] == "cycle":
    first = chain
    thing = alive[0]()
    thing.first = first  # now only a collection can let go of them
    del thing, first
# Deep recursion is noticed at once; but from 3.12 on CPython itself lets deallocation go 10,000 calls deep.
threading.stack_size(1 << (17 if sys.version_info < (3, 12) else 23))

def let_go():
    global chain
    chain = None
    gc.collect()

thread = threading.Thread(target=let_go)
thread.start()
thread.join()
assert alive[0]() is None
print("let go")
"""


@pytest.mark.parametrize("by", ["nothing", "cycle"])
@pytest.mark.parametrize("kind", ["user_data", "tuple", "object"])
def test_a_chain(kind, by):
    """B56: each socket is the user_data of the next, or inside it; a count or a collection ends the chain."""
    assert run_python("-c", CHAIN, kind, "10000", by).stdout == "let go\n"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["user_data", "tuple", "object"])
def test_a_chain_of_a_hundred_thousand(kind):
    """B56: the figure of the case."""
    assert run_python("-c", CHAIN, kind, "100000", "nothing", timeout=300).stdout == "let go\n"
