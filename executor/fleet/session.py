"""Ray, started quietly and taken down on every way out."""

import contextlib
import fcntl
import logging
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray

from executor.fleet import ray_private
from executor.fleet.signals import (
    check_interrupted,
    in_main_thread,
    interruptible,
    take_signals,
)
from planner.spec.errors import UserError

PREFIX, RAY = "splitplan-", "ray"  # of temporary directories, and the one of Ray in each
# Ray's sockets lie below it, and the path of a socket has at most 107 bytes.
MOST_PATH_BYTES = 20
SHORT_PATHS = ("/tmp", "/var/tmp", "/dev/shm")
NO_CLUSTER = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"  # what Ray calls it everywhere
ENDING_SECONDS, HANGING_SECONDS = 3.0, 60.0  # in which processes end, and Ray answers
JOINING_SECONDS = 60.0  # in which a cluster lets a process join
LAST_FILES, LAST_LINES = 4, 100
RAYS_OWN = (":job_id:", ":actor_name:", ":task_name:")  # lines with which Ray marks a log
# Each process stands for one GPU or one core: more threads would only fight. Models come from local
# directories.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}


@contextlib.contextmanager
def ray_session(*, cpus: int | None, address: str | None) -> Iterator[None]:
    """Ray for the duration of a `with`: a private one on this machine's loopback with `cpus` CPU
    slots (None: as many as there are), or the cluster at `address`. A session that is already open
    is used and left open. SIGTERM and SIGHUP end it as Ctrl-C does. Raises UserError if there is no
    cluster at `address`."""
    if ray.is_initialized():
        yield
        return
    with interruptible():
        check_interrupted()
        if address is None:
            with _private_directory() as directory, _this_host_only():
                try:
                    _start_private(cpus, directory)
                    yield
                finally:
                    with in_time():
                        ray.shutdown()
        else:
            try:
                _connect(address)
                yield
            finally:
                ray.shutdown()


@contextlib.contextmanager
def in_time() -> Iterator[None]:
    """End other processes in a `with`. If Ray does not answer, its own processes go on where
    somebody stopped them, and are killed later; with them this process ends at once."""
    done = threading.Event()

    def watch() -> None:
        if done.wait(ENDING_SECONDS):
            return
        ray_private.send(signal.SIGCONT)
        if done.wait(HANGING_SECONDS):
            return
        print(
            f"plan: Ray has not answered for {HANGING_SECONDS:.0f} s while its processes were to "
            "end; it was killed",
            file=sys.stderr,
        )
        ray_private.send(signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        done.set()


def last_words() -> str:
    """The last lines that the processes of Ray on this host wrote to stderr. They are lost when Ray
    ends, and a crash says there why it came."""
    directory = ray_private.logs_directory()
    if directory is None:
        return ""
    files = sorted(directory.glob("worker-*.err"), key=lambda file: file.stat().st_mtime)
    lines = {file.name: file.read_text(errors="replace").splitlines() for file in files}
    written = {
        name: [line for line in each if not line.startswith(RAYS_OWN)]
        for name, each in lines.items()
    }
    latest = [(name, each[-LAST_LINES:]) for name, each in written.items() if each][-LAST_FILES:]
    return "\n".join(f"--- {name}\n" + "\n".join(each) for name, each in latest)


def _start_private(cpus: int | None, directory: Path) -> None:
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    # Inherited by the processes, which a runtime_env would start again.
    for key, value in ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    # Ray asks for a token. One that lives as long as this process leaves nothing in the user's
    # home.
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    # Ray opens its directory to everybody; the one above it stays closed. By default as many
    # processes start at a time as there are cores, which is slow for sixteen light ones.
    private = ray_private.start_options("127.0.0.1", directory / RAY, starts_at_once=32)
    _init(address="local", num_cpus=cpus, **private)


@contextlib.contextmanager
def _this_host_only() -> Iterator[None]:
    """Ray turns 127.0.0.1 into the host's outward address unless it is told that there are no other
    hosts. Not for longer: this process, or what it starts, may join a cluster next."""
    before = os.environ.get(NO_CLUSTER)
    os.environ[NO_CLUSTER] = "0"
    try:
        with ray_private.without_other_hosts():
            yield
    finally:
        os.environ.pop(NO_CLUSTER)
        if before is not None:
            os.environ[NO_CLUSTER] = before


def _connect(address: str) -> None:
    if address != "auto":
        _check_listens(address)  # Ray would try for minutes
    _check_answers(address)
    try:
        _init(address=address, runtime_env={"env_vars": ENVIRONMENT})
    except (ConnectionError, ValueError, ray.exceptions.AuthenticationError) as error:
        raise UserError(
            f"the Ray cluster at {address} does not let us in ({str(error).splitlines()[0]}); "
            f"{_TOKEN}"
        ) from None


_TOKEN = (
    "if it asks for a token, export RAY_AUTH_MODE=token, and the token as RAY_AUTH_TOKEN or its "
    "file as "
    "RAY_AUTH_TOKEN_PATH; if there is none, start one with `ray start --head`"
)
_START = "start one with `ray start --head` and give its host:port"


def _check_listens(address: str) -> None:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except (OSError, ValueError, OverflowError) as error:
        raise UserError(f"no Ray cluster at {address} ({error}); {_START}") from None


def _check_answers(address: str) -> None:
    """Join from another process first. In this one nothing could end Ray's waiting for a cluster
    whose processes hang. What else may be wrong with it is told later."""
    command = [sys.executable, "-c", _JOIN, address]
    try:
        subprocess.run(command, capture_output=True, timeout=JOINING_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise UserError(
            f"the Ray cluster at {address} has not answered for {JOINING_SECONDS:.0f} s; look at "
            "whether its processes (gcs_server, raylet) run, or start it again"
        ) from None


_JOIN = "import sys, ray; ray.init(address=sys.argv[1], log_to_driver=False)"


def _init(**options: Any) -> None:
    """Ray, quiet. It installs handlers of SIGTERM: one that exits, and under it one that prints a
    backtrace."""
    # The errors of processes become one line each; Ray would print those that nobody asks for.
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
    ray_private.never_start_by_itself()
    try:
        with _deaf_to_hangups():
            ray.init(
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                job_config=ray_private.job_config(_code_path()),
                **options,
            )
    except SystemExit:
        raise KeyboardInterrupt from None
    take_signals()
    check_interrupted()


def _code_path() -> list[str]:
    """Where processes find this code if it is not installed."""
    root = str(Path(__file__).resolve().parents[2])
    return [] if root == sysconfig.get_paths()["purelib"] else [root]


@contextlib.contextmanager
def _deaf_to_hangups() -> Iterator[None]:
    """Let what is started here live on when the terminal is closed, for a last checkpoint. What a
    process ignores is ignored by those that it starts."""
    if not in_main_thread():
        yield
        return
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, before)


@contextlib.contextmanager
def _private_directory() -> Iterator[Path]:
    """A short path (sockets lie in it) that is gone afterwards. Those of processes that were killed
    go too."""
    _sweep()
    directory = Path(tempfile.mkdtemp(prefix=PREFIX, dir=_short_path()))
    try:
        with (directory / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield directory
    finally:
        _sweep()


def _short_path() -> Path:
    """The directory for temporary files, or a usual one with a shorter path. Raises UserError if
    nothing can be written there."""
    wanted = tempfile.gettempdir()
    for path in (wanted, *SHORT_PATHS):
        if len(os.fsencode(path)) <= MOST_PATH_BYTES and os.access(path, os.W_OK | os.X_OK):
            return Path(path)
    raise UserError(
        f"{wanted}: this path is too long for Ray's sockets, and nothing can be written into "
        f"{' or '.join(SHORT_PATHS)}; set TMPDIR to a path of at most {MOST_PATH_BYTES} characters"
    )


def _sweep() -> None:
    """Remove the directories whose owners have ended. The lock goes last: Ray's processes outlive
    an owner that is killed, and as long as they write there something may be left for the next
    time."""
    for path in _short_path().glob(f"{PREFIX}*/lock"):
        with contextlib.suppress(OSError), path.open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails as long as its owner lives
            shutil.rmtree(path.parent / RAY, ignore_errors=True)
            if not (path.parent / RAY).exists():
                shutil.rmtree(path.parent, ignore_errors=True)
