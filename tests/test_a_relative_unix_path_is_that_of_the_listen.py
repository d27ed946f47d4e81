"""B62: the process may go to another directory, or lose the right to go where it is, while it listens."""

import os

import pytest
from contract_helpers import handler, ignore
from helpers import connect

from tstpool import TstPool


@pytest.mark.parametrize("name", ["socket", "./socket", "link/../socket"])
def test_its_file_is_removed_after_a_chdir(monkeypatch, tmp_path, name):
    """B62, S19: the address stays what was asked for."""
    (tmp_path / "there" / "deeper").mkdir(parents=True)
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "link").symlink_to(tmp_path / "there" / "deeper")
    monkeypatch.chdir(tmp_path / "here")
    pool = TstPool(handler(on_message=ignore), workers=1)
    assert pool.listen(f"unix:{name}") == (f"unix:{name}", 0)
    file = os.path.realpath(name)
    assert os.path.exists(file)
    monkeypatch.chdir("/")
    assert pool.addresses == [(f"unix:{name}", 0)]
    pool.start()
    connect(f"unix:{file}").close()
    assert pool.stop()
    assert not os.path.exists(file)


def test_another_file_of_that_name_stays(monkeypatch, tmp_path):
    """B62: where the process is by then, somebody else listens under it."""
    pools = []
    for folder in ("first", "second"):
        (tmp_path / folder).mkdir()
        monkeypatch.chdir(tmp_path / folder)
        pools.append(TstPool(handler(on_message=ignore), workers=1))
        pools[-1].listen("unix:socket")
    pools[0].stop()
    assert [os.listdir(tmp_path / folder) for folder in ("first", "second")] == [[], ["socket"]]
    pools[1].stop()


def test_where_nobody_knows_the_directory_any_more(monkeypatch, tmp_path):
    """B62: it listens all the same."""

    def gone():
        raise FileNotFoundError

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "getcwd", gone)
    pool = TstPool(handler(on_message=ignore), workers=1)
    pool.listen("unix:socket")
    pool.stop()
    assert os.listdir() == []
