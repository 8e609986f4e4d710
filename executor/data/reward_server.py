"""A reward that a server gives, asked by HTTP.

A request is a POST of JSON, as OpenRLHF sends it to its remote reward models, with the responses,
the answers and the columns of the data besides:

    {"query": [...], "prompts": [...], "responses": [...], "labels": [...], "columns": [...]}

where a query is the prompt and the response in one. The answer is JSON: a list of numbers, one for
each, or {"rewards": [...]}, or {"scores": [...]}.
https://github.com/OpenRLHF/OpenRLHF/blob/main/examples/python/reward_func.py"""

import http.client
import json
import time
import urllib.error
import urllib.request
from typing import Any

from executor.data.reward_file import checked
from executor.data.reward_forms import Samples
from planner.spec.errors import UserError
from planner.spec.rewards import RewardServer

BEFORE_AGAIN_SECONDS = 0.5  # before the first request that is made again; then twice as long, ...
MOST_BETWEEN_SECONDS = 10.0
WRONG = range(400, 500)  # statuses of requests that are no better a second time
BUSY = (408, 425, 429)  # but for these


def score(server: RewardServer, samples: Samples) -> list[float]:
    """The server's rewards, one finite number per response; `samples_per_request` are asked for at
    once. Raises UserError if it does not answer, or answers anything else."""
    size, found = server.samples_per_request, list[float]()
    for begin in range(0, len(samples), size):
        some = samples.take(range(begin, min(begin + size, len(samples))))
        rewards = _rewards_in(server, _answer(server, _request(server, some)))
        found += checked(_called(server), rewards, some)
    return found


def check(server: RewardServer, samples: Samples) -> None:
    """Ask once for the reward of some samples, to see whether there is a server that gives it.
    Raises UserError."""
    score(server.changed(retries=0), samples)


def _called(server: RewardServer) -> str:
    return f"reward server {server.url}"


def _request(server: RewardServer, samples: Samples) -> urllib.request.Request:
    pairs = zip(samples.prompts, samples.responses, strict=True)
    body = {
        "query": [prompt + response for prompt, response in pairs],
        "prompts": samples.prompts,
        "responses": samples.responses,
        "labels": samples.answers,
        "columns": samples.columns,
    }
    data = json.dumps(body, default=str).encode()
    headers = {"Content-Type": "application/json", "Accept": "application/json"}
    return urllib.request.Request(server.url, data, headers)


def _answer(server: RewardServer, request: urllib.request.Request) -> bytes:
    """What the server answers, after as many tries as it has. Each has the whole time limit."""
    pause = BEFORE_AGAIN_SECONDS
    for left in range(server.retries, -1, -1):
        try:
            with urllib.request.urlopen(request, timeout=server.timeout_seconds) as answer:
                content: bytes = answer.read()
                return content
        except urllib.error.HTTPError as error:
            reason = f"HTTP {error.code}: {error.reason}"
            if error.code in WRONG and error.code not in BUSY:
                raise UserError(
                    f"{_called(server)} refused to answer ({reason}); check the address, and what "
                    "the server asks for"
                ) from None
        except (OSError, http.client.HTTPException) as error:
            reason = str(getattr(error, "reason", None) or error) or type(error).__name__
        if not left:
            break
        time.sleep(pause)
        pause = min(2 * pause, MOST_BETWEEN_SECONDS)
    raise UserError(
        f"{_called(server)} gave no answer ({reason}) within {server.timeout_seconds:g} s and "
        f"{server.retries} tries more; look at whether it runs, or raise timeout_seconds"
    )


def _rewards_in(server: RewardServer, content: bytes) -> list[Any]:
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        raise _nonsense(server, content) from None
    if isinstance(found, dict):
        found = found.get("rewards", found.get("scores"))
    if not isinstance(found, list):
        raise _nonsense(server, content)
    return found


def _nonsense(server: RewardServer, content: bytes) -> UserError:
    shown = content[:60].decode(errors="replace")
    return UserError(
        f"{_called(server)} answered {shown!r}; it must be JSON: a list of numbers, or "
        '{"rewards": [...]}'
    )
