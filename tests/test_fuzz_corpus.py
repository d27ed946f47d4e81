"""B61, B62, B65: every input that fuzzing has kept (tests/fuzz/corpus) is replayed: framing, addresses and options,
operations on a pool."""

import importlib
from pathlib import Path

import pytest

CORPUS = Path(__file__).parent / "fuzz" / "corpus"


@pytest.mark.parametrize("name", ["framing", "addresses", "sequences"])
def test_every_input_of_the_corpus(name):
    target = importlib.import_module(f"fuzz.{name}").target
    inputs = sorted((CORPUS / name).iterdir())
    assert len(inputs) > 20, "the corpus is not here"
    for path in inputs:
        try:
            target(path.read_bytes())
        except BaseException as error:
            raise AssertionError(f"to replay it: python tests/fuzz/run.py {name} {path}") from error
