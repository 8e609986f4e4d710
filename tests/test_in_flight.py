"""Cached beginnings of prompts, in an engine's process that is used again by another run."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
from conftest import make_workload

from executor.rollout.streaming import Unfinished
from executor.rollout.vllm.in_flight import InFlight

pytestmark = pytest.mark.vllm


class Salts:
    """Keeps the salts of what an engine is given."""

    def __init__(self) -> None:
        self.found: list[str] = []

    def add(self, requests: Iterable[Any], salt: str) -> None:
        self.found.append(salt)

    def abort(self, names: list[str]) -> None: ...


def test_runs_share_no_cached_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor do the versions of one."""
    salts: Any = Salts()
    streaming = InFlight(salts, eos=[], stops=None)
    tokens = np.arange(3, dtype=np.int32)
    sequence = Unfinished(
        number=0,
        prompt=tokens,
        response=tokens[:0],
        key=(1,),
        max_tokens=4,
        exact=True,
        sampler=make_workload().sampler,
    )
    for _ in range(2):
        streaming.abandon()  # as a start does
        for version in (0, 0, 1):
            streaming.submit([sequence], version)
    assert len(set(salts.found)) == 4 and salts.found[0] == salts.found[1]
