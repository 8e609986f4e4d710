"""vLLM behind the seam of engines, with a build of it for CPUs (`make test-vllm`). It computes in
float32, so what it generates is what transformers would."""

import inspect
import logging
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from conftest import ROLES, colocated, make_workload
from numpy.typing import NDArray
from processes import PATIENCE
from recording import Recording
from test_rollout import PROMPTS, ended_at, requests, responses, words
from test_streaming import unfinished, whole
from transformers import PreTrainedModel

from executor.data.requests import Ints, Requests
from executor.fleet import pools
from executor.fleet.asking import Rank, ask
from executor.rollout.sampling import cut
from executor.rollout.streaming import Stretch, Unfinished
from executor.rollout.transformers_engine import TransformersEngine
from executor.rollout.tray import HandOver, Tray, taken
from executor.rollout.vllm.engine import VllmEngine, _told_what_fails
from executor.rollout.vllm.worker import VllmWorker, made_for
from executor.running import preflight
from executor.running.processes import fleet_for
from executor.training import models, weights
from executor.training.weights import Described
from planner.predict.memory import (
    engine_weight_bytes,
    kv_bytes_per_token,
    kv_cache_bytes,
    process_bytes,
)
from planner.spec.cluster import make_cluster
from planner.spec.data import Sampler
from planner.spec.errors import UserError
from planner.spec.plan import Plan
from planner.spec.workload import Model, Workload

pytestmark = pytest.mark.vllm
SHAPE = {
    "hidden": 128,
    "layers": 2,
    "heads": 4,
    "kv_heads": 2,
    "intermediate": 64,
    "vocab": 48,
}  # it wants large heads
EOS = 5
MANY = PROMPTS * 8


def random_model(seed: int) -> PreTrainedModel:
    return models.load("actor", Model(shape=SHAPE, random_weights=True), seed, torch.float32)


def workload(**changes: Any) -> Workload:
    model = {"shape": SHAPE, "random_weights": True}
    return make_workload(**{**{role: model for role in ROLES if role != "rollout"}, **changes})


def plan_of(workload: Workload, cores: int, **layout: Any) -> Plan:
    layouts = {"rollout": {"engine": "vllm", "memory_fraction": 0.1, **layout}}
    return colocated(workload, cores, layouts=layouts)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return random_model(3)


class Remote:
    """An engine in a process of its own, asked as the executor asks it."""

    def __init__(self, rank: Rank[VllmWorker]) -> None:
        self.rank, self.version = rank, 0

    def generate(self, asked: Requests, sampler: Sampler) -> tuple[Ints, Ints, NDArray[np.float32]]:
        (found,) = ask([self.rank.order(VllmWorker.generate, asked, sampler)]).results
        assert set(found.weights_versions.tolist()) == {self.version}
        return found.lengths, found.tokens, found.log_probs

    def install(self, model: PreTrainedModel) -> None:
        self.version += 1
        gathered = [ray.put(weights.gather(model, keep=True))]
        ask([self.rank.order(VllmWorker.install, gathered, self.version)])


@pytest.fixture(scope="module")
def started(
    ray_two: None, tmp_path_factory: pytest.TempPathFactory, model: PreTrainedModel
) -> Iterator[Remote]:
    """An engine for responses of up to 20 tokens, which the token EOS ends."""
    directory = tmp_path_factory.mktemp("actor")
    model.config.eos_token_id = model.generation_config.eos_token_id = EOS
    model.save_pretrained(directory)
    response = {"kind": "lognormal", "mean": 12, "sigma": 0.5, "max": 20}
    prompt = {"kind": "fixed", "tokens": 8}
    plan = plan_of(
        workload(actor={"shape": SHAPE, "path": directory}, prompt=prompt, response=response),
        cores=1,
    )
    fleet, ((pool, cores),) = fleet_for([plan]), plan.engine_gpus()
    (rank,) = pools.connect([fleet.process(VllmWorker, cores, made_for(plan))])
    assert ask([rank.order(VllmWorker.start, plan, pool, "store")]).results == [[EOS]]
    yield Remote(rank)
    fleet.close()


def test_vllm_has_the_private_names_that_are_used() -> None:
    """Also those of GPUs, which no other test here uses."""
    from vllm import LLM
    from vllm.distributed.device_communicators.pynccl import PyNcclCommunicator
    from vllm.distributed.parallel_state import GroupCoordinator
    from vllm.distributed.weight_transfer.nccl_common import stateless_init_process_group
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner
    from vllm.v1.worker.worker_base import WorkerBase

    from executor.rollout.vllm import private

    used = {
        LLM: ("collective_rpc", "sleep", "wake_up"),
        private.AsyncScheduler: ("schedule", "update_from_output", "reset_prefix_cache"),
        PyNcclCommunicator: ("broadcast", "destroy"),
        GPUModelRunner: ("get_model", "reload_weights"),
    }
    missing = [(o, name) for o, names in used.items() for name in names if not hasattr(o, name)]
    assert not missing
    asked = list(inspect.signature(stateless_init_process_group).parameters)
    assert asked == ["master_address", "master_port", "rank", "world_size", "device"]
    assert "self.request_block_hasher" in inspect.getsource(EngineCore)
    assert "self.mq_broadcaster" in inspect.getsource(GroupCoordinator)
    assert "self.rank" in inspect.getsource(WorkerBase)


def test_a_prompt_is_hashed_once_for_its_samples() -> None:
    from vllm import SamplingParams
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
    from vllm.v1.request import Request

    from executor.rollout.vllm.private import OncePerPrompt

    init_none_hash(sha256)
    hash_blocks, hashed = get_request_block_hasher(16, sha256), list[str]()

    def counted(request: Request) -> list[bytes]:
        hashed.append(request.request_id)
        hashes: list[bytes] = hash_blocks(request)
        return hashes

    def request(name: str, prompt: list[int], hasher: Any, salt: str | None = None) -> Request:
        return Request(name, prompt, SamplingParams(), None, cache_salt=salt, block_hasher=hasher)

    once = OncePerPrompt(counted)
    first, other = [*range(40)], [*range(1, 41)]
    first_hashes = request("alone", first, hash_blocks).block_hashes
    for name, prompt in (("a0", first), ("a1", [*first]), ("b0", other), ("a2", first)):
        found, alone = request(name, prompt, once), request(name, prompt, hash_blocks)
        found.append_output_token_ids([*range(10)])  # a third block is full
        alone.append_output_token_ids([*range(10)])
        assert found.block_hashes == alone.block_hashes
        assert len(found.block_hashes) == 3
    assert hashed == ["a0", "a0", "a1", "b0", "b0", "a2", "a2"]  # and once each for the third
    salted = request("a3", first, once, "weights 1").block_hashes
    assert salted != first_hashes
    assert request("a4", first, once, "weights 1").block_hashes == salted
    assert hashed[7:] == ["a3"]


def test_weights_are_found_in_a_window() -> None:
    from executor.rollout.vllm.extension import _in_window  # which needs vLLM

    weights = [Described(name="a", shape=(2, 3)), Described(name="b", shape=(4,))]
    tensors = [torch.randn(weight.shape).bfloat16() for weight in weights]
    window = torch.cat([tensor.view(torch.uint8).flatten() for tensor in tensors])
    (first, a), (second, b) = _in_window(torch.cat([window, window]), weights)
    assert (first, second) == ("a", "b")
    assert torch.equal(a, tensors[0]) and torch.equal(b, tensors[1])


@pytest.fixture
def engine(started: Remote, model: PreTrainedModel) -> Remote:
    """The same one, with the model's weights."""
    started.install(model)
    return started


def test_the_same_keys_draw_the_same_tokens_in_any_batch(engine: Remote) -> None:
    together = responses(engine, requests(MANY), 1.0)
    assert together == responses(engine, requests(MANY), 1.0)
    reverse = np.arange(len(MANY))[::-1].copy()
    assert together[::-1] == responses(engine, requests(MANY).take(reverse), 1.0)
    assert together != responses(engine, requests(MANY, seed=1), 1.0)


def test_samples_share_the_prefill_of_their_prompt_at_equal_output(
    ray_two: None, model: PreTrainedModel
) -> None:
    """With new weights nothing of the old ones' is used."""
    prompts = [[*range(1, 40)], [*range(40, 0, -1)]]  # longer than a block of the cache
    asked = requests([prompt for prompt in prompts for _ in range(4)])
    lengths = {
        "prompt": {"kind": "fixed", "tokens": 40},
        "response": {"kind": "fixed", "tokens": 20},
    }
    grouped = workload(**lengths, critic=None, samples_per_prompt=4)
    plan = plan_of(grouped, cores=1)
    fleet, ((pool, cores),) = fleet_for([plan]), plan.engine_gpus()
    (rank,) = pools.connect([fleet.process(VllmWorker, cores, made_for(plan))])
    ask([rank.order(VllmWorker.start, plan, pool, "store")])
    engine = Remote(rank)
    for each in (random_model(4), model):
        engine.install(each)
        reference = TransformersEngine(each, [], 64)
        found = engine.generate(asked, Sampler(temperature=0.0))
        expected = reference.generate(asked, Sampler(temperature=0.0))
        assert found[1].tolist() == expected[1].tolist()
        assert np.allclose(found[2], expected[2], atol=1e-4)
    fleet.close()


def test_responses_end_at_end_of_sequence_or_at_their_own_limit(engine: Remote) -> None:
    limits = np.arange(len(MANY)) % 20 + 1
    found = responses(engine, replace(requests(MANY), max_tokens=limits), 2.0)
    ended = [response[-1] == EOS for response in found]
    assert any(ended) and not all(ended)
    assert all(EOS not in response[:-1] for response in found)
    assert all(
        end or len(response) == limit
        for end, response, limit in zip(ended, found, limits, strict=True)
    )


def test_exact_requests_ignore_end_of_sequence(engine: Remote) -> None:
    found = responses(engine, requests(MANY, max_tokens=20, exact=True), 2.0)
    assert {len(response) for response in found} == {20}
    assert any(EOS in response[:-1] for response in found)


def test_responses_lie_on_the_tray_when_they_have_finished(engine: Remote) -> None:
    tray, asked = pools.start(Tray), requests(MANY, max_tokens=20)
    rows = np.arange(len(MANY))[::-1].copy()
    hand_over = HandOver(tray=tray.handle, key="step", rows=rows)
    order = engine.rank.order(VllmWorker.generate, asked, Sampler(temperature=2.0), hand_over)
    (found,) = ask([order]).results
    ends = np.cumsum(found.lengths)
    whole = [
        found.tokens[end - n : end].tolist() for end, n in zip(ends, found.lengths, strict=True)
    ]
    handed, deadline = dict[int, list[int]](), time.monotonic() + PATIENCE
    while len(handed) < len(MANY) and time.monotonic() < deadline:  # nobody waits for what is put
        handed |= {row: tokens.tolist() for row, tokens in taken(tray.handle, "step")}
    assert handed == dict(zip(rows.tolist(), whole, strict=True))
    assert taken(tray.handle, "step") == []
    pools.stop([tray])


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_log_probs_are_those_of_the_model(
    engine: Remote, model: PreTrainedModel, temperature: float
) -> None:
    lengths, tokens, log_probs = engine.generate(
        requests(MANY, max_tokens=20), Sampler(temperature=temperature)
    )
    ends = np.cumsum(lengths)
    for prompt, end, length in zip(MANY, ends, lengths, strict=True):
        response = tokens[end - length : end].tolist()
        with torch.no_grad():
            logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        expected = (
            (logits / temperature).log_softmax(-1).gather(-1, torch.tensor(response)[:, None])[:, 0]
        )
        assert np.allclose(log_probs[end - length : end], expected, atol=1e-5)


@pytest.mark.parametrize(
    "cuts",
    [{"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.3}, {"top_k": 10, "top_p": 0.6, "min_p": 0.1}],
)
def test_the_log_probs_are_of_what_a_sampler_leaves(
    engine: Remote, model: PreTrainedModel, cuts: dict[str, float]
) -> None:
    sampler = Sampler(temperature=0.7, **cuts)
    lengths, tokens, log_probs = engine.generate(requests(MANY, max_tokens=20), sampler)
    ends = np.cumsum(lengths)
    for prompt, end, length in zip(MANY, ends, lengths, strict=True):
        response = tokens[end - length : end].tolist()
        with torch.no_grad():
            logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        left = cut((logits / 0.7).log_softmax(-1), sampler)
        expected = left.gather(-1, torch.tensor(response)[:, None])[:, 0]
        assert np.allclose(log_probs[end - length : end], expected, atol=1e-4)


def test_no_response_of_vllm_ends_before_its_minimum(engine: Remote) -> None:
    sampler = Sampler(temperature=2.0, min_tokens=3)
    lengths, _, _ = engine.generate(requests(MANY * 8, max_tokens=20), sampler)
    assert lengths.min() == 4


def test_tokens_are_drawn_as_often_as_the_model_says(
    engine: Remote, model: PreTrainedModel
) -> None:
    _, tokens, _ = engine.generate(
        requests([[1, 2, 3]] * 2000, max_tokens=1), Sampler(temperature=0.1)
    )
    with torch.no_grad():
        expected = (model(torch.tensor([[1, 2, 3]])).logits[0, -1] / 0.1).softmax(-1)
    assert (
        np.abs(np.bincount(tokens, minlength=SHAPE["vocab"]) / 2000 - expected.numpy()).max() < 0.03
    )


def test_new_weights_are_used_and_then_the_old_ones_again(
    engine: Remote, model: PreTrainedModel
) -> None:
    """Greedily, so that what comes is what transformers gives."""
    other = random_model(4)
    of_model, of_other = (
        responses(TransformersEngine(m, [EOS], 64), requests(MANY), 0.0) for m in (model, other)
    )
    assert of_model != of_other
    assert responses(engine, requests(MANY), 0.0) == of_model
    engine.install(other)
    assert responses(engine, requests(MANY), 0.0) == of_other
    engine.install(model)
    assert responses(engine, requests(MANY), 0.0) == of_model


def test_what_ends_a_process_of_an_engine_that_starts_is_told() -> None:
    from executor.rollout.vllm.extension import _Failures  # which needs vLLM

    logger = logging.getLogger("vllm")
    with pytest.raises(RuntimeError, match="ValueError: too many heads"), _told_what_fails():
        handler = _Failures(Path(os.environ["SPLITPLAN_ENGINE_FAILURE"]))
        logger.addHandler(handler)
        try:
            raise ValueError("too many heads")
        except ValueError:
            logger.exception("WorkerProc failed to start.")
        raise RuntimeError("an exception in a background process")
    logger.exception("nobody asks any more")
    logger.removeHandler(handler)


def test_what_a_build_for_cpus_cannot_run_is_refused() -> None:
    with pytest.raises(
        UserError, match="engine vllm runs on 1 core, not 2; set tensor_parallel to 1"
    ):
        preflight.check_engine(plan_of(workload(), 2, tensor_parallel=2, replicas=1))
    layouts = {"rollout": {"engine": "vllm"}}
    on_gpus = colocated(workload(), 1, layouts=layouts, cluster=make_cluster(1, "h200", 1))
    with pytest.raises(UserError, match="installed is built for cpu; install one built for cuda"):
        VllmEngine(on_gpus)


class Mortal(Recording):
    """After the first step an engine dies, after the second what computes for the other one."""

    def end_step(self, number: int) -> dict[str, Any]:
        engine = self.processes.engines[number % 2].handle
        if number == 1:
            ray.get(
                engine.__ray_call__.remote(
                    lambda worker: worker.engine.internals.executor.workers[0].proc.kill()
                )
            )
        else:
            ray.kill(engine)
        return super().end_step(number)


def queues() -> set[Path]:
    """The files of any processes' queues: shared memory, and sockets."""
    sockets = {path for path in Path(tempfile.gettempdir()).iterdir() if path.is_socket()}
    return {*Path("/dev/shm").glob("psm_*"), *sockets}


def test_steps_with_an_engine_that_dies_sample_from_what_the_trainers_see(ray_two: None) -> None:
    """Two engines, whose weights come through the object store; the one that is started anew gets
    those it had."""
    plan = plan_of(workload(), cores=2, offload=True)
    backend, before = Mortal(plan), queues()
    backend.take(3)
    assert queues() <= before
    for number, metrics in enumerate(backend.metrics):
        assert metrics["weights_version"] == number
        assert metrics["actor/grad_norm"] > 0
        assert backend.differences[number].size and backend.differences[number].max() < 1e-5


def test_an_engine_whose_memory_is_full_sets_sequences_aside(ray_two: None) -> None:
    """Room for three of eight sequences: still every response is whole, with the log-probs of its
    tokens."""
    response = {"kind": "lognormal", "mean": 20, "sigma": 1.0, "max": 400}
    given = workload(prompt={"kind": "fixed", "tokens": 8}, response=response)
    plan, shape = plan_of(given, cores=1, concurrency=8, memory_fraction=1.0), given.actor.shape
    ((name, device),) = plan.cluster.devices.items()
    room = 3 * 416 * kv_bytes_per_token(shape, 1, device)
    others = process_bytes(device) + engine_weight_bytes(shape, 1, device)
    small = {name: device.changed(memory_bytes=others + room)}
    plan = plan.changed(cluster=plan.cluster.changed(devices=small))
    assert kv_cache_bytes(plan) == room
    fleet, ((pool, cores),) = fleet_for([plan]), plan.engine_gpus()
    try:
        (rank,) = pools.connect([fleet.process(VllmWorker, cores, made_for(plan))])
        ask([rank.order(VllmWorker.start, plan, pool, "store")])
        engine = Remote(rank)
        engine.install(random_model(3))
        asked = requests(PROMPTS * 3, max_tokens=400, exact=True)
        lengths, tokens, log_probs = engine.generate(asked, Sampler(temperature=1.0))
    finally:
        fleet.close()
    assert (lengths == 400).all() and len(tokens) == len(log_probs) == 400 * len(lengths)
    assert np.isfinite(log_probs).all() and (log_probs < 0).all()


def test_an_engine_ends_responses_at_stop_strings(
    ray_two: None, tmp_path: Path, engine: Remote, model: PreTrainedModel
) -> None:
    """As the other engine's, cut there; and it is empty then: another batch is as whole."""
    stops, asked = ["w7", "w3 w1"], requests(MANY, max_tokens=20)
    model.save_pretrained(tmp_path)
    words(SHAPE["vocab"]).save_pretrained(tmp_path)
    data = {"train": tmp_path / "t.jsonl", "stop": stops}
    response = {"kind": "lognormal", "mean": 12, "sigma": 0.5, "max": 20}
    actor, prompt = {"shape": SHAPE, "path": tmp_path}, {"kind": "fixed", "tokens": 8}
    plan = plan_of(workload(actor=actor, prompt=prompt, response=response, data=data), cores=1)
    fleet, ((pool, cores),) = fleet_for([plan]), plan.engine_gpus()
    try:
        (rank,) = pools.connect([fleet.process(VllmWorker, cores, made_for(plan))])
        ask([rank.order(VllmWorker.start, plan, pool, "store")])
        stopping = Remote(rank)
        stopping.install(model)
        expected = ended_at(responses(engine, asked, 2.0), stops)
        assert responses(stopping, asked, 2.0) == expected
        assert responses(stopping, asked, 2.0) == expected
    finally:
        fleet.close()


class Streaming(Remote):
    """The same engine, for what streams."""

    def go_on(self, sequences: list[Unfinished], seconds: float = 60.0) -> list[Stretch]:
        (found,) = ask([self.rank.order(VllmWorker.go_on, sequences, seconds)]).results
        return list(found)

    def recompute(self) -> None:
        ask([self.rank.order(VllmWorker.recompute)])


@pytest.fixture
def streaming(engine: Remote) -> Iterator[Streaming]:
    """Another view of it."""
    found = Streaming(engine.rank)
    found.version = engine.version
    yield found
    engine.version = found.version


def in_stretches(streaming: Streaming, sequences: list[Unfinished]) -> list[Stretch]:
    """A call for each decoding step, or few."""
    stretches = streaming.go_on(sequences, 0.0)
    while not {stretch.number for stretch in stretches if stretch.ended} >= {
        s.number for s in sequences
    }:
        stretches += streaming.go_on([], 0.001)
    return stretches


def test_what_streams_through_vllm_is_what_a_batch_gives(streaming: Streaming) -> None:
    asked = requests(MANY, max_tokens=20)
    expected = responses(streaming, asked, 1.0)
    assert whole(streaming.go_on(unfinished(asked))) == dict(enumerate(expected))
    assert whole(in_stretches(streaming, unfinished(asked))) == dict(enumerate(expected))


@pytest.mark.parametrize("recompute", [False, True])
def test_weights_come_between_two_steps_of_vllm(
    streaming: Streaming, model: PreTrainedModel, recompute: bool
) -> None:
    """The tokens before are those of the old weights, and are marked so, also of a step that was
    queued; what comes then has the log-probs of the new ones if caches are recomputed."""
    asked = requests(MANY, max_tokens=20, exact=True)
    sequences = unfinished(asked, Sampler())
    expected = dict(enumerate(responses(streaming, asked, 0.0)))
    old, stretches = streaming.version, streaming.go_on(sequences, 0.0)
    while max(map(len, whole(stretches).values()), default=0) < 6:
        stretches += streaming.go_on([], 0.0)
    other = random_model(4)
    streaming.install(other)
    if recompute:
        streaming.recompute()
    stretches += streaming.go_on([])
    assert {stretch.version for stretch in stretches} == {old, old + 1}
    before = whole([stretch for stretch in stretches if stretch.version == old])
    after = {stretch.number: stretch for stretch in stretches if stretch.version == old + 1}
    assert all(
        tokens == expected[number][: len(tokens)] and 0 < len(tokens) < 20
        for number, tokens in before.items()
    )
    left = [each.with_more(before.get(each.number, [])) for each in sequences]
    fresh = whole(streaming.go_on(left))
    found = whole(list(after.values()))
    assert {number: len(tokens) for number, tokens in found.items()} == {
        number: len(tokens) for number, tokens in fresh.items()
    }
    assert (found == fresh) == recompute


def test_a_sequence_goes_on_in_vllm_with_the_tokens_that_it_has(streaming: Streaming) -> None:
    asked = requests(MANY, max_tokens=20)
    expected = responses(streaming, asked, 0.0)
    left = [
        each.with_more(expected[each.number][:5])
        for each in unfinished(asked, Sampler())
        if len(expected[each.number]) > 5
    ]
    assert left
    found = whole(streaming.go_on(left))
    assert found == {each.number: expected[each.number][5:] for each in left}
