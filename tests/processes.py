"""The processes of this machine, from Linux's /proc: whose they are, whether they run, where they
listen, what they leave."""

import contextlib
import fcntl
import ipaddress
import os
import signal
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

PROC = Path("/proc")
WORKERS = ("Trainer", "TransformersWorker", "RewardWorker")
LISTENS = "0A"  # a socket's state
PATIENCE = 600.0  # seconds: how long anything that must happen may take on a busy machine


def descendants(pid: int) -> list[int]:
    """Processes below one."""
    parents: dict[int, int] = {}
    for stat in PROC.glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    found = [pid]
    for parent in found:
        found += [child for child, its in parents.items() if its == parent]
    return found[1:]


def running(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    with contextlib.suppress(OSError):
        return (PROC / f"{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def still_there(pids: Iterable[int]) -> list[int]:
    """Those of some processes that do not end; ending takes Ray's a moment."""
    deadline = time.monotonic() + PATIENCE
    while (left := [pid for pid in pids if running(pid)]) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left


def working(pids: Iterable[int], names: tuple[str, ...] = WORKERS) -> list[int]:
    """Those that are processes of these classes, as Ray titles them: `ray::Trainer.call` while it
    is called."""
    titles = tuple(f"ray::{name}".encode() for name in names)
    found = []
    for pid in pids:
        with contextlib.suppress(OSError):
            if (PROC / f"{pid}/cmdline").read_bytes().startswith(titles) and running(pid):
                found.append(pid)
    return sorted(found)


def end_agents(pids: Iterable[int]) -> list[int]:
    """Those of some processes that stay after a controller or a node was killed, but for two of
    Ray's: these see it within a minute only, and are ended here."""
    agents = working(pids, ("DashboardAgent", "RuntimeEnvAgent"))
    left = still_there(set(pids) - set(agents))
    end([*agents, *left])
    return left


def end(pids: Iterable[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def listening(pids: Iterable[int]) -> set[str]:
    """The addresses at which some processes let others connect."""
    sockets = set()
    for pid in pids:
        with contextlib.suppress(OSError):
            for descriptor in (PROC / f"{pid}/fd").iterdir():
                with contextlib.suppress(OSError):
                    sockets.add(os.readlink(descriptor))
    found = set()
    for table in ("tcp", "tcp6"):
        for line in (PROC / "net" / table).read_text().splitlines()[1:]:
            _, local, _, state, *_, inode = line.split()[:10]
            if state == LISTENS and f"socket:[{inode}]" in sockets:
                found.add(_address(local.partition(":")[0]))
    return found


def _address(digits: str) -> str:
    """Of hexadecimal words of four bytes, each of them the last byte first."""
    words = [bytes.fromhex(digits[i : i + 8])[::-1] for i in range(0, len(digits), 8)]
    address = ipaddress.ip_address(b"".join(words))
    return str(getattr(address, "ipv4_mapped", None) or address)


def abandoned() -> set[Path]:
    """Directories of private Rays, in the one for temporary files, whose owners have ended."""
    found = set()
    for lock in Path(tempfile.gettempdir()).glob("splitplan-*/lock"):
        with contextlib.suppress(OSError), lock.open() as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails as long as the owner lives
            found.add(lock.parent)
    return found
