"""Train the small task with weights at boundaries and in flight, KV caches kept and recomputed, at
k = 1, 2 and 4, three seeds each: 27 runs, N at a time, each with a Ray of its own. Writes
learning.csv, learning.md and learning.png into --out.

    python reports/streaming/learn.py --out learning --at-once 1

A run has generation on one core and all else on another. Runs that have been made are not made
again.

The responses of the task are short, and engines are faster than trainers: left to itself, a stream
would have every sequence ended before the next weights come. So engines decode a few times with
each version of the weights and then rest, until newer ones come or trainers wait for a batch. With
two times a response of five tokens mixes up to four versions. `--pace 0` leaves streams to
themselves."""

import argparse
import csv
import io
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from executor.data.prompts import Prompts
from executor.digits.task import make as make_task
from executor.fleet.asking import Rank
from executor.rollout.engine import EngineWorker
from executor.rollout.streaming import Stretches, Unfinished
from executor.running import step
from executor.running.execute import execute
from executor.running.growing import GrowingBatch
from executor.running.options import RunOptions
from executor.running.processes import Processes
from executor.running.stream import RolloutStream
from planner.commands.local import local_cluster
from planner.spec.data import Sampler
from planner.spec.files import write_atomic
from planner.spec.plan import Plan
from planner.spec.workload_file import load_workload

KINDS, STALENESS, SEEDS = ("boundary", "keep", "recompute"), (1, 2, 4), (0, 1, 2)
STEPS, EVALUATE_EVERY, PACE = 60, 5, 2
LAST_STEPS, LAST_EVALUATIONS = 10, 3  # whose mean is the end of a run
ATTEMPTS, STAGGER_SECONDS = 2, 0.5  # Rays that start together may grasp for the same port
ORDER = ("generate", "score", "ref_logprobs", "old_logprobs", "values", "advantages")
ORDER += ("update_critic", "update_actor", "sync_weights", "evaluate")
KEPT = ("exact_match", "score", "staleness", "segments", "log_prob_gap")
KEPT += ("importance/effective_share",)
COLOURS = {"boundary": "#000000", "keep": "#0072B2", "recompute": "#D55E00"}

Row = dict[str, Any]


class Run(NamedTuple):
    k: int
    kind: str
    seed: int

    def __str__(self) -> str:
        return f"{self.kind}-{self.k}-{self.seed}"


# Seed by seed, so that runs that are compared run beside each other.
RUNS = [Run(k, kind, seed) for seed in SEEDS for k in STALENESS for kind in KINDS]


def plan_of(run: Run, task: Path) -> Plan:
    """The same placement and program for all kinds."""
    workload = load_workload(task / "workload.toml")
    assert workload.data is not None
    data = workload.data.changed(evaluate_every=EVALUATE_EVERY)
    changes: dict[str, Any] = {"seed": run.seed, "max_staleness": run.k, "data": data}
    streams = run.kind != "boundary"
    if streams:
        changes |= {"sync": "in_flight", "kv": run.kind}
    trained = {"engine": "fsdp", "shard": 1, "micro_batch_tokens": 4096, "recompute": False}
    roles: dict[str, Any] = {
        role: {**trained, "pools": ["rest"]} for role in ("actor", "critic", "reference", "reward")
    }
    roles["rollout"] = {
        "engine": "transformers",
        "pools": ["generation"],
        "tensor_parallel": 1,
        "replicas": 1,
        "memory_fraction": 0.1,
        "concurrency": workload.batch * (run.k + 1),
    }
    return Plan.model_validate(
        {
            "name": str(run),
            "workload": workload.changed(**changes),
            "cluster": local_cluster(2),
            "pools": {"generation": {"gpus": [(0, 0)]}, "rest": {"gpus": [(0, 1)]}},
            "roles": roles,
            "program": [{"call": c, "offset": run.k if c == "generate" else 0} for c in ORDER],
            "staleness": run.k,
            "sync": "in_flight" if streams else "boundary",
        }
    )


class PacedStream(RolloutStream):
    """Engines decode `pace` times with each version of the weights, and more only if somebody waits
    for what they make."""

    pace = PACE

    def __init__(self, processes: Processes) -> None:
        self._decoded: dict[int, int] = {}  # times, by version
        self._evaluations: list[GrowingBatch] = []
        super().__init__(processes)
        self._slice_seconds = 0.0  # for one time

    def begin_first(self, prompts: Prompts, sampler: Sampler) -> GrowingBatch:
        batch = super().begin_first(prompts, sampler)
        with self._changed:
            self._evaluations.append(batch)
            self._changed.notify_all()
        return batch

    def _has_work(self, number: int) -> bool:
        rests = self._decoded.get(self.version, 0) >= self.pace
        return super()._has_work(number) and (not rests or self._is_waited_for())

    def _is_waited_for(self) -> bool:
        due = [batch for step, batch in self._steps.items() if step <= self.version]
        return any(batch.left for batch in [*due, *self._evaluations])

    def _slice(self, rank: Rank[EngineWorker], given: list[Unfinished]) -> Stretches:
        self._decoded[self.version] = self._decoded.get(self.version, 0) + 1
        return super()._slice(rank, given)


def train(run: Run, out: Path, steps: int, pace: int) -> None:
    """In a process of its own: do a run and keep what is drawn of it."""
    if pace:
        PacedStream.pace = pace
        step.RolloutStream = PacedStream  # type: ignore[misc]
    options = RunOptions(steps=steps, save_every=0, max_restarts=0)
    shutil.rmtree(out / "runs" / str(run), ignore_errors=True)
    plan = plan_of(run, out / "task")
    path = execute(plan, name=str(run), runs=out / "runs", options=options)
    lines = map(json.loads, (path / "metrics.jsonl").read_text().splitlines())
    rows = [
        {**run._asdict(), "step": line["step"], **{name: line.get(name) for name in KEPT}}
        for line in lines
    ]
    write_atomic(out / "done" / f"{run}.json", json.dumps(rows))
    shutil.rmtree(path)


def in_process(run: Run, number: int, options: argparse.Namespace, out: Path) -> str:
    """The outcome of a run, in a line."""
    if (out / "done" / f"{run}.json").exists():
        return "was there"
    if number < options.at_once:
        time.sleep(number * STAGGER_SECONDS)
    command = [sys.executable, __file__, "--out", str(out), "--steps", str(options.steps)]
    command += ["--pace", str(options.pace), "--in-process", str(run)]
    one_core = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    log = out / "logs" / f"{run}.txt"
    for _ in range(ATTEMPTS):
        began = time.monotonic()
        with log.open("w") as file:
            done = subprocess.run(
                command, env={**os.environ, **one_core}, stdout=file, stderr=subprocess.STDOUT
            )
        if done.returncode == 0:
            return f"{time.monotonic() - began:.0f} s"
    return f"failed, see {log}"


# --- what came of it ---


def rows_of(out: Path) -> dict[Run, list[Row]]:
    """The steps of all runs that have been made."""
    files = {run: out / "done" / f"{run}.json" for run in RUNS}
    return {run: json.loads(file.read_text()) for run, file in files.items() if file.exists()}


def csv_of(made: dict[Run, list[Row]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("k", "weights", "seed", "step", *KEPT))
    for run, rows in made.items():
        for row in rows:
            values = [row[name] for name in KEPT]
            figures = ["" if value is None else f"{value:.5g}" for value in values]
            writer.writerow((*run, row["step"], *figures))
    return text.getvalue()


def end_of(rows: list[Row]) -> dict[str, float]:
    """What a run comes to: its last evaluations, and the means of its last steps."""
    right = [row["exact_match"] for row in rows if row["exact_match"] is not None]
    found = {name: np.mean([row[name] or 0.0 for row in rows[-LAST_STEPS:]]) for name in KEPT}
    return {**found, "exact_match": np.mean(right[-LAST_EVALUATIONS:])}


def table(made: dict[Run, list[Row]]) -> Iterator[str]:
    """A line for each kind at each staleness."""
    yield "| k | weights | held-out exact match | score | staleness | segments | gap | share |"
    yield "|---:|---|---|---:|---:|---:|---:|---:|"
    for k in STALENESS:
        for kind in KINDS:
            ends = [end_of(rows) for run, rows in made.items() if run[:2] == (k, kind)]
            if not ends:
                continue
            right = [end["exact_match"] for end in ends]
            means = [f"{np.mean([end[name] for end in ends]):.3g}" for name in KEPT[1:]]
            spread = f"{np.mean(right):.3f} ({min(right):.3f} to {max(right):.3f})"
            yield f"| {k} | {kind} | {spread} | {' | '.join(means)} |"


def draw(made: dict[Run, list[Row]], file: Path) -> None:
    """A panel for each staleness: the mean of the seeds, and from the lowest to the highest."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(STALENESS), figsize=(9, 3), dpi=100, sharey=True)
    for k, panel in zip(STALENESS, panels, strict=True):
        for kind in KINDS:
            some = [rows for run, rows in made.items() if run[:2] == (k, kind)]
            evaluated = [[row for row in rows if row["exact_match"] is not None] for rows in some]
            if not evaluated:
                continue
            steps = [row["step"] + 1 for row in evaluated[0]]
            right = np.array([[row["exact_match"] for row in rows] for rows in evaluated])
            panel.plot(steps, right.mean(axis=0), color=COLOURS[kind], label=kind)
            low, high = right.min(axis=0), right.max(axis=0)
            panel.fill_between(steps, low, high, color=COLOURS[kind], alpha=0.15, lw=0)
        panel.set(title=f"k = {k}", xlabel="steps")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("held-out exact match")
    panels[-1].legend(loc="lower right", fontsize=8)
    figure.tight_layout()
    figure.savefig(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--at-once", type=int, default=1, help="runs at a time")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--pace", type=int, default=PACE, help="0: as fast as engines are")
    parser.add_argument("--runs", nargs="+", help="only these, such as keep-1-0")
    parser.add_argument("--in-process", help=argparse.SUPPRESS)
    options = parser.parse_args()
    out = options.out.resolve()
    runs = [run for run in RUNS if str(run) in (options.runs or map(str, RUNS))]
    if options.in_process:
        (run,) = (run for run in RUNS if str(run) == options.in_process)
        return train(run, out, options.steps, options.pace)
    for directory in ("logs", "done", "runs"):
        (out / directory).mkdir(parents=True, exist_ok=True)
    if not (out / "task").exists():
        make_task(out / "task")
    with ThreadPoolExecutor(options.at_once) as threads:
        started = {
            run: threads.submit(in_process, run, number, options, out)
            for number, run in enumerate(runs)
        }
        for run, outcome in started.items():
            print(f"{run}: {outcome.result()}", flush=True)
    made = rows_of(out)
    if not made:
        sys.exit("no run has been made")
    lines = "\n".join(table(made))
    print(lines)
    write_atomic(out / "learning.csv", csv_of(made))
    write_atomic(out / "learning.md", lines + "\n")
    draw(made, out / "learning.png")


if __name__ == "__main__":
    main()
