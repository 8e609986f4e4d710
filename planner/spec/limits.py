"""The largest numbers that are accepted, and the check that a number is in its range."""

from planner.spec.errors import UserError

MOST_SEED = 2**63 - 1
MOST_STEPS = 100_000
MOST_STALENESS = 1000
MOST_GPUS = 65_536  # of a cluster
MOST_GPUS_ASKED = 4096  # of a what-if question, a Pareto picture, or a proposal of more GPUs


def check_range(name: str, value: int, least: int, most: int = MOST_STEPS) -> None:
    """Raise UserError unless `least` <= `value` <= `most`."""
    if value < least:
        raise UserError(f"{name} {value}: must be at least {least}")
    if value > most:
        raise UserError(f"{name} {value}: must be at most {most:,}")
