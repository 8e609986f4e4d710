"""Random batches for the peers and for us, and what it means that two results are the same."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nan

from executor.training import advantages

seeds = pytest.mark.parametrize("seed", range(20))
CLIP, DUAL, CAP, VALUE_CLIP, KL_COEF = 0.2, 3.0, 2.0, 0.3, 0.1


class Batch:
    """A random batch: what the peers are given has 0 where there is no token, and what we are given
    (`nan`) has NaN. The last three responses are empty, of one token, and whole."""

    def __init__(self, seed: int, holes: bool = True, rows: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        rows, width = rows or 4 + seed % 5, 1 + (7 * seed) % 23

        def normal(scale: float) -> Tensor:
            return scale * torch.randn(rows, width, generator=generator)

        lengths = torch.randint(0, width + 1, (rows,), generator=generator)
        lengths[-3:] = torch.tensor([0, 1, width])
        self.mask = torch.arange(width) < lengths[:, None]
        if holes:
            self.mask &= torch.rand(rows, width, generator=generator) < 0.7
            self.mask[-2:, 0] = True
        self.real = self.mask.float()
        self.proximal = (-2 + normal(1.0)) * self.real
        self.behaviour = self.proximal + normal(0.6) * self.real
        self.log_probs = self.proximal + normal(0.6) * self.real
        self.reference = self.proximal + normal(2.0) * self.real
        self.advantages, self.returns = normal(1.0) * self.real, normal(1.0) * self.real
        self.values, self.old_values = normal(1.0) * self.real, normal(1.0) * self.real
        self.rewards = normal(1.0) * self.real
        self.scores = torch.randn(rows, generator=generator)
        self.tokens = int(self.mask.sum())

    def nan(self, name: str) -> Tensor:
        given: Tensor = getattr(self, name)
        return given.masked_fill(~self.mask, nan).requires_grad_()

    def plain(self, name: str) -> Tensor:
        given: Tensor = getattr(self, name)
        return given.clone().requires_grad_()


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-6)


def assert_same_loss(ours: Tensor, theirs: Tensor, our_input: Tensor, their_input: Tensor) -> None:
    """A loss and its gradient."""
    assert_close(ours, theirs)
    (our_gradient,) = torch.autograd.grad(ours, our_input)
    (their_gradient,) = torch.autograd.grad(theirs, their_input)
    assert_close(our_gradient, their_gradient)


class Groups(Batch):
    """A batch of four prompts with four samples each, none of them empty, and without a KL."""

    def __init__(self, seed: int, holes: bool = True) -> None:
        super().__init__(seed, holes, rows=16)
        self.mask[:, 0] = True
        self.__dict__ |= {"real": self.mask.float(), "tokens": int(self.mask.sum())}
        self.reference = self.proximal
        if seed % 3 == 0:
            self.scores = (self.scores > 0).float()  # groups without variance
        self.index = np.arange(16) // 4

    @property
    def rewarded(self) -> Tensor:
        """The scores on the last tokens."""
        last = self.mask & (self.real.cumsum(1) == self.real.sum(1, keepdim=True))
        return self.scores[:, None] * last

    def ours(self, kind: Any, whiten: bool) -> Tensor:
        found = advantages.estimate(
            kind=kind,
            group=4,
            scores=self.scores,
            log_probs=self.nan("proximal"),
            ref_log_probs=self.nan("reference"),
            mask=self.mask,
            ended=self.mask.any(1),
            whiten_advantages=whiten,
        )
        return found.advantages
