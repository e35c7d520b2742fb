"""A file has one process that holds it, also where files come and go."""

import fcntl

import pytest

from nlae_jax.runtime.errors import UserError
from nlae_jax.runtime.locks import hold


def test_a_lock_is_one_of_the_file_at_the_path(tmp_path, monkeypatch):
    """Between opening and locking, its last holder may delete the file, and others then lock a new one."""
    path, flock = tmp_path / "lock", fcntl.flock

    def late(file, operation):
        monkeypatch.setattr(fcntl, "flock", flock)
        path.unlink()
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    hold(path, "here", "busy", "")
    with path.open("rb") as other, pytest.raises(BlockingIOError):
        flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_file_that_another_holds_is_busy(tmp_path):
    with (tmp_path / "lock").open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(UserError, match=r"^here: busy$"):
            hold(tmp_path / "lock", "here", "busy", "")
    hold(tmp_path / "lock", "here", "busy", "")  # the other one has ended
