"""The rows of one file: JSON lines, a JSON list, CSV, Parquet or Arrow. Every mistake is a
UserError that names file and line, or the row where there are no lines."""

import csv
import io
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from planner.spec.errors import UserError
from planner.spec.wording import reason_of

EXAMPLE = '{"prompt": "...", "answer": "..."}'
LONGEST_LINE = 2**26  # bytes; no prompt is as long, so it is another kind of file
TEXT_TABLES = {".csv": ",", ".tsv": "\t"}  # suffix -> what stands between two cells
SUFFIXES = (".jsonl", ".ndjson", ".json", *TEXT_TABLES, ".parquet", ".arrow")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row with all its columns; `where` it stands, such as file:line."""

    columns: dict[str, Any]
    where: str


def of_file(path: Path) -> Iterator[Row]:
    try:
        with path.open("rb") as file:
            begin = file.read(8)
        if path.suffix == ".parquet" or begin.startswith(b"PAR1"):
            return _of_parquet(path)
        if path.suffix == ".arrow" or begin.startswith(b"ARROW1"):
            return _of_arrow(path)
        content = path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error.strerror or str(error)) from None
    text = _text(path, content)
    if path.suffix in TEXT_TABLES:
        return _of_table(path, text, TEXT_TABLES[path.suffix])
    return _of_list(path, text) if text.lstrip()[:1] == "[" else _of_lines(path, text)


def _unreadable(path: Path, reason: str) -> UserError:
    return UserError(f"{path}: the dataset cannot be read ({reason}); check the path")


def _text(path: Path, content: bytes) -> str:
    """The text of a file, without a mark of its byte order."""
    if content.startswith((b"\x1f\x8b", b"PK\x03\x04", b"(\xb5/\xfd")):
        raise UserError(f"{path}: is compressed; unpack it into lines of {EXAMPLE}")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path}:{line}: the dataset cannot be read (byte {error.start} is no UTF-8); save it "
            "as UTF-8"
        ) from None


def _of_lines(path: Path, text: str) -> Iterator[Row]:
    """Lines end at a newline and nowhere else: splitlines() would also split at characters that
    JSON strings hold."""
    if not text:
        return
    for number, line in enumerate(text.removesuffix("\n").split("\n"), start=1):
        yield _of_line(f"{path}:{number}", line)


def _of_line(where: str, line: str) -> Row:
    if not line.strip():
        raise UserError(f"{where}: empty line; remove it or write {EXAMPLE}")
    if len(line) > LONGEST_LINE:
        raise UserError(
            f"{where}: a line of {len(line):,} characters, and {LONGEST_LINE:,} are the most; is "
            "the file one of JSON lines?"
        )
    try:
        found = json.loads(line, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not valid JSON ({error}); a line is {EXAMPLE}") from None
    return Row(columns=_columns(where, found), where=where)


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is not a number")


def _columns(where: str, found: Any) -> dict[str, Any]:
    if not isinstance(found, dict):
        what = type(found).__name__
        raise UserError(f"{where}: is a {what}, and a row has columns, like {EXAMPLE}")
    return found


def _of_list(path: Path, text: str) -> Iterator[Row]:
    try:
        items = json.loads(text, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path}: not valid JSON ({error}); it begins as a list, whose items are {EXAMPLE}"
        ) from None
    for number, item in enumerate(items, start=1):
        where = f"{path}: item {number}"
        yield Row(columns=_columns(where, item), where=where)


def _of_table(path: Path, text: str, delimiter: str) -> Iterator[Row]:
    """The rows below the names of the columns; a cell may go over several lines, and is a text."""
    csv.field_size_limit(LONGEST_LINE)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    names: list[str] | None = None
    line = 1
    try:
        for cells in reader:
            where, line = f"{path}:{line}", reader.line_num + 1
            if names is None:
                names = _names(where, cells)
            elif not cells:
                raise UserError(f"{where}: empty line; remove it")
            elif len(cells) != len(names):
                raise UserError(
                    f"{where}: has {len(cells)} cells, and the first line names {len(names)} "
                    "columns; put cells with commas or newlines in double quotes"
                )
            else:
                yield Row(columns=dict(zip(names, cells, strict=True)), where=where)
    except csv.Error as error:
        raise UserError(f"{path}:{line}: not valid CSV ({error}); mend that line") from None


def _names(where: str, cells: list[str]) -> list[str]:
    doubled = sorted({name for name in cells if cells.count(name) > 1 or not name.strip()})
    if doubled or not cells:
        what = f"column {doubled[0]!r} is there twice or has no name" if doubled else "is empty"
        raise UserError(f"{where}: {what}; the first line names the columns")
    return cells


def _of_parquet(path: Path) -> Iterator[Row]:
    with needing("pyarrow", path):
        import pyarrow.parquet

        found = pyarrow.parquet.ParquetFile(path)
        batches = found.iter_batches()
        yield from _of_batches(path, batches)


def _of_arrow(path: Path) -> Iterator[Row]:
    with needing("pyarrow", path):
        import pyarrow.ipc

        with pyarrow.memory_map(str(path)) as file:
            is_file = file.read(6) == b"ARROW1"
            file.seek(0)
            opened = pyarrow.ipc.open_file(file) if is_file else pyarrow.ipc.open_stream(file)
            yield from _of_batches(path, opened.read_all().to_batches())


def _of_batches(path: Path, batches: Iterable[Any]) -> Iterator[Row]:
    number = 0
    for batch in batches:
        batch.validate(full=True)  # a damaged one may end the process
        for columns in batch.to_pylist():
            number += 1
            yield Row(columns=columns, where=f"{path}: row {number}")


@contextmanager
def needing(package: str, what: object) -> Iterator[None]:
    """Name a package that is missing, and turn what it raises into one line."""
    if find_spec(package) is None:
        raise UserError(
            f"{what}: reading it needs {package}; install it with: pip install 'splitplan[execute]'"
        )
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = reason_of(error)
        raise UserError(f"{what}: the dataset cannot be read ({reason}); save it again") from None
