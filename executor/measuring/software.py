"""The software that a measurement is made with."""

import contextlib
import platform
from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("torch", "transformers", "ray", "vllm")


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that are installed, by name."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
