"""Runs of other frameworks, imported: what their steps take, as it was measured; and one line for
what cannot be read, with nothing half-written."""

import json
import re
from pathlib import Path
from statistics import median
from typing import Any

import click
import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from planner.cli import main
from planner.exchange.known_models import CountedModel, model_of, published
from planner.exchange.observed_lengths import SeenLengths, fitted
from planner.exchange.toml_text import toml_text
from planner.exchange.verl_log import read_verl_log
from planner.predict.forecast import predict
from planner.predict.profile import Profile
from planner.predict.schedule import load_plan
from planner.spec.cluster import load_cluster
from planner.spec.errors import UserError
from planner.spec.lengths import Fixed, Lognormal, sample
from planner.spec.timeline import Timeline, step_seconds
from planner.spec.workload import Shape
from planner.spec.workload_file import load_workload

LOG = Path(__file__).parent / "logs" / "verl-0.9.1-sync-1xh200.log"
TEXT = LOG.read_text()
STEPS = [line for line in TEXT.splitlines() if " step:" in line]
FILES = ["cluster.toml", "plan.json", "profile.json", "timeline.json", "workload.toml"]


def plan(*arguments: str) -> str:
    """What a command prints; of one that fails the only line."""
    result = CliRunner().invoke(main, list(map(str, arguments)))
    assert result.exit_code in (0, 2), result.exception
    lines = result.stderr.splitlines()
    assert len(lines) == (1 if result.exit_code else 0), lines
    return result.stderr if result.exit_code else result.stdout


def imported(text: str, folder: Path, *options: str) -> str:
    (folder / "run.log").write_text(text)
    return plan("import", "verl", folder / "run.log", "--out", folder / "out", *options)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verl")
    shown = imported(TEXT, folder)
    assert "predicts 15.5 s" in shown
    assert sorted(path.name for path in (folder / "out").iterdir()) == FILES
    return folder / "out"


# --- the log of verl 0.9.1 on one H200 ---


def test_their_step_is_predicted_within_five_percent_of_the_median(run: Path) -> None:
    found = load_plan(run / "plan.json")
    profile = Profile.read(run / "profile.json")
    counted = [float(re.search(r"timing_s/step:([\d.]+)", line)[1]) for line in STEPS[2:]]
    assert median(counted) == pytest.approx(15.85, abs=0.01)
    predicted = predict(found, (profile,)).step_seconds
    assert predicted == pytest.approx(median(counted), rel=0.05)
    assert predicted == pytest.approx(np.mean(counted), rel=1e-6)  # serial calls: means add up
    timeline = Timeline.read(run / "timeline.json")
    assert (timeline.steps, timeline.warmup) == (7, 2)
    assert step_seconds(timeline) == pytest.approx(np.mean(counted), rel=0.01)


def test_the_job_is_theirs(run: Path) -> None:
    job = load_workload(run / "workload.toml")
    assert (job.batch, job.minibatch, job.group) == (128, 32, 1)
    assert (job.prompt, job.response) == (Fixed(tokens=256), Fixed(tokens=512))
    assert job.actor.shape == job.critic.shape == job.reference.shape
    assert job.actor.shape.parameters() == pytest.approx(1.54e9, rel=0.01)
    assert job.algorithm.advantage == "gae" and job.algorithm.kl_coef == 0.001
    assert (job.optimizer.actor.lr, job.optimizer.critic.lr) == (1e-6, 1e-5)
    cluster = load_cluster(run / "cluster.toml")
    assert [node.gpus for node in cluster.nodes] == [1] and list(cluster.devices) == ["h200"]


def test_the_placement_is_theirs(run: Path) -> None:
    found = load_plan(run / "plan.json")
    assert list(found.pools) == ["all"] and found.staleness == 0
    assert all(layout.micro_batch_tokens == 32768 for layout in found.trainers.values())
    assert found.trainers["actor"].recompute and found.trainers["critic"].recompute
    assert found.rollout.concurrency == 128 and found.rollout.offload
    order = [item.call for item in found.program]
    assert order.index("old_logprobs") < order.index("ref_logprobs")  # as verl has it
    assert all(item.blocking for item in found.program)


@pytest.mark.parametrize(
    ("command", "shown"),
    [
        ("compare plan.json .", "error +0."),
        ("explain plan.json", "What binds plan: 15.5 s per step"),
        ("simulate plan.json --set batch=256", "30.2 s per step"),
        ("check plan.json", "is sound"),
        ("estimate --cluster cluster.toml --workload workload.toml --profile profile.json"
         " --pool all=1", "measured"),
        ("search --cluster cluster.toml --workload workload.toml --profile profile.json"
         " --no-picture --out best.json", "proven optimal"),
    ],
)  # fmt: skip
def test_commands_work_on_what_was_imported(
    run: Path, monkeypatch: pytest.MonkeyPatch, command: str, shown: str
) -> None:
    monkeypatch.chdir(run)
    assert shown in plan(*command.split())


def test_lines_need_no_time_and_no_process_before_them(tmp_path: Path, run: Path) -> None:
    """As in a log of a local run without Ray's prefixes."""
    bare = re.sub(r"(?m)^\d+\.\d+ (?:\(\w+ pid=\d+\) )?", "", TEXT)
    assert "step" in imported(bare, tmp_path).lower()
    assert Profile.read(tmp_path / "out" / "profile.json").points == (
        Profile.read(run / "profile.json").points
    )


def test_the_configuration_may_be_a_file_of_its_own(tmp_path: Path) -> None:
    import yaml

    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(read_verl_log(LOG).config))
    rest = "\n".join(line for line in TEXT.splitlines() if "{'" not in line[:60])
    assert "no whole configuration" in imported(rest, tmp_path)
    assert "15.5 s" in imported(rest, tmp_path, "--config", str(config))


# --- bad input ---


def without(text: str, pattern: str, put: str = "") -> str:
    changed = re.sub(pattern, put, text)
    assert changed != text
    return changed


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no whole configuration"),
        ("hello\n", "no whole configuration"),
        (TEXT[: len(TEXT) // 4], "no whole configuration"),
        (TEXT.split("Training Progress")[0], "no line of a finished step"),
        (
            TEXT.split("Training Progress")[0] + "\ntorch.OutOfMemoryError: CUDA out of memory.\n",
            "the run failed: torch.OutOfMemoryError: CUDA out of memory.",
        ),
        (without(TEXT, "timing_s/step:", "timing/step:"), "another version of verl"),
        (without(TEXT, "timing_s/old_log_prob:", "time/old:"), "nothing of how long old_logprobs"),
        (without(TEXT, r"timing_s/gen:", "timing_s/gen:9"), "are both in seconds"),
        (without(TEXT, r"timing_s/step:\d+\.", "timing_s/step:-1."), "damaged"),
        (without(TEXT, "response_length/mean", "resp/mean"), "no response_length/mean"),
        (without(TEXT, "response_length/mean:", "response_length/mean:99999"), "no step has such"),
        (without(TEXT, r"response_length/max:[\d.]+", "response_length/max:-5"), "of -5 tokens"),
        (without(TEXT, "'train_batch_size': 128", "'batch': 128"), "no data.train_batch_size"),
        (without(TEXT, "'train_batch_size': 128", "'train_batch_size': '128'"), "is no int"),
        (without(TEXT, "'train_batch_size': 128", "'train_batch_size': 0"), "must be 1 at least"),
        (without(TEXT, "'strategy': 'fsdp2'", "'strategy': 'megatron'"), "only fsdp or fsdp2"),
        (without(TEXT, "'adv_estimator': 'gae'", "'adv_estimator': 'x'"), "only gae, grpo"),
        (without(TEXT, "'trainer_mode': 'sync'", "'trainer_mode': 'other'"), "only sync"),
        (without(TEXT, r"contains 1\.54B", "contains 9.99B"), "--model"),
        (without(TEXT, "139.80", "79.10"), "--device, one of h100, a100"),
        (without(TEXT, "device memory", "memory"), "--device"),
    ],
)  # fmt: skip
def test_what_cannot_be_imported_is_one_line(tmp_path: Path, text: str, said: str) -> None:
    assert said in imported(text, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["run.log"]


def test_what_the_log_does_not_say_can_be_told(tmp_path: Path) -> None:
    text = without(without(TEXT, r"contains 1\.54B", "contains 9.99B"), "139.80", "79.10")
    options = ["--model", "Qwen2.5-1.5B", "--device", "h100"]
    assert "the actor's shape is that of the published" in imported(text, tmp_path, *options)
    assert "h100" in (tmp_path / "out" / "cluster.toml").read_text()


def test_a_step_that_is_cut_or_missing_is_left_out(tmp_path: Path) -> None:
    cut = TEXT.replace(STEPS[3] + "\n", "")[:-900]
    shown = imported(cut, tmp_path)
    assert "1 step is not whole, and left out" in shown
    timeline = Timeline.read(tmp_path / "out" / "timeline.json")
    assert timeline.steps == 5


def test_a_run_that_failed_later_is_said(tmp_path: Path) -> None:
    assert "ended with an error" in imported(TEXT + "RuntimeError: x\n", tmp_path)


def test_nothing_is_written_over(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    assert "is there already" in imported(TEXT, tmp_path)
    assert plan("import", "verl", LOG, "--out", LOG / "x").startswith("plan: ")
    assert "no such file" in plan("import", "verl", tmp_path / "no.log", "--out", tmp_path / "o")


def test_its_profile_is_for_its_model_alone(run: Path) -> None:
    said = plan("search", "--gpus", "8", "--profile", run / "profile.json", "--out", run / "b.json")
    assert "is for another model" in said


@pytest.mark.slow
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_damaged_logs_are_one_line(tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    """A log with lines left out, doubled or cut, or numbers changed, gives files that can be read,
    or one line and no files."""
    folder = tmp_path_factory.mktemp("fuzz")
    lines = TEXT.splitlines()
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(lines) - 1))
        change = data.draw(st.sampled_from(("drop", "double", "cut", "number", "bytes")))
        if change == "drop":
            lines[at : at + 1] = [] if len(lines) > 1 else [""]
        elif change == "double":
            lines.insert(at, lines[at])
        elif change == "cut":
            lines = lines[: at + 1]
            lines[at] = lines[at][: data.draw(st.integers(0, len(lines[at])))]
        elif change == "number":
            other = data.draw(
                st.sampled_from(["0", "-1", "1e400", "nan", "3.5", "None", "99999999"])
            )
            lines[at] = re.sub(
                r"(?<=[: ])\d+(?:\.\d+)?", other, lines[at], count=data.draw(st.integers(0, 2))
            )
        else:
            lines[at] += data.draw(st.text(max_size=5))
    with click.Context(main):
        said = imported("\n".join(lines), folder)
    if said.startswith("plan: "):
        assert [path.name for path in folder.iterdir()] == ["run.log"]
    else:
        load_plan(folder / "out" / "plan.json")
        load_workload(folder / "out" / "workload.toml")


# --- parts ---


@pytest.mark.parametrize("name", sorted(published()))
def test_published_shapes_have_the_parameters_of_their_model_cards(name: str) -> None:
    entry = published()[name]
    assert Shape(**entry["shape"]).parameters() == pytest.approx(entry["parameters"], rel=1e-3)
    counted = CountedModel(
        architecture=f"{entry['architecture']}ForCausalLM",
        billions=round(entry["parameters"] / 1e9, 2),
    )
    model, where = model_of("models/mine", [counted], None, "--model")
    assert where.startswith(f"{name},") and model.shape == Shape(**entry["shape"])


def test_a_directory_tells_its_shape(tmp_path: Path) -> None:
    config = {
        "model_type": "qwen2", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 128, "vocab_size": 100,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    model, _ = model_of(str(tmp_path), [], None, "--model")
    assert model.shape.hidden == 64 and model.path == tmp_path.resolve()
    with pytest.raises(UserError, match="no such directory"):
        model_of("x", [], "nowhere", "--model")


@pytest.mark.parametrize(
    "true",
    [
        Lognormal(mean=256, sigma=0.7, max=1024),
        Lognormal(mean=512, sigma=0.9, max=1024),
        Lognormal(mean=200, sigma=0.3, max=4096),
    ],
)
def test_lengths_are_fitted(true: Lognormal) -> None:
    drawn = [sample(true, 512, 0, step) for step in range(10)]
    found = fitted(
        SeenLengths(
            named="response_length",
            means=[lengths.mean() for lengths in drawn],
            least=[lengths.min() for lengths in drawn],
            most=[lengths.max() for lengths in drawn],
            cut=float(np.mean([(lengths == true.max).mean() for lengths in drawn])),
            limit=true.max,
            batch=512,
        )
    )
    again = [sample(found, 512, 1, step) for step in range(10)]
    assert np.mean(again) == pytest.approx(np.mean(drawn), rel=0.03)
    assert found.sigma == pytest.approx(true.sigma, rel=0.1)


def test_toml_is_read_as_it_was_written() -> None:
    import tomllib

    data = {"a": 'x"\n\x7f', "b c": [1, 2.5, True], "d": {"e": {"f": -1e-6}, "g": []}, "h": {}}
    text = toml_text({**data, "none": None, "i": [{"j": 1, "k": None}]}, ("said",))
    assert tomllib.loads(text) == {**data, "i": [{"j": 1}]}
    assert text.startswith("# said\n")


def of_grpo(text: str) -> str:
    """The log as one of GRPO on two nodes would be: groups of four, no critic, lengths that differ,
    engines of two GPUs, models sharded over four."""
    text = text.replace("'adv_estimator': 'gae'", "'adv_estimator': 'grpo'")
    text = re.sub(r"('rollout': \{.*?'n': )1,", r"\g<1>4,", text, count=1, flags=re.DOTALL)
    text = text.replace("'use_kl_in_reward': True", "'use_kl_in_reward': False")
    text = text.replace("'use_kl_loss': False", "'use_kl_loss': True")
    text = text.replace("'nnodes': 1}", "'nnodes': 2}").replace("'nnodes': 1,", "'nnodes': 2,")
    text = text.replace("'n_gpus_per_node': 1,", "'n_gpus_per_node': 8,")
    text = text.replace("'tensor_model_parallel_size': 1,", "'tensor_model_parallel_size': 2,")
    text = text.replace("'fsdp_size': -1", "'fsdp_size': 4")
    text = re.sub(r" - timing_s/(values|update_critic):[\d.e-]+", "", text)
    return re.sub(
        r"response_length/mean:512.0 - response_length/max:512.0 - response_length/min:512.0 - "
        r"response_length/clip_ratio:1.0",
        "response_length/mean:200.0 - response_length/max:512.0 - response_length/min:9.0 - "
        "response_length/clip_ratio:0.02",
        text,
    )


def test_a_run_of_grpo_on_several_nodes(tmp_path: Path) -> None:
    shown = imported(of_grpo(TEXT), tmp_path)
    found = load_plan(tmp_path / "out" / "plan.json")
    job = found.workload
    assert (job.batch, job.minibatch, job.group, job.critic) == (512, 128, 4, None)
    assert (job.algorithm.advantage, job.algorithm.kl_kind) == ("grpo", "k3")
    assert job.reference is not None  # of the KL in the loss
    assert [node.gpus for node in found.cluster.nodes] == [8, 8]
    assert (found.rollout.tensor_parallel, found.rollout.replicas) == (2, 8)
    actor = found.trainers["actor"]
    assert (actor.shard, actor.replicas) == (4, 4)
    drawn = [sample(job.response, 512, 0, step) for step in range(4)]
    assert np.mean(drawn) == pytest.approx(200, rel=0.05)
    profile = Profile.read(tmp_path / "out" / "profile.json")
    measured = float(re.search(r"Step: ([\d.]+) s", shown)[1])
    assert predict(found, (profile,)).step_seconds == pytest.approx(measured, rel=0.03)
    assert "update_critic" not in shown
