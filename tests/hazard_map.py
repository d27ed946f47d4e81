"""How engines of this kind break, and which tests show that this one does not: makes tests/HAZARDS.md.

A test names the cases that it shows in its docstring: "B17". Run `python tests/hazard_map.py` after changing one;
tests/test_hazard_map.py fails until the page is up to date. Where the tests show a part of a case only, IN_PART says
what is missing.
"""

import re

from contract_map import TESTS, cell, find_tests

PAGE = TESTS / "HAZARDS.md"

CASES = {
    "B01": "a handler closes another connection whose event is in the same batch, and a newcomer gets its descriptor",
    "B02": "the object of a closed connection is used when its descriptor is already somebody else's",
    "B03": "a duplicate of the descriptor outlives the connection: no events, no spin; it leaves epoll before `close`",
    "B04": "re-arming is counted: one MOD per event with oneshot, none for an echo otherwise; no socket goes deaf",
    "B05": "input comes between the EAGAIN of `recv` and the call that arms the descriptor",
    "B06": "another thread sends or asks for EPOLLOUT while a worker is in the handler",
    "B07": "`epoll_ctl` fails: that connection ends, once; the others go on",
    "B08": "signals interrupt the waiting workers all the time",
    "B09": "`epoll_wait` itself fails: the pool stops and says why, and does not spin",
    "B10": "an event of a connection that is not, or no longer, there: counted and dropped",
    "B11": "a lost wake-up, which shows as round trips of seconds",
    "B12": "every worker is blocked: no CPU is used, nothing is forgotten",
    "B13": "one peer at line rate beside many who ask now and then",
    "B14": "one handler takes seconds: the others do not feel it, and it is reported",
    "B15": "one client comes to many idle workers: not all of them wake up",
    "B16": "thousands of idle connections cost nothing, neither CPU nor time per turn",
    "B17": "data and FIN arrive together: all of the data, then one end",
    "B18": "a peer that has shut its sending side still gets the whole reply",
    "B19": "data, then a reset: the data first, then one end with its reason",
    "B20": "a thousand resets in the middle of requests",
    "B21": "a hang-up or an error while nothing is asked of the descriptor: one end, no loop",
    "B22": "the client resets before it is accepted",
    "B23": "urgent data",
    "B24": "the server closes with input unread: the reply must survive that",
    "B25": "closing at once, with a reset, when that is what is asked for",
    "B26": "SIGPIPE at its default, and a peer that is gone",
    "B27": "every system call on a connection fails, is interrupted or moves a few bytes, one by one and at random",
    "B28": "megabytes to a peer that reads drop by drop, and a worker that never waits for it",
    "B29": "what `send` is given: nothing, gigabytes, any buffer, contiguous or not",
    "B30": "lengths at, above and far above the limits, and below zero",
    "B31": "out of descriptors for a while: quiet, then accepting again; who is there feels nothing",
    "B32": "each error that `accept4` can have",
    "B33": "a limit on connections: who is one too many waits or is closed, and each end makes room for another",
    "B34": "a limit on the output that waits for one peer",
    "B35": "a limit on the memory of all connections together",
    "B36": "memory that cannot be had, at each place that asks for some: an exception or an end, never a crash",
    "B37": "clients that send a byte now and then to keep a connection busy",
    "B38": "each time limit is met, and a step of the system's clock moves none",
    "B39": "a flood of connects: those who are there are served meanwhile",
    "B40": "a million connections: neither descriptors, threads nor memory grow",
    "B41": "stop under load: listeners first, then replies, then the time is over; no handler afterwards",
    "B42": "stop in a handler, from two threads, twice, before start",
    "B43": "start and stop on one port, over and over",
    "B44": "a start that fails, also half-way through its threads, leaves nothing behind",
    "B45": "fork with a running pool",
    "B46": "the interpreter exits with the pool running, in each way that it can",
    "B47": "objects that touch the pool while the interpreter ends",
    "B48": "a pool that is dropped without stop",
    "B49": "SIGINT and SIGTERM while the main thread waits for the pool",
    "B50": "an import in a subinterpreter",
    "B51": "a handler raises, whatever it raises",
    "B52": "hooks of the beginning and the end raise, close, send, block, stop",
    "B53": "views of a buffer that are kept for longer than the engine thought",
    "B54": "a buffer that changes after it was sent",
    "B55": "cycles of connection and handler; a collection in the middle of everything",
    "B56": "a chain of a hundred thousand socket objects is let go at once",
    "B57": "free-threaded builds: the GIL stays off, and eight threads on one connection",
    "B58": "threads send to connections that come and go",
    "B59": "send and close inside a walk over the connections",
    "B60": "tracing, profiling, and a thread switch at every opportunity",
    "B61": "framing: any split of a stream, any length, in linear time",
    "B62": "every kind of address",
    "B63": "what a peer sends never reaches the log raw; a failure that repeats is not logged each time",
    "B64": "bad networks: small segments, loss, reordering, a dead peer, a socket aborted from outside",
    "B65": "all of it at once, at random; then the books balance",
}

IN_PART: dict[str, str] = {}

# What is run by itself, as it takes more than a test may.
BESIDE = {"B27": "[fault_matrix](fault_matrix/run.py): each call with each errno, `make faults`"}

FOLDERS = (".", "whitebox")


def cases_of(docstring):
    """The cases that a docstring names."""
    return re.findall(r"\bB\d\d\b", docstring)


def find_cases():
    return find_tests(CASES, cases_of, FOLDERS)


def state_of(case, tests):
    if not tests:
        return "not yet"
    return f"in part: {IN_PART[case]}" if case in IN_PART else "yes"


def render():
    lines = [
        "# How engines like this one break, and which tests show that this one does not",
        "",
        "This page is made from the tests' docstrings by `python tests/hazard_map.py`; a test checks it.",
        "",
        "| case | in short | shown | tests |",
        "|---|---|---|---|",
    ]
    for case, tests in find_cases().items():
        shown_by = "<br>".join(filter(None, [cell(tests), BESIDE.get(case)]))
        lines.append(f"| {case} | {CASES[case]} | {state_of(case, tests)} | {shown_by} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(render())
