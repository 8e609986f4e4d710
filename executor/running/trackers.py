"""The trackers that get metrics in addition to metrics.jsonl: TensorBoard always; Weights & Biases
and MLflow, which are loaded when asked for. Their own environment variables say where these two
send the metrics, and with which key."""

import html
import json
import logging
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch.utils.tensorboard import SummaryWriter

from executor.running.prometheus import Prometheus
from executor.running.said import Said
from planner.spec.errors import UserError
from planner.spec.files import write_atomic
from planner.spec.plan import Plan
from planner.spec.wording import reason_of

log = logging.getLogger("splitplan")

PROJECT = "splitplan"
# In a run directory: tracker -> its name for the run, to go on with when the run does.
TRACKING = "tracking.json"
Scalars = dict[str, float]
Samples = dict[str, NDArray[np.int64]]  # one number per sequence of the batch
TableRow = dict[str, Any]
TableRows = list[TableRow]
MOST_ROWS = 64  # of a table; samples.jsonl has all


class Tracker(Protocol):
    def log(self, step: int, scalars: Scalars, samples: Samples) -> None:
        """Told on the thread of the loop; must return at once."""
        ...

    def tell(self, name: str, step: int, rows: TableRows) -> None:
        """Told what the model said, as a table `name` of a step."""
        ...

    def close(self, failed: bool) -> None: ...


def check(names: Sequence[str]) -> None:
    """Raise UserError for a tracker whose package is not installed."""
    for name in names:
        if find_spec(name) is None:
            raise UserError(
                f"--track {name} needs {name}; install it with: pip install 'splitplan[{name}]'"
            )


class Trackers:
    """Those of one run. A run goes on without a tracker that fails; the log says so."""

    def __init__(self, names: Sequence[str] = (), port: int | None = None) -> None:
        """`port`: where Prometheus may read the metrics, if anywhere."""
        self._names, self._port, self._open = names, port, dict[str, Tracker]()

    def open(self, path: Path, plan: Plan, step: int) -> None:
        """Open the trackers for the run in this directory, which begins with this step. Raises
        UserError if one refuses."""
        self._open["tensorboard"] = TensorBoard(path, step)
        if self._port is not None:
            self._open["prometheus"] = Prometheus(self._port)
        known = path / TRACKING
        ids: dict[str, str] = json.loads(known.read_text()) if known.exists() else {}
        for name in self._names:
            try:
                tracker = TRACKERS[name](path, plan, ids.get(name))
            except Exception as error:
                reason = reason_of(error, most=300)
                raise UserError(
                    f"--track {name}: {reason}; mend that, or leave the tracker out"
                ) from error
            self._open[name], ids[name] = tracker, tracker.id
        if ids:
            write_atomic(known, json.dumps(ids) + "\n")

    def log(self, metrics: dict[str, Any]) -> None:
        scalars, samples = flatten(metrics)
        self._each(lambda tracker: tracker.log(metrics["step"], scalars, samples))

    def tell(self, lines: Sequence[Said]) -> None:
        """A table of the samples of each step, and one of each evaluation."""
        tables: dict[tuple[str, int], TableRows] = {}
        for line in lines:
            name = f"evaluation/{line['evaluation']}" if line["evaluation"] else "samples"
            table = tables.setdefault((name, line["step"]), [])
            if len(table) < MOST_ROWS:
                table.append(row_of(line))
        for (name, step), table in tables.items():
            self._each(lambda tracker, *told: tracker.tell(*told), name, step, table)

    def close(self, failed: bool) -> None:
        self._each(lambda tracker: tracker.close(failed))

    def _each(self, tell: Callable[..., None], *told: Any) -> None:
        for name, tracker in list(self._open.items()):
            try:
                tell(tracker, *told)
            except Exception as error:
                del self._open[name]
                reason = reason_of(error, most=300)
                log.error(
                    "%s failed and is told no more (%s); metrics.jsonl has everything", name, reason
                )


def flatten(metrics: dict[str, Any]) -> tuple[Scalars, Samples]:
    """The numbers in a line of metrics.jsonl, a histogram's as `name/bin`; and what the line tells
    of each sequence."""
    scalars: Scalars = {}
    samples: Samples = {}
    for name, value in metrics.items():
        if isinstance(value, dict):
            scalars |= {f"{name}/{key}": float(count) for key, count in value.items()}
        elif isinstance(value, list):  # runs of [value, sequences]
            values, counts = np.array(value, dtype=np.int64).reshape(-1, 2).T
            samples[name] = np.repeat(values, counts)
        elif isinstance(value, int | float) and name != "step":
            scalars[name] = float(value)
    return scalars, samples


def row_of(line: Said) -> TableRow:
    """A sample as a row of a table: its texts, its answer as JSON, and its scores."""
    answer = line["answer"]
    said = {
        "prompt": line["prompt"],
        "response": line["response"],
        "answer": answer if isinstance(answer, str) else json.dumps(answer, default=str),
    }
    figures = {key: line[key] for key in ("response_tokens", "truncated", "staleness")}
    return {**said, **line["scores"], **figures}


def _markdown(rows: TableRows) -> str:
    """A table that TensorBoard shows as one."""
    lines = ["| " + " | ".join(rows[0]) + " |", "|---" * len(rows[0]) + "|"]
    for row in rows:
        cells = [html.escape(str(cell)).replace("|", "&#124;") for cell in row.values()]
        cells = [f"<pre>{cell}</pre>".replace("\n", "<br>") for cell in cells]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


class TensorBoard:
    """Event files in the run directory; what they hold of later steps, before a run was resumed, is
    not shown."""

    def __init__(self, path: Path, step: int) -> None:
        self._writer = SummaryWriter(str(path), purge_step=step or None)

    def log(self, step: int, scalars: Scalars, samples: Samples) -> None:
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)
        for name, values in samples.items():
            if len(values):
                self._writer.add_histogram(name, values, step)

    def tell(self, name: str, step: int, rows: TableRows) -> None:
        self._writer.add_text(name, _markdown(rows), step)

    def close(self, failed: bool) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run of the project `splitplan`. Steps that are done again after a resume are there
    twice."""

    def __init__(self, path: Path, plan: Plan, run_id: str | None) -> None:
        import wandb

        self._histogram, self._table = wandb.Histogram, wandb.Table
        self._run = wandb.init(
            project=PROJECT,
            name=path.name,
            id=run_id,
            resume="allow",
            reinit="create_new",
            dir=str(path),
            config=plan.model_dump(mode="json"),
            settings=wandb.Settings(console="off", disable_code=True, disable_git=True),
        )
        self._run.define_metric("*", step_metric="step")
        self.id: str = self._run.id

    def log(self, step: int, scalars: Scalars, samples: Samples) -> None:
        histograms = {
            f"{name}_histogram": self._histogram(values)
            for name, values in samples.items()
            if len(values)
        }
        self._run.log({"step": step, **scalars, **histograms})

    def tell(self, name: str, step: int, rows: TableRows) -> None:
        columns = list(rows[0])
        cells = [[row[column] for column in columns] for row in rows]
        self._run.log({"step": step, name: self._table(columns=columns, data=cells)})

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class MLflow:
    """A run of the experiment `splitplan`. A thread sends, for the server may be slow."""

    def __init__(self, path: Path, plan: Plan, run_id: str | None) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        self._client, self._metric = MlflowClient(), Metric
        if run_id is None:
            known = self._client.get_experiment_by_name(PROJECT)
            experiment = known.experiment_id if known else self._client.create_experiment(PROJECT)
            run_id = self._client.create_run(experiment, run_name=path.name).info.run_id
            settings = {"plan": plan.name, "staleness": plan.staleness, **_settings(plan)}
            self._client.log_batch(
                run_id, params=[Param(name, str(value)) for name, value in settings.items()]
            )
        else:
            self._client.update_run(run_id, status="RUNNING")
        self.id: str = run_id
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._error: Exception | None = None

    def log(self, step: int, scalars: Scalars, samples: Samples) -> None:
        now = int(1000 * time.time())
        metrics = [
            self._metric(name, value, now, step)
            for name, value in scalars.items()
            if math.isfinite(value)
        ]
        self._submit(lambda: self._client.log_batch(self.id, metrics=metrics))

    def tell(self, name: str, step: int, rows: TableRows) -> None:
        columns = {column: [row[column] for row in rows] for column in rows[0]}
        file = f"{name}/step-{step:06d}.json"
        self._submit(lambda: self._client.log_table(self.id, columns, file))

    def _submit(self, send: Callable[[], Any]) -> None:
        if self._error is not None:
            raise self._error
        self._thread.submit(self._send, send)

    def _send(self, send: Callable[[], Any]) -> None:
        if self._error is not None:
            return
        try:
            send()
        except Exception as error:
            self._error = error

    def close(self, failed: bool) -> None:
        self._thread.shutdown()
        if self._error is not None:
            raise self._error
        self._client.set_terminated(self.id, "FAILED" if failed else "FINISHED")


def _settings(plan: Plan) -> dict[str, Any]:
    workload = plan.workload
    top = workload.model_dump(
        include={"name", "batch", "minibatch", "samples_per_prompt", "proximal", "seed"}
    )
    found = {f"workload.{name}": value for name, value in top.items()}
    for name, value in workload.algorithm.model_dump().items():
        found[f"algorithm.{name}"] = value
    for role, settings in workload.optimizer.model_dump().items():
        found |= {f"optimizer.{role}.{name}": value for name, value in settings.items()}
    return found


TRACKERS: dict[str, type[WeightsAndBiases] | type[MLflow]] = {
    "wandb": WeightsAndBiases,
    "mlflow": MLflow,
}
