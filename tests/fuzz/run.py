"""Fuzzing: python tests/fuzz/run.py TARGET [--seconds N], or with files: each is replayed once.

TARGET is framing, addresses or sequences. With atheris, and an extension that .ci/flavour built for it (`make fuzz`),
the search is guided by coverage, and AddressSanitizer watches; without, the corpus is changed at random. New inputs go
to build/fuzz/TARGET, what made the target fail to build/fuzz/TARGET-crash-*. --merge copies what adds coverage into the
corpus.
"""

import argparse
import faulthandler
import importlib
import os
import random
import resource
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
TARGETS = ("framing", "addresses", "sequences")
MOST_BYTES = {"framing": 1024, "addresses": 256, "sequences": 512}
TIMEOUT = 60  # seconds for one input: it hangs


def main():
    options = parse()
    sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent), str(HERE.parent / "whitebox")]
    faulthandler.enable()
    atheris = None if options.plain or (options.files and not options.libfuzzer) else load_atheris()
    if atheris is None:
        target = importlib.import_module(f"fuzz.{options.target}").target
    else:
        with atheris.instrument_imports(include=["fuzz", "tstpool"]):
            target = importlib.import_module(f"fuzz.{options.target}").target
    found = options.out / options.target
    found.mkdir(parents=True, exist_ok=True)
    if options.libfuzzer:
        fuzz(atheris, target, [sys.argv[0], *options.libfuzzer])
    elif options.files:
        replay(target, options.files)
    elif atheris is None:
        mutate(target, options, found)
    else:
        guided(atheris, target, options, found)


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("files", nargs="*", type=Path, help="inputs to replay, instead of a search")
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0, help="0: another one each time")
    parser.add_argument("--plain", action="store_true", help="without atheris")
    parser.add_argument("--merge", action="store_true", help="minimise what was found into the corpus (atheris only)")
    parser.add_argument("--corpus", type=Path, default=HERE / "corpus")
    parser.add_argument("--out", type=Path, default=HERE.parents[1] / "build" / "fuzz")
    options, options.libfuzzer = parser.parse_known_args()  # -merge starts this program again, with options of its own
    options.corpus, options.out = options.corpus.resolve(), options.out.resolve()  # a target changes the directory
    return options


def load_atheris():
    """The module; None where it is missing, or where the extension under test is not built for it."""
    if os.environ.get("TSTPOOL_FUZZ") != "1":
        return None
    import atheris

    return atheris


def guided(atheris, target, options, found):
    """libFuzzer's loop. Never returns: it ends the process."""
    corpus = options.corpus / options.target
    arguments = [
        f"{sys.executable} {sys.argv[0]} {options.target}",  # how -merge starts it again
        f"-max_len={MOST_BYTES[options.target]}",
        f"-timeout={TIMEOUT}",
        f"-artifact_prefix={options.out}/{options.target}-",
        "-detect_leaks=0",
        "-print_final_stats=1",
        "-rss_limit_mb=4096",
    ]
    arguments += [f"-seed={options.seed}"] if options.seed else []
    if options.merge:
        arguments += ["-merge=1", str(corpus), str(found)]
    else:
        arguments += [f"-max_total_time={options.seconds}", str(found), str(corpus)]
    fuzz(atheris, target, arguments)


def fuzz(atheris, target, arguments):
    atheris.Setup(arguments, lambda data: target(bytes(data)), enable_python_coverage=True)
    atheris.Fuzz()


def mutate(target, options, found):
    """Random changes to the inputs of the corpus, one seed for all, which is printed."""
    seed = options.seed or random.SystemRandom().randrange(1, 2**31)
    print(f"{options.target}: without atheris, seed {seed}", flush=True)
    chance = random.Random(seed)
    inputs = [path.read_bytes() for path in sorted((options.corpus / options.target).glob("*"))] or [b""]
    until, n = time.monotonic() + options.seconds, 0
    while time.monotonic() < until:
        data = mutated(chance, inputs, MOST_BYTES[options.target])
        faulthandler.dump_traceback_later(TIMEOUT, exit=True)
        (found / "last").write_bytes(data)  # what is here after a crash
        try:
            target(data)
        except BaseException:
            crash = options.out / f"{options.target}-crash-{seed}-{n}"
            crash.write_bytes(data)
            print(f"failed: {crash}", flush=True)
            raise
        n += 1
    faulthandler.cancel_dump_traceback_later()
    print(f"{options.target}: {n} inputs in {options.seconds} s, nothing found")


def mutated(chance, inputs, most):
    data = bytearray(chance.choice(inputs))
    for _ in range(chance.choice([1, 1, 2, 4, 8])):
        place = chance.randrange(len(data) + 1)
        change = chance.randrange(5)
        if change == 0:
            data[place:place] = chance.randbytes(chance.randrange(1, 9))
        elif change == 1:
            del data[place : place + chance.randrange(1, 9)]
        elif change == 2:
            data[place:] = chance.choice(inputs)[chance.randrange(most) :]
        elif place < len(data):
            data[place] = chance.randrange(256) if change == 3 else data[place] ^ 1 << chance.randrange(8)
    return bytes(data[:most])


def replay(target, files):
    for path in files:
        print(path, flush=True)
        faulthandler.dump_traceback_later(TIMEOUT, exit=True)
        target(path.read_bytes())
    faulthandler.cancel_dump_traceback_later()


if __name__ == "__main__":
    # A crash leaves no core file, and a runaway no full disk.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    main()
