"""The peers' formulas, by the names that the tests have for them."""

import hollow  # isort: skip  # before the peers

import torch
from openrlhf.models import utils as openrlhf
from openrlhf.models.loss import PolicyLoss, ValueLoss, aggregate_loss
from openrlhf.trainer.ppo_utils.experience_maker import RemoteExperienceMaker
from openrlhf.trainer.ppo_utils.kl_controller import AdaptiveKLController
from trl.trainer import utils as trl
from trl.trainer.grpo_trainer import GRPOTrainer
from verl.trainer.ppo import core_algos as verl
from verl.trainer.ppo.rollout_corr_helper import (
    compute_rollout_correction_weights,
    compute_rollout_rejection_mask,
)
from verl.utils import torch_functional as verl_functional
from verl.workers.config import ActorConfig

hollow.end()
torch.compiler.set_stance("force_eager")  # OpenRLHF compiles its entropy

__all__ = [
    "ActorConfig",
    "AdaptiveKLController",
    "GRPOTrainer",
    "PolicyLoss",
    "RemoteExperienceMaker",
    "ValueLoss",
    "aggregate_loss",
    "compute_rollout_correction_weights",
    "compute_rollout_rejection_mask",
    "openrlhf",
    "trl",
    "verl",
    "verl_functional",
]
