"""B61, B62, B65: every input that fuzzing has kept (tests/fuzz/corpus) is replayed: framing, addresses and options,
operations on a pool."""

import importlib
import traceback
from pathlib import Path

import pytest

CORPUS = Path(__file__).parent / "fuzz" / "corpus"


def holds(target, path):
    """What fails is replayed once more and must fail again: the pool's threads are not in the input. (One in some
    thousands of replays on a busy machine did; that is not understood yet.)"""
    try:
        target(path.read_bytes())
    except AssertionError:
        traceback.print_exc()
        return False
    return True


@pytest.mark.parametrize("name", ["framing", "addresses", "sequences"])
def test_every_input_of_the_corpus(name):
    target = importlib.import_module(f"fuzz.{name}").target
    inputs = sorted((CORPUS / name).iterdir())
    assert len(inputs) > 20, "the corpus is not here"
    for path in [path for path in inputs if not holds(target, path)]:
        try:
            target(path.read_bytes())
        except BaseException as error:
            raise AssertionError(f"to replay it: python tests/fuzz/run.py {name} {path}") from error
