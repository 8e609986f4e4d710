"""What is gone on with: a small job and its plans, its metrics, and checkpoints that were written
without a run."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from conftest import make_plan, make_workload

from executor.running import saving
from executor.running.options import RunOptions
from executor.running.run_directory import timeline_of
from executor.running.stops import in_flight
from executor.training import shards
from planner.predict.schedule import tasks_of
from planner.spec.plan import Plan

STEPS = 4
OPTIONS = RunOptions(save_every=2, keep=2, max_restarts=0, samples_every=1)
WORKLOAD = make_workload(steps=STEPS)


def one_step_off(**more: Any) -> Plan:
    """Sequences of the next step are made, scored and valued beside the updates, so there are many
    in flight."""
    roles = more.pop(
        "homes", {"rollout": "g", "actor": "t", "critic": "t", "reference": "t", "reward": "g"}
    )
    offsets = {
        "generate": 1,
        "score": 1,
        "ref_logprobs": 0 if more.pop("late_reference", False) else 1,
    }
    pools = more.pop("pools", {"g": 1, "t": 1})
    return make_plan(
        WORKLOAD,
        pools,
        roles,
        offsets=offsets,
        staleness=1,
        name="one-step-off",
        **more,
    )


TIMED = ("seconds", "tokens_per_second", "idle/", "busy/")


def metrics_of(run: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: x for name, x in line.items() if not name.startswith(TIMED)} for line in lines]


def said_in(run: Path) -> list[str]:
    """The samples, which are written as calls end: in any order."""
    return sorted((run / "samples.jsonl").read_text().splitlines())


def write_run(run: Path) -> None:
    """A run with two small checkpoints, as `Saver` writes them."""
    plan = one_step_off()
    saver = saving.Saver(run / "checkpoints", every=2, keep=2)
    run.mkdir()
    tasks = tasks_of(plan, 9)
    for step in (2, 4, 6):
        (run / "metrics.jsonl").write_text("".join(f'{{"step": {i}}}\n' for i in range(step)))
        stop = next(
            task.index + 1
            for task in tasks
            if (task.call.name, task.step) == ("sync_weights", step - 1)
        )
        done = in_flight(tasks, stop)
        timeline = timeline_of(plan, 9, [])
        saver.save(
            lambda directory, step=step: snapshot(directory, step),
            step=step,
            done=done,
            plan=plan,
            timeline=lambda _, timeline=timeline: timeline,
            metrics=run / "metrics.jsonl",
        )
    saver.wait()
    assert not saver.error


def snapshot(directory: Path, step: int, rows: int = 8) -> saving.Snapshot:
    writers = []
    for rank in range(2):
        model = torch.nn.Linear(3, rows, bias=False)
        copied = shards.copy("actor", model, torch.optim.AdamW(model.parameters()), step, rank)
        assert copied is not None
        writers.append(shards.Writer({"actor": copied}, directory))

    def written() -> Any:
        parts = [writer.finished() for writer in writers]
        return None if None in parts else parts

    arrays = {f"{step}/scores": np.arange(4, dtype=np.float32)}
    return saving.Snapshot(
        arrays=arrays,
        metrics={step: {"kl": float("nan")}},
        evaluations={},
        skipped={},
        kl_coef=None,
        written=written,
    )


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())
