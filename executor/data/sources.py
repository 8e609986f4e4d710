"""The rows of a source of data: a file, a directory of files or of a saved dataset, or a data set
of the Hugging Face hub. Raises UserError throughout."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from executor.data.rows import EXAMPLE, SUFFIXES, Row, needing, of_file
from planner.spec.data import DataFile
from planner.spec.errors import UserError
from planner.spec.wording import reason_of

SPLITS = ("train", "test", "validation", "valid", "dev", "eval")  # as files are named after them
SAVED, SEVERAL_SAVED = "state.json", "dataset_dict.json"  # of `datasets`' save_to_disk


def read_rows(source: DataFile) -> list[Row]:
    """The rows of one source, at least one."""
    rows = list(_of_hub(source) if source.path is None else _of_path(source.path, source.split))
    if not rows:
        raise UserError(f"{source.name}: the dataset is empty; it needs lines of {EXAMPLE}")
    return rows


def _of_path(path: Path, split: str | None) -> Iterator[Row]:
    if path.is_dir():
        return _of_directory(path, split)
    if split is not None:
        raise UserError(f"{path}: is one file, which has no split {split!r}; leave out split")
    return of_file(path)


def _of_directory(path: Path, split: str | None) -> Iterator[Row]:
    """What `datasets` saved there, or all files of data in it."""
    if (path / SAVED).is_file() or (path / SEVERAL_SAVED).is_file():
        with needing("datasets", path):
            import datasets

            yield from _of_dataset(str(path), datasets.load_from_disk(str(path)), split)
        return
    for file in _files(path, split):
        yield from of_file(file)


def _files(path: Path, split: str | None) -> list[Path]:
    """The files of data in a directory, in the order of their names. Those of a split begin with
    its name, or lie in a directory of that name."""
    there = [file.relative_to(path) for file in path.rglob("*") if file.suffix in SUFFIXES]
    found = sorted(file for file in there if not any(x.startswith(".") for x in file.parts))
    found = [file for file in found if (path / file).is_file()]
    splits = {split_of(file) for file in found} - {None}
    if split is not None:
        chosen = [file for file in found if split in (split_of(file), *file.parts[:-1])]
        chosen = chosen or [file for file in found if file.name.startswith(split)]
    else:
        chosen = found
        if len(splits) > 1:
            raise _no_split(str(path), sorted(map(str, splits)))
    if not chosen:
        what = f"files of split {split!r}" if split else "files of data"
        raise UserError(f"{path}: holds no {what} ({', '.join(SUFFIXES)}); check the path")
    return [path / file for file in chosen]


def split_of(file: Path) -> str | None:
    """The split that a file is named after: train of `train-00000-of-00001.parquet`."""
    beginnings = [file.name, *file.parts[:-1]]
    named = [s for name in beginnings for s in SPLITS if name.replace("-", ".").split(".")[0] == s]
    return named[0] if named else None


def _no_split(name: str, there: list[str]) -> UserError:
    return UserError(
        f"{name}: has the splits {', '.join(there)}; choose one, such as "
        f'{{ path = "...", split = "{there[0]}" }}'
    )


def _of_dataset(name: str, found: Any, split: str | None) -> Iterator[Row]:
    """The rows of a dataset of `datasets`, or of one split of several."""
    if isinstance(found, dict):
        there = list(found)
        if (split is None and len(there) > 1) or (split is not None and split not in there):
            raise _no_split(name, there)
        found = found[split or there[0]]
    elif split is not None and str(found.split or split) != split:
        raise _no_split(name, [str(found.split)])
    for number, columns in enumerate(found.with_format(None), start=1):
        yield Row(columns=columns, where=f"{name}: row {number}")


def _of_hub(source: DataFile) -> Iterator[Row]:
    with needing("datasets", source.name):
        import datasets

        try:
            found = datasets.load_dataset(source.hub, source.config)
        except Exception as error:
            raise _not_had(source, error) from None
        yield from _of_dataset(source.name, found, source.split)


def _not_had(source: DataFile, error: Exception) -> UserError:
    reason = reason_of(error, named=True)
    given = ", ".join(repr(name) for name in (source.hub, source.config) if name)
    return UserError(
        f"{source.name}: is not on this machine, and could not be fetched ({reason}); where there "
        f"is a network, save it with datasets.load_dataset({given}).save_to_disk(...), and name "
        "that directory"
    )
