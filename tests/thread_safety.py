"""Which tests can't run in several threads of one process at the same time, and why: for `make parallel`.

pytest-run-parallel runs a test's function in four threads; fixtures are made once, and the leak check goes around all
four. reason_for() looks at the source of the test, as nearly all reasons show there; FILES and TESTS have the others.
"""

import inspect
import re
import unittest

from hypothesis import is_hypothesis_test

# Each call makes something new, or the plugin gives each thread its own.
SAFE_FIXTURES = {
    "make_pool",
    "make_client",
    "no_leaks",
    "cycles_of_others_are_gone",
    "tmp_path",
    "request",
}

WORDS = {
    r"\b(run_python|ServerProcess|subprocess|Command|in_time_namespace)\b": "starts processes, which share nothing",
    r"\bsystem_calls\b": "has a process traced, into a file",
    r"\b(open_fds|native_threads|active_count|threading\.enumerate|/proc/self)\b": "counts what the process has",
    r"\b(process_cpu_seconds|process_time|voluntary_switches|getrusage|thread_time|resident)\b": "measures the process",
    r"\b(setrlimit|signal\.|fork|chdir|environ|umask|quick_switches|setswitchinterval|settrace|setprofile)\b": (
        "changes the process"
    ),
    r"\bno_descriptor_left\b": "changes the process",
    r"\b(gc\.|weakref|getrefcount|tracemalloc|litter)": "looks at what the garbage collector does",
    r"\b(caplog|logging|logger)\b": "reads the log, which all threads write",
    r"\b(monkeypatch|setattr)\b": "changes a module",
    r"\bConnectionRefusedError\b": "another thread may be given the address that nobody is to listen on any more",
}

FILES = {
    "test_bench_tools.py": "about programs",
    "test_cli.py": "about programs",
    "test_demo.py": "about programs",
    "test_packaging.py": "builds wheels",
    "test_readme.py": "about programs",
    "test_simulation.py": "one simulated kernel for the process",
    "test_abi.py": "compiles modules",
    "test_example_chat.py": "about programs",
    "test_example_echo.py": "about programs",
    "test_example_kv.py": "about programs",
    "test_example_rpc.py": "about programs",
    "test_whitebox_example_kv.py": "compiles a module",
    "test_contract_map.py": "about a page",
    "test_coverage_map.py": "about a page",
    "test_fuzz_corpus.py": "listens on certain addresses",
    "test_hazard_map.py": "about a page",
    "test_memory_that_cannot_be_had_crashes_nothing.py": "about programs",
    "test_one_client_wakes_few_of_many_workers.py": "counts the switches of the process's threads",
    "test_a_bad_network_is_one_end_at_most.py": "makes networks",
    "test_a_pool_may_be_watched_while_it_restarts.py": "changes the process",
    "test_there_are_never_more_shards_than_workers.py": "counts what the process has",
    "test_tracing_and_switching_at_every_opportunity_change_nothing.py": "changes the process",
}

TESTS = {
    "test_four_threads_disturb_fifty_clients": "220 threads in a second: too few connections for what it asserts",
    "test_a_thread_disturbs_fifty_clients": "204 threads in a second: too few connections for what it asserts",
    "test_a_flood_of_messages_leaves_others_their_turn": "asserts how far one gets while the other does so much",
    "test_events_that_are_left_over_for_a_connection_that_has_ended_are_dropped": "needs its descriptors back",
    "test_a_kernel_that_lacks_a_call_is_told_at_start_up": "starts processes, which share nothing",
    "test_reconnected_serves_the_fresh_connection_under_the_same_descriptor": "its handler must not be held up",
    "test_a_socket_of_another_pool_is_not_found": "needs its descriptors back",
    "test_local_is_never_the_address_of_a_successor": "needs its descriptors back",
    "test_an_idle_connection_costs_no_buffers": "measures the process",
    "test_a_log_that_blocks_is_not_felt_by_others": "reads the log, which all threads write",
    "test_an_address_that_is_no_good_is_an_oserror_that_names_it": "counts what the process has",
}


def reason_for(item):
    """Why a test can't run in several threads, or None."""
    name = item.name.partition("[")[0]
    if item.path.name in FILES:
        return FILES[item.path.name]
    if name in TESTS:
        return TESTS[name]
    parameters = getattr(item, "callspec", None)
    shared = set(item.fixturenames) - SAFE_FIXTURES - set(parameters.params if parameters else ())
    if shared:
        return f"all threads would have the same {', '.join(sorted(shared))}"
    source = inspect.getsource(item.function)
    return next((reason for word, reason in WORDS.items() if re.search(word, source)), None)


def must_run_alone(item):
    """It is none of those that `make parallel` runs. (What Hypothesis drives it leaves out by itself.)"""
    if is_hypothesis_test(item.function) or issubclass(item.cls or object, unittest.TestCase):
        return True
    return reason_for(item) is not None
