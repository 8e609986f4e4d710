"""What several test modules share: small plans written by hand, one Ray session, and processes in
it."""

import contextlib
import copy
import functools
import importlib.util
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from processes import abandoned, descendants, still_there

from planner.spec.cluster import Cluster, Device, Node
from planner.spec.plan import Plan
from planner.spec.workload import Workload

# The peers are installed apart (make test-peers).
collect_ignore = [] if importlib.util.find_spec("verl") else ["peers"]

# A shell that starts the tests in the background has them ignore Ctrl-C, and so would their runs.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Models of tests are tiny. Threads would wait for each other, and take a core while they do.
os.environ.setdefault("OMP_NUM_THREADS", "1")
if TYPE_CHECKING:
    from executor.data.reward_forms import Samples

with contextlib.suppress(ImportError):  # environments for engines do without
    from hypothesis import settings

    settings.register_profile("patient", deadline=None)  # how long an example takes says nothing
    settings.load_profile("patient")

STARTS_RAY = {"ray_two", "two_cores", "on_two_cores", "lent_cores", "nodes"}  # fixtures
# Two groups that take about as long, each in a process with a Ray of its own: these modules, and
# all others.
SECOND_GROUP = {
    "test_cluster",
    "test_faults",
    "test_learning",
    "test_measure",
    "test_network",
    "test_soak",
    "test_study",
    "test_supervise",
}


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that start Ray run one after the other in the process of their group, and share its
    fleet. They wait for processes half of the time, so both groups fit on two cores."""
    for item in items:
        if STARTS_RAY & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.ray)
        if item.get_closest_marker("ray"):
            group = "second" if item.path.stem in SECOND_GROUP else "first"
            item.add_marker(pytest.mark.xdist_group(f"ray-{group}"))


SHAPE = {"hidden": 32, "layers": 2, "heads": 4, "kv_heads": 2, "intermediate": 64, "vocab": 48}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--renew-golden",
        action="store_true",
        help="write the files under tests/golden anew instead of comparing with them",
    )


@pytest.fixture
def renew_golden(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--renew-golden"))


def make_workload(**changes: Any) -> Workload:
    """A tiny PPO job with all four models, random weights and no data."""
    model = {"shape": SHAPE, "random_weights": True}
    base = {
        "name": "tiny",
        "batch": 8,
        "minibatch": 4,
        "prompt": {"kind": "fixed", "tokens": 5},
        "response": {"kind": "lognormal", "mean": 5, "sigma": 0.5, "max": 8},
        "actor": model,
        "critic": model,
        "reference": model,
        "reward": model,
        "algorithm": {"temperature": 0.8},
        "optimizer": {"actor": {"lr": 1e-3}, "critic": {"lr": 1e-3}},
        "steps": 3,
        "seed": 7,
    }
    return Workload.model_validate({**base, **changes})


def samples_of(prompts: str, responses: str, answers: Sequence[Any] | None = None) -> "Samples":
    """Samples of prompts and responses that are words."""
    from executor.data.reward_forms import Samples

    texts, given = prompts.split(), responses.split()
    return Samples(
        prompts=texts,
        asked=list(texts),
        responses=given,
        answers=list(answers or [None] * len(texts)),
        columns=[{} for _ in texts],
    )


def small_workload(**changes: Any) -> Workload:
    """A 1B actor and critic, no reference, a rule as reward: few enough calls for brute force."""
    shape = {
        "hidden": 2048,
        "layers": 16,
        "heads": 32,
        "kv_heads": 8,
        "intermediate": 8192,
        "vocab": 128256,
    }
    model = {"shape": shape, "random_weights": True}
    base = {
        "name": "small",
        "batch": 64,
        "minibatch": 16,
        "prompt": {"kind": "fixed", "tokens": 256},
        "response": {"kind": "fixed", "tokens": 512},
        "actor": model,
        "critic": model,
        "reference": None,
        "reward": {"function": "r.py:f"},
        "algorithm": {},
        "optimizer": {},
    }
    return make_workload(**{**base, **changes})


def tiny_cluster(gpus: int, memory: float = 80e9, flops: float = 300e12) -> Cluster:
    device = Device(
        memory_bytes=int(memory),
        flops=flops,
        memory_bandwidth=2e12,
        link_bandwidth=100e9,
        host_bandwidth=20e9,
        overhead_seconds=0.02,
        context_bytes=10**9,
    )
    return Cluster(
        name="tiny",
        nodes=(Node(gpus=gpus, device="g", host_memory_bytes=10**12),),
        devices={"g": device},
    )


def cpu_cluster(cores: int) -> Cluster:
    device = Device(
        kind="cpu",
        memory_bytes=2 * 10**9,
        flops=1e10,
        memory_bandwidth=1e10,
        link_bandwidth=1e9,
        host_bandwidth=1e10,
    )
    return Cluster(
        name="local",
        nodes=(Node(gpus=cores, device="core", host_memory_bytes=4 * 10**9),),
        devices={"core": device},
    )


SERIAL = [
    "generate",
    "score",
    "select",
    "ref_logprobs",
    "old_logprobs",
    "values",
    "advantages",
    "update_critic",
    "update_actor",
    "sync_weights",
    "evaluate",
]
CALLS = [call for call in SERIAL if call not in ("select", "evaluate")]  # of PPO as it is usual


def program_of(
    workload: Workload,
    order: Sequence[str | tuple[str, ...]] = SERIAL,
    offsets: dict[str, int] | None = None,
    blocking: bool = False,
) -> list[dict[str, Any]]:
    """Issue the calls in this order, a tuple being a wait; calls that the workload lacks are left
    out."""
    names = workload.dataflow.names
    items: list[dict[str, Any]] = []
    for item in order:
        if isinstance(item, tuple):
            items.append({"wait": list(item)})
        elif item in names:
            items.append(
                {"call": item, "offset": (offsets or {}).get(item, 0), "blocking": blocking}
            )
    return items


def make_plan(
    workload: Workload,
    pools: dict[str, int],
    roles: dict[str, str | Sequence[str]],
    *,
    order: Sequence[str | tuple[str, ...]] = SERIAL,
    offsets: dict[str, int] | None = None,
    blocking: bool = False,
    staleness: int = 0,
    sync: str = "boundary",
    layouts: dict[str, dict[str, Any]] | None = None,
    cluster: Cluster | None = None,
    name: str = "test",
) -> Plan:
    """A plan with `pools` {name: cores} on one node and `roles` {role: pool or pools}; each role
    uses its whole pool unless `layouts` says otherwise."""
    found: dict[str, Any] = {}
    taken = 0
    for pool, size in pools.items():
        found[pool] = {"gpus": [(0, taken + i) for i in range(size)]}
        taken += size
    written: dict[str, Any] = {}
    for role, where in roles.items():
        homes = [where] if isinstance(where, str) else list(where)
        size = sum(pools[home] for home in homes)
        if role == "rollout":
            layout = {
                "engine": "transformers",
                "tensor_parallel": 1,
                "replicas": size,
                "memory_fraction": 0.4,
                "concurrency": 16,
            }
        else:
            layout = {"engine": "fsdp", "shard": size, "micro_batch_tokens": 64, "recompute": False}
        written[role] = {**layout, "pools": homes, **(layouts or {}).get(role, {})}
    return Plan.model_validate(
        {
            "name": name,
            "workload": workload,
            "cluster": cluster or cpu_cluster(taken),
            "pools": found,
            "roles": written,
            "program": program_of(workload, order, offsets, blocking),
            "staleness": staleness,
            "sync": sync,
        }
    )


def nearly(metric: Any, **tolerance: float) -> Any:
    """Of a line of metrics, for comparisons: a number but for rounding; what counts sequences as it
    is."""
    return pytest.approx(metric, **tolerance) if isinstance(metric, float) else metric


ROLES = ("actor", "rollout", "critic", "reference", "reward")


def colocated(workload: Workload, cores: int = 2, **more: Any) -> Plan:
    """All roles on all cores, one call at a time."""
    roles = {role: "all" for role in ROLES if role in workload.roles}
    return make_plan(workload, {"all": cores}, roles, blocking=True, name="colocated", **more)


def split(workload: Workload, **more: Any) -> Plan:
    """Actor, rollout and reference on one core, critic and reward on the other; the two updates
    side by side."""
    home = {"actor": "a", "rollout": "a", "reference": "a", "critic": "b", "reward": "b"}
    return make_plan(
        workload,
        {"a": 1, "b": 1},
        {r: home[r] for r in ROLES if r in workload.roles},
        name="split",
        **more,
    )


WORDS = ["<pad>", "<eos>", *(str(number) for number in range(SHAPE["vocab"] - 2))]


@pytest.fixture(scope="session")
def model_directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Hugging Face directories of a tiny actor (with a tokenizer of numbers) and a tiny reward
    model."""
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    from executor.training import models
    from planner.spec.workload import Model

    found = {}
    for role in ("actor", "reward"):
        model = models.load(role, Model(shape=SHAPE, random_weights=True), 1, torch.float32)
        model.config.eos_token_id = 1
        if role == "actor":
            model.generation_config.eos_token_id = 1
        found[role] = tmp_path_factory.mktemp(role)
        model.save_pretrained(found[role])
    words = Tokenizer(
        WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<pad>")
    )
    words.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>"
    )
    tokenizer.save_pretrained(found["actor"])
    return found


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """The directory of a run with two small checkpoints."""
    from interrupted import write_run

    write_run(tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture(scope="session", autouse=True)
def temporary_files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Each process that tests has a directory for temporary files of its own: what another one
    leaves is not looked for by this one. The path is short, for Ray makes sockets there."""
    tmp_path_factory.getbasetemp()  # pytest's own stay where they are, to be looked at
    worker = os.environ.get("PYTEST_XDIST_WORKER", "one")
    directory = Path(tempfile.mkdtemp(prefix=f"{worker}-"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(directory))
        patch.setattr(tempfile, "tempdir", None)
        yield
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(scope="session", autouse=True)
def nothing_left(temporary_files: None) -> Iterator[None]:
    """No test leaves a process, and with it a port, nor the directory of a private Ray that has
    ended."""
    before = abandoned()
    yield
    if inductor := sys.modules.get("torch._inductor.async_compile"):
        # Which wait for more to compile until their process ends.
        inductor.shutdown_compile_workers()
    assert not still_there(descendants(os.getpid()))
    assert abandoned() <= before


@pytest.fixture(scope="session")
def ray_two() -> Iterator[None]:
    """One private Ray for the tests that start processes."""
    from executor.fleet.session import ray_session

    with ray_session(cpus=4, address=None):  # it starts as many processes at once, wanted or not
        yield


@pytest.fixture(scope="session")
def two_cores(ray_two: None) -> Iterator[Any]:
    """A fleet whose processes many tests use one after the other: each takes seconds to load its
    libraries."""
    from executor.running.processes import fleet_for

    fleet = fleet_for([colocated(make_workload(), cores=2)])
    yield fleet
    fleet.close()


@pytest.fixture
def lent_cores(two_cores: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let profiles and studies use these processes, and leave them running, where they would start
    a fleet of their own."""
    from executor.measuring import profile, study

    lent = copy.copy(two_cores)
    lent.close = lambda: None
    for module in (profile, study):
        monkeypatch.setattr(module, "fleet_for", lambda plans: lent)


@contextlib.contextmanager
def runs_on(fleet: Any) -> Iterator[None]:
    """Let `execute` and `resume` use a fleet instead of processes of their own."""
    from executor.running import step

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, "Training", functools.partial(step.Training, fleet=fleet))
        yield


@pytest.fixture
def on_two_cores(two_cores: Any) -> Iterator[None]:
    with runs_on(two_cores):
        yield
