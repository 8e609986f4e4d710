"""Decides how a PPO job is split over GPUs: which model lives where, what runs at the same time,
what it will cost."""

__version__ = "0.2.0"
