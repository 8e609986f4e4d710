"""The metrics of the last step as Prometheus reads them, on this machine's loopback."""

import re
from importlib.util import find_spec
from typing import Any

from planner.spec.errors import UserError

LOOPBACK = "127.0.0.1"
OF_POOLS = {"busy": ("pool",), "idle": ("pool", "waiting_for")}  # names and labels


def check(port: int | None) -> None:
    """Raise UserError, before a run starts, where the package is not installed or the port is
    taken."""
    if port is None:
        return
    if find_spec("prometheus_client") is None:
        raise UserError(
            "--prometheus needs prometheus_client; install it with: pip install "
            "'splitplan[prometheus]'"
        )
    Prometheus(port).close(failed=False)


class Prometheus:
    """A gauge for each metric, at `http://127.0.0.1:PORT/metrics`. Raises UserError where the port
    is taken."""

    def __init__(self, port: int) -> None:
        from prometheus_client import CollectorRegistry, Gauge, start_http_server

        self._registry, self._gauge = CollectorRegistry(), Gauge
        self._gauges: dict[str, Gauge] = {}
        try:
            started = start_http_server(port, addr=LOOPBACK, registry=self._registry)
        except OSError as error:
            raise UserError(f"--prometheus {port}: {error.strerror}; choose another port") from None
        self._server, self._thread = started

    def log(self, step: int, scalars: dict[str, float], samples: Any) -> None:
        for key, value in {"step": float(step), **scalars}.items():
            name, labels = described(key)
            if name not in self._gauges:
                self._gauges[name] = self._gauge(
                    name, "of the last step", tuple(labels), registry=self._registry
                )
            gauge = self._gauges[name]
            (gauge.labels(**labels) if labels else gauge).set(value)

    def tell(self, name: str, step: int, rows: Any) -> None:
        """Texts are not for it."""

    def close(self, failed: bool) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def described(key: str) -> tuple[str, dict[str, str]]:
    """The name and the labels of a metric.

    >>> described("idle/actor+critic/generation")
    ('splitplan_idle', {'pool': 'actor+critic', 'waiting_for': 'generation'})
    >>> described("idle/actor")
    ('splitplan_idle', {'pool': 'actor', 'waiting_for': ''})
    >>> described("evaluation/aime-24/pass@8")
    ('splitplan_evaluation_aime_24_pass_8', {})
    """
    first, *rest = key.split("/")
    if first in OF_POOLS:
        labels = OF_POOLS[first]
        filled = [*rest, *[""] * len(labels)][: len(labels)]
        return f"splitplan_{first}", dict(zip(labels, filled, strict=True))
    return "splitplan_" + re.sub(r"[^A-Za-z0-9_]", "_", key), {}
