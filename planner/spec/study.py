"""A study: plans that are predicted first and then run for real, cell by cell; and the result of
one cell."""

from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, model_validator

from planner.spec.files import Bytes, Count, File, Spec, Steps, names_a_file, read_data
from planner.spec.plan import Gpu


class Cell(Spec):
    """One plan of a study: a named `baseline`, the winner of a `search` up to that staleness (or
    its `runner_up`-th runner-up), or the file of a `plan`. `pins` narrow a baseline or a search as
    `--pin` does."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    baseline: str | None = None
    search: NonNegativeInt | None = None
    runner_up: NonNegativeInt = 0
    plan: Path | None = None
    pins: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if sum(source is not None for source in (self.baseline, self.search, self.plan)) != 1:
            raise ValueError(f"cell {self.name!r} needs one of baseline, search and plan")
        if self.runner_up and self.search is None:
            raise ValueError(
                f"cell {self.name!r}: runner_up needs a search; add one, such as search = 1"
            )
        return self


class Study(File):
    """Plans of one workload on one cluster. In each cell `steps` steps are measured. Before them
    come `warmup` steps, or as many as the pipeline takes to fill and one more; after them those in
    which it drains. `matrix_flops` is the measured rate of a bf16 matrix product on one GPU in
    FLOP/s; the report states the updates' share of it."""

    SCHEMA: ClassVar[str] = "splitplan/study/1"

    name: str
    workload: str
    gpus: Count | None = None
    device: str | None = None
    cluster: str | None = None
    profiles: tuple[Path, ...] = ()
    steps: Steps = 6
    warmup: Steps = 1
    matrix_flops: PositiveFloat | None = None
    cells: Annotated[tuple[Cell, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        names = [cell.name for cell in self.cells]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"cells: {min(twice)!r} is used twice; a cell's name is its directory")
        return self

    def warmup_of(self, staleness: int) -> int:
        """The number of first steps of a plan that do not count."""
        return max(self.warmup, staleness + 1)


def load_study(path: Path) -> Study:
    """Read a study from TOML or JSON; relative paths start at the file's folder. Raises
    UserError."""
    data, base = read_data(path), path.parent
    for key in ("workload", "cluster"):
        if isinstance(data.get(key), str) and names_a_file(data[key]):
            data[key] = str(base / data[key])
    if isinstance(data.get("profiles"), list):
        data["profiles"] = [
            base / name if isinstance(name, str) else name for name in data["profiles"]
        ]
    for cell in data.get("cells", ()) if isinstance(data.get("cells"), list) else ():
        if isinstance(cell, dict) and isinstance(cell.get("plan"), str):
            cell["plan"] = base / cell["plan"]
    Study.check_schema(data, path)
    return Study.parse(data, path)


class GpuMemory(Spec):
    """Peak bytes of one GPU over the steps of a cell: `used` by all processes, as the driver
    counts; in each process the bytes of torch's tensors (`allocated`) and those that its allocator
    held for them (`reserved`); and the allocator's `retries`: how often it had to give back memory
    before it got more, which takes time."""

    gpu: Gpu
    used: Bytes
    allocated: dict[str, Bytes] = Field(default_factory=dict)
    reserved: dict[str, Bytes] = Field(default_factory=dict)
    retries: dict[str, NonNegativeInt] = Field(default_factory=dict)


class CellResult(File):
    """The end of a cell. `host` tells machines apart, and boots of one machine: ratios hold only
    between cells of one host. `start_seconds`: time until the first step could begin.
    `engines_started`: engines that were started for this cell."""

    SCHEMA: ClassVar[str] = "splitplan/cell/1"

    status: Literal["done", "failed"]
    reason: str = ""
    plan_sha256: str
    host: str
    gpu: str = ""
    date: str
    versions: dict[str, str] = Field(default_factory=dict)
    start_seconds: NonNegativeFloat = 0.0
    run_seconds: NonNegativeFloat = 0.0
    engines_started: NonNegativeInt = 0
    memory: tuple[GpuMemory, ...] = ()
