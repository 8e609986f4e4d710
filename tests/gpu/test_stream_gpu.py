"""An engine that is always full against one that is given batch by batch: tokens per second of the
1.5B model with random weights, responses lognormal with a mean of 1,024 tokens (sigma 1, at most
8,192). 128 sequences at a time, and as many as its memory holds, while weights arrive three times
by CUDA IPC. On a host with a GPU, in about three minutes:
`python -m pytest -m gpu -s tests/gpu/test_stream_gpu.py`."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count, islice

import numpy as np
import pytest
import torch
from torch import Tensor

from executor.data.prompts import Synthetic
from executor.data.requests import Requests
from executor.rollout.streaming import Unfinished
from executor.rollout.vllm.engine import VllmEngine
from executor.training import models
from executor.training.weights import Described, Window, in_chunks
from planner.search import baseline
from planner.spec.cluster import make_cluster
from planner.spec.data import Sampler
from planner.spec.files import profiles_dir
from planner.spec.plan import Plan
from planner.spec.workload import Workload
from planner.spec.workload_file import load_workload

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(900),
    pytest.mark.skipif(torch.cuda.device_count() < 1, reason="needs a GPU"),
]
BATCH, MOST = 128, 1024  # sequences at a time
SECONDS, SETTLING_SECONDS = 20.0, 3.0  # for which each stream is measured, and before
FULL_STEPS = 5  # with tokens of (nearly) all, after which all have their caches
INSTALLS = 3
SAMPLER = Sampler(temperature=1.0)


def job() -> Workload:
    settings = [f"batch={BATCH}", f"minibatch={BATCH}", "critic=", "algorithm.advantage=grpo"]
    settings += ["samples_per_prompt=4", "prompt={kind='fixed',tokens=256}"]
    settings += ["response={kind='lognormal',mean=1024,sigma=1.0,max=8192}"]
    return load_workload(profiles_dir() / "workloads" / "h200-1.5b.toml", settings)


def plan_of(workload: Workload) -> Plan:
    plan = baseline("one-step-off", workload, make_cluster(2, "h200", 2))
    rollout = plan.rollout.changed(concurrency=MOST, memory_fraction=0.8, offload=False)
    return plan.changed(roles={**plan.roles, "rollout": rollout}, predicted=None)


class Sender:
    """Random weights in a process of their own, as a trainer on the same GPU has them."""

    def __init__(self, workload: Workload) -> None:
        shapes = dict(models.empty("actor", workload.actor, torch.bfloat16).named_parameters())
        described = [Described(name=n, shape=tuple(p.shape)) for n, p in shapes.items()]
        self.chunks = in_chunks(described)
        self.window = Window(self.chunks)
        self.weights: dict[str, Tensor] = {
            weight.name: torch.randn(weight.shape, device="cuda").mul_(0.02).bfloat16()
            for weight in described
        }

    def send(self, engine: VllmEngine) -> None:
        for chunk in self.chunks:
            begin = 0
            for weight in chunk:
                end = begin + weight.bytes
                source = self.weights[weight.name].view(torch.uint8).view(-1)
                self.window.buffer[begin:end].copy_(source)
                begin = end
            torch.cuda.synchronize()
            engine.read(chunk, self.window.handles)


def sequences(requests: Requests, first: int = 0) -> list[Unfinished]:
    return [
        Unfinished(
            number=first + row,
            prompt=prompt,
            response=np.zeros(0, dtype=np.int32),
            key=tuple(requests.keys[row].tolist()),
            max_tokens=int(requests.max_tokens[row]),
            exact=True,
            sampler=SAMPLER,
        )
        for row, prompt in enumerate(requests.prompts())
    ]


def endless(workload: Workload, step: int) -> Iterator[Unfinished]:
    """The sequences of one batch after the other."""
    for number in count(step):
        yield from sequences(Synthetic(workload).step(number).requests, number * workload.batch)


def in_the_middle(
    fresh: Iterator[Unfinished], many: int, rng: np.random.Generator
) -> list[Unfinished]:
    """Sequences of the ages that an engine has which has been full for long: long ones are in
    flight more often, and each is as likely at any of its tokens."""
    pool = list(islice(fresh, 8 * many))
    lengths = np.array([each.max_tokens for each in pool], dtype=np.float64)
    chosen = rng.choice(len(pool), size=many, replace=False, p=lengths / lengths.sum())
    found = []
    for row in chosen.tolist():
        age = int(rng.integers(0, pool[row].max_tokens))
        found.append(pool[row].with_more(rng.integers(100_000, size=age).tolist()))
    return found


@dataclass(kw_only=True)
class Streamed:
    """What a stream made in so many seconds. `pauses`: from the last tokens of the old weights to
    the first of the new ones."""

    tokens: int = 0
    seconds: float = 0.0
    pauses: list[float] = field(default_factory=list)
    in_flight: list[int] = field(default_factory=list)

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds


def stream(engine: VllmEngine, sender: Sender, fresh: Iterator[Unfinished], many: int) -> Streamed:
    """Keep so many sequences in flight. Weights arrive between two steps at even distances."""
    engine.submit(in_the_middle(fresh, many, np.random.default_rng(0)), 0)
    steps = settled(engine, fresh)
    found, version = Streamed(), 0
    begin = last = interrupted = time.perf_counter()
    while last - begin < SECONDS:
        sampled_by, made, last = next_step(engine, fresh, version)
        found.tokens += made
        found.in_flight.append(engine.in_flight)
        if made and sampled_by == version and len(found.pauses) < version:
            found.pauses.append(last - interrupted)
        if version < INSTALLS and last - begin > (version + 1) * SECONDS / (INSTALLS + 1):
            interrupted = last
            sender.send(engine)
            version += 1
    found.seconds = last - begin
    print(f"{many} had their caches after {steps} steps")
    return found


def next_step(
    engine: VllmEngine, fresh: Iterator[Unfinished], version: int
) -> tuple[int, int, float]:
    """Decode once, and begin as many sequences as have ended: the version that sampled, the tokens
    that were made, and when."""
    sampled_by, drawn = engine.step(version)
    at = time.perf_counter()
    engine.submit(list(islice(fresh, sum(each.ended for each in drawn))), version)
    return sampled_by, sum(len(each.tokens) for each in drawn), at


def settled(engine: VllmEngine, fresh: Iterator[Unfinished]) -> int:
    """Decode until all have their caches and some time has passed; the steps that it took."""
    steps, full, since = 0, 0, time.perf_counter()
    while time.perf_counter() - since < SETTLING_SECONDS:
        _, made, at = next_step(engine, fresh, 0)
        steps += 1
        full += made >= 0.98 * engine.in_flight  # some are always being begun
        if full < FULL_STEPS:
            since = at
    return steps


def recomputed(engine: VllmEngine) -> float:
    """Seconds until all have their caches again after they were dropped."""
    began, many = time.perf_counter(), engine.in_flight
    engine.recompute()
    seen: set[int] = set()
    while len(seen) < 0.98 * many:  # some may end meanwhile
        seen |= {each.number for each in engine.step(INSTALLS)[1]}
    return time.perf_counter() - began


def batches(engine: VllmEngine, workload: Workload, steps: Sequence[int]) -> float:
    """Tokens per second of one batch after the other."""
    asked = [Synthetic(workload).step(step).requests for step in steps]
    began = time.perf_counter()
    made = sum(int(engine.generate(requests, SAMPLER)[0].sum()) for requests in asked)
    return made / (time.perf_counter() - began)


def test_an_engine_that_is_always_full_makes_more_tokens_than_one_batch_by_batch() -> None:
    workload = job()
    began = time.perf_counter()
    engine, sender = VllmEngine(plan_of(workload)), Sender(workload)
    sender.send(engine)
    engine.generate(Synthetic(workload).step(0).requests.take(np.arange(8)), SAMPLER)  # warms up
    print(f"\nstarted in {time.perf_counter() - began:.0f} s")
    by_batch = batches(engine, workload, (1, 2))
    print(f"batch by batch of {BATCH}: {by_batch:.0f} tokens/s")
    ratios = {}
    for many in (BATCH, MOST):
        found = stream(engine, sender, endless(workload, 10), many)
        ratios[many] = found.rate / by_batch
        pauses = ", ".join(f"{pause:.3f}" for pause in found.pauses)
        print(
            f"{many} in flight: {found.rate:.0f} tokens/s, {ratios[many]:.2f} times as many; "
            f"weights interrupt for {pauses} s"
        )
        assert set(found.in_flight) == {many}
        assert len(found.pauses) == 3 and max(found.pauses) <= 0.2
        if many == MOST:
            print(f"their caches are recomputed in {recomputed(engine):.1f} s")
        engine.abandon()
    assert ratios[BATCH] >= 1.4 and ratios[MOST] >= 2.0
