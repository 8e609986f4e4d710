"""The software that is installed: what a measurement is made with, and whether it was tried on
GPUs."""

import contextlib
import platform
import re
from importlib.metadata import PackageNotFoundError, version

# The newest versions that our tests ran with on GPUs; docs/run.md says what ran where.
NEWEST_ON_GPUS = {"torch": "2.11", "transformers": "5.17", "ray": "2.60", "vllm": "0.26"}
# Those with which weights also went over NCCL, to engines on GPUs of their own.
NEWEST_OVER_NCCL = {**NEWEST_ON_GPUS, "vllm": "0.25"}


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that are installed, by name."""
    found = {"python": platform.python_version()}
    for name in NEWEST_ON_GPUS:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def newer_than_tried(*, over_nccl: bool) -> list[str]:
    """The packages that are newer than any that was tried on GPUs, where weights go over NCCL or
    not, with both versions."""
    installed, tried = versions(), NEWEST_OVER_NCCL if over_nccl else NEWEST_ON_GPUS
    return [
        f"{name} {installed[name]} (tried: {newest})"
        for name, newest in tried.items()
        if name in installed and _minor(installed[name]) > _minor(newest)
    ]


def _minor(version: str) -> tuple[int, int]:
    """The first two numbers of a version; what has none, such as a build from a checkout, counts as
    old."""
    found = re.match(r"(\d+)\.(\d+)", version)
    return (int(found[1]), int(found[2])) if found else (0, 0)
