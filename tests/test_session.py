"""The temporary directories of private Rays: gone when their owners are, those of owners that were
killed too."""

import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from processes import PATIENCE
from ray._private import ray_constants

from executor.fleet import session
from planner.spec.errors import UserError


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(session, "MOST_PATH_BYTES", 1000)


def abandoned(tmp_path: Path, name: str) -> Path:
    """As of an owner that was killed."""
    directory = tmp_path / f"splitplan-{name}"
    (directory / "ray" / "session").mkdir(parents=True)
    (directory / "lock").touch()
    return directory


def test_a_directory_goes_with_its_owner_and_those_of_killed_ones_go_too(tmp_path: Path) -> None:
    abandoned(tmp_path, "before")
    with session._private_directory() as directory:
        assert list(tmp_path.iterdir()) == [directory]
        (directory / "ray").mkdir()
        with session._private_directory() as other:  # which leaves that of an owner who lives
            abandoned(tmp_path, "meanwhile")
            assert {directory, other} < set(tmp_path.iterdir())
        assert list(tmp_path.iterdir()) == [directory]
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_removed_yet_keeps_its_lock_for_the_next_time(tmp_path: Path) -> None:
    directory = abandoned(tmp_path, "busy")
    (directory / "ray" / "session").rmdir()
    (directory / "ray").rmdir()
    (directory / "ray").touch()  # no directory, which stands in for one that is still written to
    session._sweep()
    assert (directory / "lock").exists()
    (directory / "ray").unlink()
    session._sweep()
    assert not directory.exists()


def test_a_long_directory_for_temporary_files_gives_way_to_a_short_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The longest path that is taken leaves room for Ray's longest socket."""
    monkeypatch.setattr(session, "MOST_PATH_BYTES", 20)
    with session._private_directory() as directory:
        assert directory.parent == Path("/tmp") and directory.name.startswith(session.PREFIX)
    assert not directory.exists()
    socket = "ray/session_2026-11-30_08-26-18_123456_4194304/sockets/plasma_store"
    assert len(str(Path("x" * 20, "splitplan-abcdefgh", socket))) <= 107
    monkeypatch.setattr(session, "SHORT_PATHS", (str(tmp_path / "none"),))
    with pytest.raises(UserError, match=r"too long for Ray's sockets.*set TMPDIR to a path of"):
        session._sweep()


@pytest.mark.ray
def test_a_private_ray_leaves_nothing_that_would_keep_the_process_from_joining_a_cluster(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv(
        session.NO_CLUSTER, raising=False
    )  # other tests share a private Ray that is still open
    known = ray_constants.ENABLE_RAY_CLUSTER
    with session._this_host_only():
        assert os.environ[session.NO_CLUSTER] == "0" and not ray_constants.ENABLE_RAY_CLUSTER
    assert session.NO_CLUSTER not in os.environ and known is ray_constants.ENABLE_RAY_CLUSTER


JOINS = """
import sys
from executor.fleet import session
from planner.spec.errors import UserError

session.JOINING_SECONDS = 4.0
try:
    with session.ray_session(cpus=None, address=sys.argv[1]):
        print("joined")
except UserError as error:
    print(error)
"""


@pytest.mark.slow
def test_a_cluster_that_hangs_is_told_in_one_line() -> None:
    """It lets us connect, and says nothing. A process of its own has no Ray yet."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        done = subprocess.run(
            [sys.executable, "-c", JOINS, address], capture_output=True, text=True, timeout=PATIENCE
        )
    line = f"the Ray cluster at {address} has not answered for 4 s; look at"
    assert line in done.stdout, done.stderr
