"""Directories that a command makes: each appears whole, with all its files, or not at all."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from planner.spec.errors import UserError


def check_free(path: Path) -> None:
    """Raise UserError unless `path` is a new or empty directory that can be made."""
    try:
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise UserError(f"{path}: is there already, and no empty directory; choose another one")
        parent = next(parent for parent in path.absolute().parents if parent.exists())
    except OSError as error:
        raise _unwritable(path, error) from None
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(f"{path}: cannot be made in {parent}; choose another place")


@contextlib.contextmanager
def whole_directory(path: Path) -> Iterator[Path]:
    """A new directory beside `path` to write into, which gets that name when all is written. Raises
    UserError where something cannot be written."""
    path = path.absolute()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    except OSError as error:
        raise _unwritable(path, error) from None
    try:
        yield made
        made.chmod(0o755)
        os.replace(made, path)  # an empty directory may be there
    except OSError as error:
        raise _unwritable(path, error) from None
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _unwritable(path: Path, error: OSError) -> UserError:
    reason = error.strerror or error
    return UserError(f"{path}: cannot be written ({reason}); choose another place")
