"""Plants faults in the engine, one at a time, and counts the seeds that the simulation needs to find each.

    python tests/simulation/mutate.py [--seeds 4000] [name ...]      a minute for each

Each is a change of a few words in a header, made in a scratch copy of the tree; only the simulation is built there.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# name: (header, what stands there, what is put in its place)
FAULTS = {
    "close before epoll's DEL": (
        "_poll",
        "    if connection.registered:\n        sys_control(connection.epoll_fd, EPOLL_CTL_DEL, fd, 0, 0)\n",
        "",
    ),
    "the generation is not counted": (
        "_poll",
        "<uint64_t>(generation_of(word) + 1) << 32",
        "<uint64_t>(generation_of(word) + 0) << 32",
    ),
    "a release forgets what others asked": (
        "_conn",
        "idle = (word | pending) & ~<uint64_t>(STATE_OWNED",
        "idle = (word & ~<uint64_t>PEND_ANY | pending) & ~<uint64_t>(STATE_OWNED",
    ),
    "an owned connection may be acquired": (
        "_conn",
        "        if tst_rarely(word & STATE_OWNED != 0):\n            return BUSY\n",
        "",
    ),
    "a push wakes nobody": (
        "_shard",
        "    if load32(&shard.sleeping, SEQ_CST):\n",
        "    if False:\n",
    ),
    "the sleep does not look for requests": (
        "_turn",
        "if load_pointer(&shard.requests, SEQ_CST) != NULL or (",
        "if (",
    ),
    "no second look after the release": (
        "_entry",
        "again = queue_size(&connection.out) != 0 and not",
        "again = False and not",
    ),
    "the usual end does not look at the queue": (
        "_entry",
        "released = (tst_usually(queue_size(&connection.out) == 0) and connection",
        "released = (connection",
    ),
    "the usual end forgets the timer": (
        "_entry",
        "    return connection.has_timer and not tick_before(tick + limits.idle, connection.timer_due)\n",
        "    return True\n",
    ),
    "the usual end takes any mask": (
        "_entry",
        "    return tst_usually(connection.armed == connection_input_mask(connection)) and tst_usually(\n",
        "    return tst_usually(\n",
    ),
    "two flush at once": ("_poll", "or connection.flushing or queue_size", "or queue_size"),
    "an edge of a busy connection is dropped": (
        "_collect",
        "    if owned and connection.trigger == TRIGGER_EDGE:\n",
        "    if False:\n",
    ),
    "a short send is taken for a whole one": (
        "_poll",
        "queue_consume(&connection.out, <size_t>sent)",
        "queue_consume(&connection.out, total)",
    ),
    "a broken connection spins until resume()": (
        "_entry",
        "not connection.closing and (not connection.end_of_input or connection.hold_input):",
        "not connection.closing:",
    ),
    "it breaks unnoticed after the last look": (
        "_entry",
        "    if connection_is_over(connection, connection_takes_messages(connection)):\n        return PEND_IN ",
        "    if False:\n        return PEND_IN ",
    ),
    "a reply that was cut short ends cleanly": (
        "_entry",
        "for the whole\n        connection.aborted = True\n",
        "for the whole\n        pass\n",
    ),
    "accepted into a shard that has ended": (
        "_collect",
        "if load32(&engine.phase, SEQ_CST) == PHASE_RUNNING:\n        return False",
        "if load32(&engine.phase, SEQ_CST) < 99:\n        return False",
    ),
    "B07: a refused mask is kept to oneself": (
        "_entry",
        "    if armed < 0:\n        shard_ask(connection, entry.generation, PEND_CLOSE)\n",
        "",
    ),
    "B07: a refused mask is not noticed": (
        "_poll",
        "EPOLLONESHOT, stats)\n    if result < 0:\n        connection_deafened(connection, -result)\n",
        "EPOLLONESHOT, stats)\n",
    ),
    "B07: a refused mask ends the neighbour": (
        "_entry",
        "connection_deafened(connection, -armed)",
        "connection_deafened(connection + 1, -armed)",
    ),
    "B08: a signal ends the pool": (
        "_poll",
        "return 0 if errno == EINTR else -errno\n    return n",
        "return -errno\n    return n",
    ),
    "B08: after a signal it sleeps on, and says that it does not": (
        "_turn",
        "    store32(&shard.sleeping, SLEEPING_NOT, RELAXED)\n    if engine.busy_poll:",
        "    store32(&shard.sleeping, SLEEPING_NOT, RELAXED)\n    if n == 0:\n"
        "        n = sys_wait(shard.epoll_fd, batch.events, BATCH_EVENTS, timeout)\n    if engine.busy_poll:",
    ),
    "B08: a signal is taken for the end of idle_time": (
        "_turn",
        "now - load64(&worker.waiting_since, RELAXED) >= engine.idle_time:",
        "True:",
    ),
    "B08: a timer ends whoever it finds": (
        "_entry",
        "    if tick_before(tick_of(now), due):\n        return\n    if kind < DEADLINE_WRITE",
        "    if kind < DEADLINE_WRITE",
    ),
    "B10: a stale event is not counted": (
        "_collect",
        "not connection_is(connection, generation)):\n        count_stale(&worker.stats, connection)\n",
        "not connection_is(connection, generation)):\n",
    ),
    "B10: every event has a slot": (
        "_collect",
        "if tst_rarely(connection == NULL) or tst_rarely(not connection_is",
        "if tst_rarely(not connection_is",
    ),
    "B12: an event of a stuck owner comes for ever": (
        "_collect",
        "if connection.trigger == TRIGGER_LEVEL and events & (input_mask() | EPOLLERR | EPOLLHUP):\n            conn",
        "if False:\n            conn",
    ),
    "B12: an empty mask is taken for silence": (
        "_poll",
        "cdef uint32_t mask = EPOLLONESHOT\n    cdef int result\n    if output_mask",
        "cdef uint32_t mask = 0\n    cdef int result\n    if output_mask",
    ),
    "B12: a stuck owner is asked over and over": (
        "_shard",
        "if not connection_mark(connection, PEND_ROOM, True, STATE_OPEN | STATE_OWNED, generation):",
        "if True:",
    ),
    "B12: a silenced connection stays silent": (
        "_entry",
        "armed = connection_arm(connection, want_input, &worker.stats)",
        "armed = 0 if connection.registered else connection_arm(connection, want_input, &worker.stats)",
    ),
    "broadcast: its references are not counted": (
        "_queue",
        "add32(&shared.users, 1, RELAXED)",
        "add32(&shared.users, 1 if shared.object != NULL else 0, RELAXED)",
    ),
    "broadcast: its payload is never freed": (
        "_queue",
        "        free(shared)\n        return\n    spin_lock",
        "        return\n    spin_lock",
    ),
    "transfer: input behind it is forgotten": (
        "_entry",
        "input_consume(&connection.input, <size_t>used)",
        "input_consume(&connection.input, connection.input.size)",
    ),
    "transfer: bytes received in place do not count": (
        "_entry",
        "data_unpin(data, n, now)",
        "data_unpin(data, 0, now)",
    ),
    "transfer: a SEND is done too early": (
        "_entry",
        "sent = connection.out.sent >= connection.send_mark",
        "sent = True",
    ),
    "block: more than max_queued is taken": (
        "_conn",
        "if limits.max_queued and waits >= limits.max_queued:",
        "if False:",
    ),
    "block: what was dropped still counts": (
        "_conn",
        "    if tst_rarely(counts != connection.counted):\n",
        "    if counts > connection.counted:\n",
    ),
    "reconnected: the new peer gets what is left": (
        "_entry",
        "# what it sends is the old one's\n    output_drop(connection)\n",
        "# what it sends is the old one's\n",
    ),
    "reconnected: unread input is taken for the new peer's": (
        "_entry",
        "    cdef tst_data *data\n    input_free(&connection.input)\n",
        "    cdef tst_data *data\n",
    ),
    "reconnected: epoll may still have the old one": (
        "_entry",
        "    sys_control(connection.epoll_fd, EPOLL_CTL_DEL, connection.fd, 0, 0)   # dup2",
        "    # dup2",
    ),
    "spare: what is no message like the last one stays in its object": (
        "_entry",
        "    memcpy(batch.scratch.bytes + batch.scratch_used, place, <size_t>n)\n",
        "    pass\n",
    ),
    "spare: the header is not looked at": (
        "_entry",
        "    if (<size_t>n == whole\n"
        "            and frame_next(connection.framing, place, whole, &connection.scanned, &connection.frame) == 1\n"
        "            and connection.frame.whole == whole):\n",
        "    if <size_t>n == whole:\n",
    ),
    "spare: the byte behind the message is dropped": (
        "_entry",
        "    if (<size_t>n == whole\n",
        "    if (<size_t>n >= whole\n",
    ),
    "spare: what is behind that byte goes over it": (
        "_entry",
        "        n += receive_rest(connection, batch, <size_t>n)\n",
        "        n += receive_rest(connection, batch, <size_t>n - 1)\n",
    ),
    "reconnected: a close that was heard comes again": (
        "_entry",
        "    connection_mark(connection, PEND_CLOSE, False, STATE_OWNED,",
        "    connection_mark(connection, 0, False, STATE_OWNED,",
    ),
    "half-closed: both have finished, and nobody ends it": (
        "_entry",
        "        return not connection_drained(connection)\n    if connection.hears_end",
        "        return True\n    if connection.hears_end",
    ),
    "half-closed: output that waits comes after the end": (
        "_poll",
        "    if queue_size(&connection.out) == 0 and shutdown(",
        "    if shutdown(",
    ),
    "half-closed: the end waits for the next send": (
        "_poll",
        "        if tst_rarely(connection.out_ended != 0):\n",
        "        if False:\n",
    ),
    "half-closed: a reset is not looked for": (
        "_entry",
        "            connection_look_for_reset(connection)\n",
        "            pass\n",
    ),
    "half-closed: an event has disabled the descriptor": (
        "_poll",
        "    if tst_rarely(wanted == 0) and connection.hears_end & HEARD_END:\n",
        "    if False:\n",
    ),
    "half-closed: its handler is told again and again": (
        "_entry",
        "    return not connection.hears_end & HEARD_END and (\n        connection.hears_end",
        "    return (\n        connection.hears_end",
    ),
    "half-closed: it closes before its handler has heard of it": (
        "_entry",
        "    if (takes or over) and connection_owes_end(connection):\n",
        "    if takes and connection_owes_end(connection):\n",
    ),
    "half-closed: nobody tells of it when it may be told": (
        "_entry",
        "(connection.message_ready or connection_owes_end(connection)) and",
        "connection.message_ready and",
    ),
}

BUILD = """
import runpy, setuptools, sys
sys.argv = ["setup.py", "-q", "build_ext", "--inplace"]
setup = setuptools.setup
def only(ext_modules, **options):
    setup(ext_modules=[module for module in ext_modules if "simulation" in module.name], **options)
setuptools.setup = only
runpy.run_path("setup.py", run_name="__main__")
"""


def try_fault(name: str, seeds: int) -> str:
    header, old, new = FAULTS[name]
    with tempfile.TemporaryDirectory() as scratch:
        tree = Path(scratch, "tree")
        for part in ("tstpool", "tests/simulation"):
            shutil.copytree(ROOT / part, tree / part, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        for part in ("setup.py", "pyproject.toml", "README.md"):
            shutil.copy(ROOT / part, tree)
        path = tree / "tstpool" / f"{header}.pxd"
        text = path.read_text()
        if text.count(old) != 1:
            return f"the text to change stands {text.count(old)} times in {path.name}"
        path.write_text(text.replace(old, new))
        environment = {"TSTPOOL_WHITEBOX": "1", "CFLAGS": "-O1", "PATH": "/usr/local/bin:/usr/bin:/bin"}
        built = subprocess.run(
            [sys.executable, "-c", BUILD], cwd=tree, env=environment, capture_output=True, text=True, check=False
        )
        if built.returncode:
            return f"does not build: {(built.stdout + built.stderr)[-300:]}"
        run = [sys.executable, "tests/simulation/run.py", "--first", "--seeds", f"0:{seeds}"]
        try:
            ran = subprocess.run(run, cwd=tree, capture_output=True, text=True, check=False, timeout=300)
        except subprocess.TimeoutExpired:
            return "hangs"
        if ran.returncode < 0:
            return f"found: signal {-ran.returncode}"
        return ran.stdout.splitlines()[0] if ran.returncode else "not found"


def main() -> None:
    parser = argparse.ArgumentParser(description="Plants faults in the engine.")
    parser.add_argument("--seeds", type=int, default=4000)
    parser.add_argument("names", nargs="*")
    options = parser.parse_args()
    for name in options.names or FAULTS:
        print(f"| {name} | {try_fault(name, options.seeds)} |", flush=True)


if __name__ == "__main__":
    main()
