"""`plan checkpoint`."""

from pathlib import Path

from planner.commands.execute import need_extra
from planner.commands.inputs import make_console


def export(checkpoint: Path, out: Path) -> None:
    """Write the models of a checkpoint, or of a run's last one, as Hugging Face directories."""
    need_extra("plan checkpoint")
    from executor.running.checkpoint import find  # torch is slow to load
    from executor.running.export_checkpoint import export_checkpoint

    found = find(checkpoint)
    written = export_checkpoint(found, out)
    names = " and ".join(str(path) for path in written)
    step = f"{found.manifest.step} steps"
    make_console().print(f"Wrote {names}, after {step}.", markup=False, soft_wrap=True)
