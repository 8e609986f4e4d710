"""What `plan import` reads: a log of each framework."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from planner.exchange.imported_run import ImportedRun
from planner.exchange.verl_log import read_verl_log
from planner.exchange.verl_run import Told, imported_verl
from planner.spec.errors import UserError


def reader(
    framework: str,
    log: Path,
    *,
    config: Path | None,
    model: str | None,
    device: str | None,
    warmup: int | None,
) -> Callable[[], ImportedRun]:
    """The function that reads a run. It raises UserError, which names the log."""
    assert framework == "verl"
    told = Told(model=model, device=device, warmup=warmup)

    def read() -> ImportedRun:
        found = read_verl_log(log)
        settings = found.config if config is None else read_yaml(config)
        if settings is None:
            raise UserError(
                f"{log}: has no whole configuration, which verl prints at the start; name its file "
                "with --config (outputs/…/.hydra/config.yaml)"
            )
        try:
            return imported_verl(found, settings, told)
        except UserError as error:
            raise UserError(f"{log}: {error}") from None

    return read


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises UserError."""
    import yaml

    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; check the path") from None
    except (OSError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({error}); check the path") from None
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{path}: not valid YAML ({str(error).splitlines()[0]})") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: holds a {type(found).__name__}, not a mapping of keys")
    return found
