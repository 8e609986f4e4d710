"""The files that outlive a run: round trips, and one clear line for each thing that can be wrong
with them."""

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import make_workload, small_workload, split
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.predict.schedule import load_plan, tasks_of
from planner.predict.simulate import simulate
from planner.spec.cluster import Cluster, load_device, make_cluster
from planner.spec.errors import UserError
from planner.spec.files import MOST_BYTES, profiles_dir, read_data, write_atomic
from planner.spec.lengths import Empirical, Fixed, Lognormal, sample
from planner.spec.plan import Plan
from planner.spec.timeline import Timeline
from planner.spec.workload import Shape, Workload
from planner.spec.workload_file import load_workload


def plan_json(**changes):
    return {**json.loads(split(make_workload()).to_json()), **changes}


def assert_refused(tmp_path, data, text):
    path = tmp_path / "plan.json"
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    with pytest.raises(UserError) as error:
        load_plan(path)
    assert text in str(error.value)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_plan_round_trip(tmp_path):
    plan = split(make_workload())
    plan.write(tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json") == plan
    assert json.loads((tmp_path / "plan.json").read_text())["schema"] == "splitplan/plan/1"


def test_a_changed_copy_is_checked_as_a_file_is():
    plan = split(make_workload())
    other = plan.changed(name="other")
    assert other == plan.model_copy(update={"name": "other"})
    assert other.workload is plan.workload
    for values in ({"pools": {}}, {"staleness": -1}, {"stalenes": 1}):
        with pytest.raises(ValueError):
            plan.changed(**values)


def test_timeline_round_trip(tmp_path):
    spans = simulate(tasks_of(split(make_workload()), 3), lambda task: 0.1 * (1 + task.index))
    timeline = Timeline(source="simulated", plan="split", steps=3, warmup=1, spans=spans)
    timeline.write(tmp_path / "t.json")
    assert Timeline.read(tmp_path / "t.json") == timeline


def test_workload_and_cluster_round_trip(tmp_path):
    for value in (make_workload(), make_cluster(12)):
        value.write(tmp_path / "x.json")
        assert type(value).read(tmp_path / "x.json") == value


@pytest.mark.parametrize(
    "path", sorted((profiles_dir() / "workloads").glob("*.toml")), ids=lambda p: p.stem
)
def test_shipped_workloads_load(path):
    assert load_workload(path).name == path.stem


@pytest.mark.parametrize("cut", [1, 40, 400, 1500])
def test_truncated_plan(tmp_path, cut):
    assert_refused(tmp_path, split(make_workload()).to_json()[:cut], "not valid JSON")


def test_plan_of_another_kind_or_version(tmp_path):
    assert_refused(
        tmp_path,
        plan_json(schema="splitplan/plan/9"),
        "regenerate it, or use the splitplan version that wrote it",
    )
    assert_refused(
        tmp_path,
        plan_json(schema="splitplan/timeline/1"),
        "'splitplan/timeline/1', but 'splitplan/plan/1' is needed here; name a file",
    )
    data = plan_json()
    del data["schema"]
    assert_refused(tmp_path, data, 'no "schema" key')


def test_unknown_keys_are_named(tmp_path):
    assert_refused(tmp_path, plan_json(colour="red"), "colour: unknown key")
    data = plan_json()
    data["roles"]["actor"]["shards"] = 2
    assert_refused(tmp_path, data, "shards: unknown key")
    assert_refused(tmp_path, plan_json(**{"two\nlines": 1}), "'two\\nlines': unknown key")


def test_roles_and_pools_that_do_not_exist(tmp_path):
    data = plan_json()
    data["roles"]["actor"]["pools"] = ["nowhere"]
    assert_refused(tmp_path, data, "there is no pool 'nowhere'")
    data = plan_json()
    data["roles"]["judge"] = data["roles"]["critic"]
    assert_refused(tmp_path, data, "no role 'judge'")
    data = plan_json()
    del data["roles"]["critic"]
    assert_refused(tmp_path, data, "critic is missing")


def test_a_gpu_in_two_pools_or_outside_the_cluster(tmp_path):
    data = plan_json()
    data["pools"]["b"]["gpus"] = data["pools"]["a"]["gpus"]
    assert_refused(tmp_path, data, "GPU [0, 0] is in both 'a' and 'b'")
    data = plan_json()
    data["pools"]["b"]["gpus"] = [[0, 1], [0, 1]]
    assert_refused(tmp_path, data, "pools.b: GPU [0, 1] is listed twice")
    data["pools"]["b"]["gpus"] = [[3, 0]]
    assert_refused(tmp_path, data, "GPU [3, 0] is not in the cluster of 2 GPUs")


def test_programs_that_cannot_be(tmp_path):
    data = plan_json()
    data["program"] = data["program"][1:]
    assert_refused(tmp_path, data, "generate is issued 0 times")
    data = plan_json()
    data["program"].append({"wait": ["nothing"]})
    assert_refused(tmp_path, data, "there is no call 'nothing'")
    data = plan_json()
    data["program"].append({"call": "generate", "wait": ["generate"]})
    assert_refused(tmp_path, data, "program item 9")
    data = plan_json()
    data["program"].reverse()
    assert_refused(tmp_path, data, "deadlocks")


def test_layouts_that_do_not_fit_their_pool(tmp_path):
    data = plan_json()
    data["roles"]["actor"]["shard"] = 4
    assert_refused(tmp_path, data, "needs 4 GPUs; pool 'a' has 1")
    data = plan_json()
    data["roles"]["rollout"]["tensor_parallel"] = 2
    assert_refused(tmp_path, data, "1 engines of 2 GPUs do not fit")
    data = plan_json()
    data["roles"]["critic"]["tp"] = 2
    assert_refused(tmp_path, data, "tp = 2 is not supported yet")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"{\xff}", "is no text \\(byte 1 is no UTF-8\\)"),
        (b"[" * 100_000, "not valid JSON"),
        (b"9" * 5000, "not valid JSON"),
        (b"[1]", "holds a list, not a mapping"),
        (b"", "not valid JSON"),
    ],
)
def test_what_is_no_mapping_is_told_in_one_line(tmp_path, content, says):
    path = tmp_path / "plan.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"{path}: {says}"):
        read_data(path)


def test_what_is_no_file_of_a_size_to_read(tmp_path):
    with pytest.raises(UserError, match="cannot be read \\(Is a directory\\); check the path"):
        read_data(tmp_path)
    huge = tmp_path / "huge.json"
    with huge.open("wb") as file:
        file.truncate(MOST_BYTES + 1)  # takes no room
    with pytest.raises(UserError, match="larger than 512 MiB"):
        read_data(huge)


def test_a_mark_of_the_byte_order_is_no_content(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_data(path) == {"a": 1}


def test_a_key_that_is_there_twice(tmp_path):
    text = split(make_workload()).to_json()
    assert_refused(
        tmp_path,
        text.replace('"batch": 8', '"batch": 8, "batch": 16'),
        "key 'batch' appears twice",
    )


def test_numbers_that_are_none(tmp_path):
    text = split(make_workload()).to_json()
    assert_refused(tmp_path, text.replace('"batch": 8', '"batch": NaN'), "NaN is not a number")
    assert_refused(tmp_path, text.replace('"batch": 8', '"batch": -8'), "workload.batch")


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"batch": 10}, "batch = 10 is not a multiple of minibatch = 4"),
        ({"response": {"kind": "fixed", "tokens": -3}}, "greater than 0"),
        (
            {"response": {"kind": "empirical", "values": [9, 8], "max": 4}},
            "every value is above max = 4",
        ),
        (
            {"response": {"kind": "lognormal", "mean": 9, "sigma": 1, "max": 4}},
            "mean = 9 is above max = 4",
        ),
        ({"samples_per_prompt": 3}, "batch = 8 is not a multiple of samples_per_prompt = 3"),
        ({"samples_per_prompt": 8}, "minibatch = 4 is not a multiple of samples_per_prompt = 8"),
        ({"critic": None, "algorithm": {"advantage": "gae"}}, "'gae' needs a critic; add"),
        ({"algorithm": {"advantage": "grpo"}}, "'grpo' has no use for a critic; remove"),
        (
            {"critic": None, "algorithm": {"advantage": "rloo"}},
            "'rloo' compares the samples of a prompt; set samples_per_prompt to 2 or more",
        ),
        ({"algorithm": {"oversampling_factor": 2}}, "whose samples have the same score; set"),
        (
            {"samples_per_prompt": 2, "algorithm": {"oversampling_factor": 1.3}},
            "asks for 10.4 sequences, which are no whole number of groups of 2; with 1.25 there",
        ),
        ({"algorithm": {"kl_target": 6, "kl_kind": "k3"}}, "kl_kind = 'k3' is a loss; set"),
        ({"algorithm": {"kl_target": 6}, "reference": None}, "kl_target needs a reference"),
        ({"algorithm": {"ratio_mask_low": 2}}, "ratio_mask_low = 2 is not below"),
        (
            {"critic": None, "algorithm": {"advantage": "reinforce++", "critic_warmup": 3}},
            "critic_warmup is for a critic",
        ),
        (
            {"ppo": {"clip": 0.1}, "algorithm": {"clip": 0.3}},
            "ppo.clip stands under algorithm too; keep one of them",
        ),
        ({"sync": "in_flight", "max_staleness": 0}, "nothing is in flight when weights arrive"),
        ({"kv": "recompute"}, "kv = 'recompute' is about weights that arrive in flight"),
        ({"reward": {"function": "here"}}, "does not name a function"),
        ({"ppo": {"value_clip": 0}}, "greater than 0"),
    ],
)
def test_workloads_that_cannot_be(changes, text):
    with pytest.raises(ValueError, match=text):
        make_workload(**changes)


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("hidden", "'x'", "must be a valid integer, .*, not 'x'"),
        ("hidden", "1979-05-27", "must be a valid integer"),
        ("hidden", "nan", "must be a finite number"),
        ("hidden", "0x" + "f" * 5000, "not a number of thousands of digits"),
        ("heads", "0", "must be greater than 0, not 0"),
    ],
)
def test_a_size_that_cannot_be_is_one_line(key, value, says):
    path = profiles_dir() / "workloads" / "1.5b.toml"
    with pytest.raises(UserError, match=f"actor.shape.{key}: .*{says}"):
        load_workload(path, [f"actor.shape.{key}={value}"])


def test_heads_share_the_hidden_size_where_nothing_else_is_said():
    sizes = {"layers": 1, "heads": 4, "kv_heads": 2, "intermediate": 8, "vocab": 8}
    assert Shape(hidden=32.0, **sizes).head_dim == Shape(hidden=32, **sizes).head_dim == 8
    assert Shape(hidden=32, head_dim=16, **sizes).head_dim == 16


def test_value_clipping_can_be_turned_off():
    assert make_workload(ppo={"value_clip": "off"}).algorithm.value_clip == "off"


def test_a_missing_model_directory_is_named(tmp_path):
    workload = tmp_path / "w.toml"
    workload.write_text('schema = "splitplan/workload/1"\nname = "x"\n[actor]\npath = "nowhere"\n')
    with pytest.raises(UserError, match="no model directory at"):
        load_workload(workload)


def test_paths_start_at_the_workload_file(tmp_path):
    data = json.loads(make_workload().to_json())
    data["reward"] = {"function": "judge.py:score"}
    data["data"] = {"train": "t.jsonl", "evaluation": "e.jsonl", "evaluate_every": 5}
    (tmp_path / "w.json").write_text(json.dumps(data))
    workload = load_workload(tmp_path / "w.json")
    assert workload.data.train == tmp_path / "t.jsonl"
    assert workload.reward.function == f"{tmp_path / 'judge.py'}:score"


def test_no_cluster_without_gpus():
    with pytest.raises(UserError, match="0 GPUs"):
        make_cluster(0)
    with pytest.raises(UserError, match="no device 'b900'"):
        load_device("b900")


def test_a_smaller_last_node():
    cluster = make_cluster(12)
    assert [node.gpus for node in cluster.nodes] == [8, 4]
    assert cluster.gpus[-1] == (1, 3)
    assert isinstance(cluster, Cluster)


def test_parameters_of_a_known_model():
    """Qwen2.5-7B has 7.62 billion parameters (its model card), 6.53 without the embeddings."""
    shape = Shape(hidden=3584, layers=28, heads=28, kv_heads=4, intermediate=18944, vocab=152064)
    assert shape.parameters() / 1e9 == pytest.approx(7.62, abs=0.01)
    assert (shape.parameters() - 2 * shape.embedding_parameters) / 1e9 == pytest.approx(
        6.53, abs=0.01
    )


def test_a_write_that_fails_leaves_nothing(tmp_path):
    (tmp_path / "file").write_text("old")
    with pytest.raises(UserError, match="cannot be written"):
        write_atomic(tmp_path / "file" / "below", "new")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="cannot be written"):
        write_atomic(tmp_path / "folder", "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]
    assert (tmp_path / "file").read_text() == "old"


@settings(deadline=None)  # drawing may take long on a busy machine
@given(st.floats(5, 500), st.floats(0.1, 1.5), st.integers(500, 1000), st.integers(0, 2**31))
def test_lognormal_lengths_stay_in_range(mean, sigma, longest, seed):
    drawn = sample(Lognormal(mean=mean, sigma=sigma, max=longest), 50, seed, 1)
    assert drawn.min() >= 1 and drawn.max() <= longest
    assert (drawn == sample(Lognormal(mean=mean, sigma=sigma, max=longest), 50, seed, 1)).all()


def test_lengths_follow_their_distribution():
    assert sample(Lognormal(mean=200, sigma=0.6, max=10**6), 200_000, 3).mean() == pytest.approx(
        200, rel=0.01
    )
    assert set(sample(Empirical(values=(3, 5, 900), max=10), 500, 0)) == {3, 5, 10}
    assert np.all(sample(Fixed(tokens=7), 4, 0) == 7)


def test_responses_may_be_longer_than_the_observed_ones():
    observed = {"kind": "empirical", "values": [3, 5], "max": 40}
    workload = make_workload(response=observed)
    assert workload.response.longest == 40 and workload.longest == 45


def test_plan_schema_is_json():
    assert "program" in Plan.json_schema()["properties"]
    assert "batch" in Workload.json_schema()["properties"]
    assert isinstance(json.dumps(Timeline.json_schema()), str)
    assert Path(profiles_dir() / "devices.toml").is_file()


@pytest.mark.parametrize("name", sorted(read_data(profiles_dir() / "devices.toml")))
def test_every_shipped_device_is_whole_and_says_where_from(name: str):
    device = load_device(name)
    assert device.kind == "cuda" and device.source
    # A GPU's rates lie within the range of what is sold; a slip of a power of ten does not.
    assert 20e9 < device.memory_bytes < 300e9
    assert 1e14 < device.flops < 1e16
    assert 5e11 < device.memory_bandwidth < 1e13
    assert 1e10 < device.host_bandwidth <= 2e11
    assert device.host_bandwidth / 2 <= device.link_bandwidth < 1e12


def test_settings_of_earlier_files_are_read():
    """All stood under `ppo`, and beside it an advantage without a choice."""
    old = json.loads(small_workload().model_dump_json())
    del old["algorithm"], old["optimizer"]
    ppo = {"clip": 0.3, "actor_lr": 2e-6, "critic_lr": 3e-6, "weight_decay": 0.1, "grad_clip": 5.0}
    read = Workload.model_validate({**old, "ppo": ppo, "advantage": "gae"})
    assert read.algorithm.clip == 0.3 and read.algorithm.advantage == "gae"
    assert [read.optimizer.actor.lr, read.optimizer.critic.lr] == [2e-6, 3e-6]
    assert {role.weight_decay for role in (read.optimizer.actor, read.optimizer.critic)} == {0.1}
    assert read.optimizer.actor.grad_clip == 5.0
    without = Workload.model_validate({**old, "critic": None, "ppo": ppo, "advantage": "gae"})
    assert without.algorithm.advantage == "reinforce++"  # which is what was computed then


def test_a_mistake_in_settings_of_earlier_files_is_named_by_the_key_that_is_read(tmp_path):
    old = json.loads(small_workload().model_dump_json())
    del old["algorithm"], old["optimizer"]
    path = tmp_path / "w.json"
    path.write_text(json.dumps({"schema": Workload.SCHEMA, **old, "ppo": {"clip": -1}}))
    with pytest.raises(UserError, match=r"algorithm\.clip: must be greater than 0, not -1"):
        load_workload(path)


def test_settings_of_earlier_files_give_way_to_those_of_the_command_line(tmp_path):
    old = json.loads(small_workload().model_dump_json())
    del old["algorithm"], old["optimizer"]
    path = tmp_path / "w.json"
    ppo = {"clip": 0.3, "lam": 0.9, "actor_lr": 2e-6}
    path.write_text(json.dumps({"schema": Workload.SCHEMA, **old, "ppo": ppo}))
    read = load_workload(path, ("algorithm.clip=0.4", "optimizer.actor.lr=1e-4"))
    assert (read.algorithm.clip, read.algorithm.lam, read.optimizer.actor.lr) == (0.4, 0.9, 1e-4)


def test_a_step_without_a_critic_has_its_own_calls():
    flow = small_workload(critic=None, samples_per_prompt=4).dataflow
    assert [*flow.names] == (
        ["generate", "score", "old_logprobs", "advantages", "update_actor", "sync_weights"]
    )


def test_what_is_trained_on_is_selected_where_more_is_generated():
    algorithm = {"advantage": "grpo", "oversampling_factor": 1.5}
    workload = small_workload(critic=None, samples_per_prompt=4, algorithm=algorithm)
    assert (workload.batch, workload.generated) == (64, 96)
    flow = workload.dataflow
    assert flow.names[:4] == ("generate", "score", "select", "old_logprobs")
    readers = [call.name for call in flow.calls for read in call.reads if read.data == "selected"]
    assert readers == ["old_logprobs", "advantages", "update_actor"]


SET = {"name": "sums", "files": "e.jsonl"}


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"evaluation": [SET]}, "there are evaluations, but data.evaluate_every does not say when"),
        ({"data": {"evaluate_every": 2}}, "evaluate_every is set but there is no evaluation file"),
        (
            {"data": {"evaluate_every": 2}, "evaluation": [SET, SET]},
            "two evaluations are called 'sums'",
        ),
        (
            {"data": {"evaluate_every": 2}, "evaluation": [{**SET, "samples": 4}]},
            "samples = 4 at temperature 0 are equal ones",
        ),
        ({"sampling": {"temperature": 0.7}}, "sampling.temperature: write it as"),
        ({"sampling": {"top_p": 0.9}, "proximal": "rollout"}, 'set proximal = "recompute"'),
        (
            {"sampling": {"min_p": 0.1}, "algorithm": {"importance": "off"}},
            "min_p = 0.1 makes the engine's log-probs other ones",
        ),
        ({"sampling": {"min_tokens": 9}}, "min_tokens = 9 is above the longest response"),
        ({"sampling": {"top_p": 0}}, "sampling.top_p: must be greater than 0"),
        ({"data": {"template": "none", "system": "be brief"}}, 'need template = "chat"'),
        ({"data": {"train": {"path": "a", "hub": "b"}}}, "give either a path or the name"),
        ({"data": {"train": []}}, "data.train"),
    ],
)
def test_data_and_sampling_that_cannot_be_meant(changes, what):
    data = json.loads(make_workload().to_json())
    more = dict(changes)
    data["data"] = {"train": "t.jsonl", **more.pop("data", {})}
    with pytest.raises(UserError) as error:
        Workload.parse({**data, **more}, Path("w.toml"))
    assert what in str(error.value) and "\n" not in str(error.value)


def test_what_data_names_starts_at_the_workload_file(tmp_path):
    data = json.loads(make_workload().to_json())
    train = ["a.jsonl", {"path": "b", "split": "train", "weight": 2}, {"hub": "x/y"}]
    data["data"] = {"train": train, "evaluate_every": 5}
    data["evaluation"] = [{"name": "e", "files": {"path": "e.csv"}}]
    (tmp_path / "w.json").write_text(json.dumps(data))
    workload = load_workload(tmp_path / "w.json")
    assert [file.path for file in workload.data.files] == [
        tmp_path / "a.jsonl",
        tmp_path / "b",
        None,
    ]
    assert workload.evaluation[0].files.path == tmp_path / "e.csv"
    again = Workload.parse(json.loads(workload.to_json()), tmp_path / "w.json")
    assert again == workload


def test_a_workload_that_says_nothing_of_sampling_is_written_as_before():
    written = json.loads(make_workload().to_json())
    assert not {"sampling", "evaluation"} & written.keys()


def test_a_message_is_one_line_whatever_names_are_in_it() -> None:
    error = UserError("no column 'a,\nb\t\x1b[31m' in données.csv")
    assert str(error) == r"no column 'a, b\t\x1b[31m' in données.csv"
