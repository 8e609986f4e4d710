"""What `plan import` reads: a log of each framework."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from planner.commands.inputs import read_inputs
from planner.commands.options import JobOptions
from planner.exchange.imported_run import ImportedRun
from planner.exchange.table_run import OPENRLHF_COLUMNS, imported_table, known_calls
from planner.exchange.verl_log import read_verl_log
from planner.exchange.verl_run import Told, imported_verl
from planner.search.questions.given_split import best_in, parse_pools, with_layouts
from planner.search.solver.problem import problem_of
from planner.search.solver.write_plan import assemble
from planner.spec.errors import UserError
from planner.spec.files import read_text


@dataclass(frozen=True, kw_only=True)
class Sources:
    """What the command line says of a run: its `log`, what a log of verl may not say, and what a
    table says nothing of."""

    log: Path
    config: Path | None
    told: Told
    job: JobOptions
    pools: tuple[str, ...]
    layouts: tuple[str, ...]
    columns: tuple[str, ...]
    unit: str


def reader(source: str, given: Sources) -> Callable[[], ImportedRun]:
    """The function that reads a run of a framework, or of any as `csv`. It raises UserError, which
    names the log."""
    if source == "verl":
        return lambda: _verl(given)
    return lambda: _table(source, given)


def _verl(given: Sources) -> ImportedRun:
    found = read_verl_log(given.log)
    settings = found.config if given.config is None else read_yaml(given.config)
    if settings is None:
        raise UserError(
            f"{given.log}: has no whole configuration, which verl prints at the start; name its "
            "file with --config (outputs/…/.hydra/config.yaml)"
        )
    try:
        return imported_verl(found, settings, given.told)
    except UserError as error:
        raise UserError(f"{given.log}: {error}") from None


def _table(source: str, given: Sources) -> ImportedRun:
    """A run whose log has seconds only: job, GPUs and placement are named."""
    if not given.pools:
        raise UserError(
            "a table does not say where roles are: name their GPUs, such as --pool "
            f"all={given.job.gpus or 8}"
        )
    inputs = read_inputs(given.job)
    problem = problem_of(inputs.workload, inputs.cluster, (), 0)
    candidate = best_in(parse_pools(given.pools, problem.workload.roles), problem)
    plan = with_layouts(assemble(candidate, "imported", problem), given.layouts)
    columns = given.columns
    if source == "openrlhf" and not columns:
        columns = tuple(known_calls(OPENRLHF_COLUMNS, plan.dataflow.steady))
    return imported_table(given.log, plan, columns, given.unit, given.told.warmup)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises UserError."""
    import yaml

    text = read_text(path)
    try:
        found = yaml.safe_load(text)
    except RecursionError:
        raise UserError(f"{path}: not valid YAML (nested too deeply)") from None
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{path}: not valid YAML ({str(error).splitlines()[0]})") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: holds a {type(found).__name__}, not a mapping of keys")
    return found
