"""A reward server, asked over a real socket."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from conftest import samples_of

from executor.data import reward_server
from planner.spec.errors import UserError
from planner.spec.rewards import RewardServer

SAMPLES = samples_of("a bb ccc", "x yy zzz", ["1", 2, None])
Answer = tuple[int, bytes]


@contextmanager
def serving(answer: Callable[[dict[str, Any]], Answer]) -> Iterator[tuple[str, list[Any]]]:
    """The address of a server, and what it has been asked."""
    asked: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append(body)
            status, content = answer(body)
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *given: Any) -> None:
            """Nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/score", asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def lengths(body: dict[str, Any]) -> Answer:
    return 200, json.dumps({"rewards": [len(query) for query in body["query"]]}).encode()


def test_responses_are_rated_in_requests_of_a_size() -> None:
    with serving(lengths) as (url, asked):
        server = RewardServer(url=url, samples_per_request=2)
        assert reward_server.score(server, SAMPLES) == [2.0, 4.0, 6.0]
    assert [body["query"] for body in asked] == [["ax", "bbyy"], ["ccczzz"]]
    assert asked[0]["prompts"] == ["a", "bb"] and asked[0]["responses"] == ["x", "yy"]
    assert asked[0]["labels"] == ["1", 2] and asked[1]["columns"] == [{}]


def test_a_server_that_is_busy_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reward_server, "BEFORE_AGAIN_SECONDS", 0.01)
    answers = [(503, b""), (429, b""), (200, b"[1, 2, 3]")]
    with serving(lambda body: answers.pop(0)) as (url, asked):
        assert reward_server.score(RewardServer(url=url), SAMPLES) == [1.0, 2.0, 3.0]
    assert len(asked) == 3


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"<html>", "answered '<html>'; it must be JSON"),
        (b'{"score": 3}', "it must be JSON: a list of numbers"),
        (b"[1, 2]", "returned 2 rewards for 3 responses"),
        (b'{"rewards": [1, 2, "high"]}', "returned 'high' for prompt 'ccc'"),
        (b"[1, 2, NaN]", "returned nan"),
    ],
)
def test_a_server_that_answers_nonsense(content: bytes, problem: str) -> None:
    with serving(lambda body: (200, content)) as (url, _), pytest.raises(UserError) as error:
        reward_server.check(RewardServer(url=url), SAMPLES)
    assert problem in str(error.value) and "\n" not in str(error.value)


def test_a_server_that_refuses_is_not_asked_again() -> None:
    refused = pytest.raises(UserError, match=r"refused to answer \(HTTP 404: Not Found\)")
    with serving(lambda body: (404, b"")) as (url, asked), refused:
        reward_server.score(RewardServer(url=url), SAMPLES)
    assert len(asked) == 1


def test_a_server_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reward_server, "BEFORE_AGAIN_SECONDS", 0.01)
    server = RewardServer(url="http://127.0.0.1:9/", retries=2, timeout_seconds=1)
    with pytest.raises(UserError, match=r"gave no answer .* within 1 s and 2 tries more"):
        reward_server.score(server, SAMPLES)
