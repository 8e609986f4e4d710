"""What trackers are told. Those of others run for real where they are installed, and send nothing
anywhere."""

import json
import math
import socket
import sys
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
from click.testing import CliRunner
from conftest import make_workload, split
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from executor.running import prometheus, trackers
from executor.running.run_directory import RunDirectory
from planner.cli import main
from planner.spec.errors import UserError

PLAN = split(make_workload())


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """What packages report of themselves stays here too."""
    for name, value in (
        ("WANDB_ERROR_REPORTING", "false"),
        ("DO_NOT_TRACK", "1"),
        ("MLFLOW_DISABLE_TELEMETRY", "true"),
    ):
        monkeypatch.setenv(name, value)


def metrics_of(step: int) -> dict[str, Any]:
    """As of a step whose first two sequences were sampled by weights 3, the third by weights 4."""
    return {
        "step": step,
        "reward": 0.5 + step,
        "actor/grad_norm": math.inf,
        "staleness_histogram": {"1": 1, "2": 2},
        "weights_versions": [[3, 2], [4, 1]],
    }


def said_in(step: int, evaluation: str | None = None) -> dict[str, Any]:
    return {
        "step": step,
        "evaluation": evaluation,
        "prompt": "a | <b>",
        "response": "c\nd",
        "answer": {"x": 1},
        "scores": {"score": 0.5, "length": None},
        "response_tokens": 2,
        "truncated": False,
        "staleness": None if evaluation else 0,
    }


def record(path: Path, steps: range, track: tuple[str, ...] = (), again: bool = False) -> None:
    directory = RunDirectory(path, tensorboard=True, track=track)
    directory.open(
        PLAN, metrics=(path / "metrics.jsonl").read_bytes() if again else b"", step=steps.start
    )
    for step in steps:
        directory.write_metrics(metrics_of(step))
        directory.write_samples([said_in(step), said_in(step, "sums"), said_in(step)])
    directory.close()


def test_a_line_of_metrics_becomes_numbers_and_one_version_per_sequence() -> None:
    scalars, samples = trackers.flatten(metrics_of(5))
    assert scalars == {
        "reward": 5.5,
        "actor/grad_norm": math.inf,
        "staleness_histogram/1": 1.0,
        "staleness_histogram/2": 2.0,
    }
    assert {name: values.tolist() for name, values in samples.items()} == {
        "weights_versions": [3, 3, 4]
    }
    assert (
        trackers.flatten({"step": 0, "weights_versions": []})[1]["weights_versions"].tolist() == []
    )


def test_tensorboard_has_scalars_and_histograms(tmp_path: Path) -> None:
    record(tmp_path / "r", range(3))
    events = EventAccumulator(str(tmp_path / "r")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("reward")] == [
        (0, 0.5),
        (1, 1.5),
        (2, 2.5),
    ]
    assert [event.value for event in events.Scalars("staleness_histogram/2")] == [2.0] * 3
    histogram = events.Histograms("weights_versions")[-1].histogram_value
    assert (histogram.num, histogram.min, histogram.max) == (3, 3, 4)
    texts = events.Tensors("samples/text_summary")
    assert [event.step for event in texts] == [0, 1, 2]
    (text,) = texts[0].tensor_proto.string_val
    lines = text.decode().splitlines()
    assert lines[0].startswith("| prompt | response | answer | score | length | response_tokens")
    row = "| <pre>a &#124; &lt;b&gt;</pre> | <pre>c<br>d</pre> | <pre>{&quot;x&quot;: 1}</pre> |"
    assert len(lines) == 4 and lines[2].startswith(row)
    assert len(events.Tensors("evaluation/sums/text_summary")) == 3


def test_a_tracker_that_fails_leaves_the_run_as_it_was(tmp_path: Path) -> None:
    class Failing:
        def log(self, step: int, *told: Any) -> None:
            raise ConnectionError("nobody there")

        def tell(self, name: str, step: int, rows: trackers.TableRows) -> None: ...
        def close(self, failed: bool) -> None:
            raise AssertionError("it is told no more")

    directory = RunDirectory(tmp_path / "r", tensorboard=True)
    directory.open(PLAN)
    assert directory._trackers is not None
    directory._trackers._open["other"] = Failing()
    for step in range(2):
        directory.write_metrics(metrics_of(step))
    directory.close()
    assert len((tmp_path / "r" / "metrics.jsonl").read_text().splitlines()) == 2
    assert (tmp_path / "r" / "log.txt").read_text().count(
        "other failed and is told no more (nobody there)"
    ) == 1
    assert len(EventAccumulator(str(tmp_path / "r")).Reload().Scalars("reward")) == 2


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_tracker_that_is_not_installed_is_named(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    plan = tmp_path / "plan.json"
    PLAN.write(plan)
    command = ["execute", str(plan), "--track", name, "--runs", str(tmp_path)]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 2
    assert (
        done.stderr == f"plan: --track {name} needs {name}; "
        f"install it with: pip install 'splitplan[{name}]'\n"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


def test_weights_and_biases_goes_on_with_its_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    record(tmp_path / "r", range(2), ("wandb",))
    (name,) = json.loads((tmp_path / "r" / trackers.TRACKING).read_text()).values()
    record(tmp_path / "r", range(2, 3), ("wandb",), again=True)
    kept = list((tmp_path / "r" / "wandb").glob(f"offline-run-*-{name}/run-{name}.wandb"))
    assert kept and b"weights_versions_histogram" in b"".join(path.read_bytes() for path in kept)
    tables = list((tmp_path / "r").rglob("*.table.json"))
    assert any(
        json.loads(path.read_text())["data"][0][:2] == ["a | <b>", "c\nd"] for path in tables
    )


def test_mlflow_has_the_metrics_of_all_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "store").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    record(tmp_path / "r", range(2), ("mlflow",))
    record(tmp_path / "r", range(2, 3), ("mlflow",), again=True)
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name(trackers.PROJECT)
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_name == "r" and run.info.status == "FINISHED"
    assert run.data.params["algorithm.clip"] == "0.2" and run.data.params["plan"] == "split"
    file = client.download_artifacts(run.info.run_id, "samples/step-000002.json", str(tmp_path))
    table = json.loads(Path(file).read_text())
    assert table["columns"][:2] == ["prompt", "response"]
    assert [row[:2] for row in table["data"]] == [["a | <b>", "c\nd"]] * 2
    history = client.get_metric_history(run.info.run_id, "reward")
    assert [(point.step, point.value) for point in history] == [(0, 0.5), (1, 1.5), (2, 2.5)]
    assert (
        run.data.metrics["staleness_histogram/2"] == 2 and "actor/grad_norm" not in run.data.metrics
    )


def test_a_tracker_that_refuses_ends_the_run_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nonsense://nowhere")
    with pytest.raises(
        UserError, match=r"--track mlflow: .*nonsense.*; mend that, or leave the tracker out"
    ):
        record(tmp_path / "r", range(1), ("mlflow",))


def test_prometheus_reads_the_last_step_on_the_loopback(tmp_path: Path) -> None:
    pytest.importorskip("prometheus_client")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    prometheus.check(port)
    directory = RunDirectory(tmp_path / "r", tensorboard=True, prometheus=port)
    directory.open(PLAN)
    shares = {"busy/a": 0.25, "idle/a": 0.75, "idle/a/generation": 0.5, "idle/a/host": 0.25}
    for step in range(2):
        directory.write_metrics(metrics_of(step) | shares)
    with pytest.raises(UserError, match=f"--prometheus {port}: .* choose another port"):
        prometheus.check(port)
    with urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    directory.close()
    assert {"splitplan_step 1.0", "splitplan_reward 1.5", 'splitplan_busy{pool="a"} 0.25'} <= {
        *lines
    }
    assert 'splitplan_idle{pool="a",waiting_for="generation"} 0.5' in lines
    assert 'splitplan_idle{pool="a",waiting_for=""} 0.75' in lines
    prometheus.check(port)  # it is free again


def test_names_of_prometheus() -> None:
    assert prometheus.described("idle/a+b/host") == (
        "splitplan_idle",
        {"pool": "a+b", "waiting_for": "host"},
    )
    assert prometheus.described("evaluation/x-1/pass@8") == ("splitplan_evaluation_x_1_pass_8", {})
