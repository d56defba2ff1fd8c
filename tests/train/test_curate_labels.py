"""Domain labels: codes read from replies, one retry, labels that are there already, and an endpoint over HTTP."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from s1engine.train.curate.endpoint import Endpoint
from s1engine.train.curate.engine_model import EngineModel
from s1engine.train.curate.labels import UNLABELLED, domain_of, label, label_prompt
from s1engine.train.curate.msc import MSC
from s1engine.train.curate.replies import Asking, Conversation, Replies, Reply
from s1engine.train.curate.rows import Columns
from s1engine.train.tiny import MODEL_DIR

COLUMNS = Columns()


@pytest.mark.parametrize(
    ("reply", "code"),
    [
        ("It is about primes.\n11", "11"),
        ("11", "11"),
        ("so: **11**.\n", "11"),
        ("`05`", "05"),
        ("code 03: logic", None),
        ("2011", None),
        ("0.11", None),
        ("01", None),  # history: not in the list
        ("99", None),
        ("11-XX", None),
        ("", None),
    ],
)
def test_a_reply_ends_with_a_code(reply: str, code: str | None) -> None:
    assert domain_of(reply) == code


def test_the_list_is_the_classification() -> None:
    assert len(MSC) == 61 and list(MSC) == sorted(MSC) and all(len(code) == 2 for code in MSC)
    assert len(set(MSC.values())) == 61
    assert (MSC["11"], MSC["05"], MSC["60"]) == (
        "Number theory",
        "Combinatorics",
        "Probability theory and stochastic processes",
    )
    prompt = label_prompt("What is 2 + 2?")[-1]["content"]
    assert all(f"{code}: {name}" in prompt for code, name in MSC.items()) and "What is 2 + 2?" in prompt


class Scripted:
    """Replies by question and turn; records the temperatures."""

    def __init__(self, replies: Callable[[str, int], str]) -> None:
        self.replies, self.calls = replies, list[tuple[list[str], float]]()

    def __call__(
        self, conversations: Sequence[Conversation], seeds: Sequence[int], temperature: float
    ) -> Iterator[tuple[int, Reply]]:
        questions = [c[-1]["content"].split("\n")[1] for c in conversations]
        self.calls.append((questions, temperature))
        turn = 1 + (temperature > 0)
        return ((i, Reply(self.replies(question, turn), 1, "stop")) for i, question in enumerate(questions))


def asking(load: Callable[[], Any], folder: Path) -> Asking:
    return Asking(load, Replies(folder / "r.jsonl"), "m", {})


def test_an_unreadable_reply_is_asked_for_once_more(tmp_path: Path) -> None:
    said = {("a", 1): "11", ("b", 1): "geometry", ("b", 2): "51", ("c", 1): "?", ("c", 2): "99"}
    model = Scripted(lambda question, turn: said[question, turn])
    rows = [{"problem": q} for q in "abc"]
    labelled, report = label(rows, COLUMNS, asking(lambda: model, tmp_path))
    assert [row["domain"] for row in labelled] == ["11", "51", UNLABELLED]
    assert model.calls == [(["a", "b", "c"], 0.0), (["b", "c"], 0.7)]
    assert (report.notes["asked again"], report.notes["unlabelled"], report.notes["domains"]) == (2, 1, 2)
    assert report.notes["rows by domain"] == {"11 Number theory": 1, "51 Geometry": 1, UNLABELLED: 1}

    def load() -> Scripted:
        raise AssertionError("a model was loaded for nothing")

    again, same = label(rows, COLUMNS, asking(load, tmp_path))
    assert again == labelled and same.as_dict() == report.as_dict()


def test_labels_that_are_there_stay(tmp_path: Path) -> None:
    rows = [{"problem": "a", "domain": "Algebra"}, {"problem": "b", "domain": None}, {"problem": "c"}]
    labelled, report = label(rows, COLUMNS, None)
    assert [row["domain"] for row in labelled] == ["Algebra", UNLABELLED, UNLABELLED]
    assert (report.notes["already labelled"], report.notes["unlabelled"]) == (1, 2)
    model = Scripted(lambda question, turn: "05")
    labelled, _ = label(rows, COLUMNS, asking(lambda: model, tmp_path))
    assert [row["domain"] for row in labelled] == ["Algebra", "05", "05"]
    with pytest.raises(ValueError, match="no column for the domain"):
        label([{"problem": "a"}], COLUMNS, None)


def test_a_model_of_this_engine_labels(tmp_path: Path) -> None:
    """The tiny reasoner knows no subjects: everything runs, and nothing gets a label."""

    def load() -> EngineModel:
        return EngineModel(str(MODEL_DIR), max_tokens=8, answer_only=True, device="cpu")

    rows = [{"problem": "3 a:+5 b:*9 c:-7"}, {"problem": "x" * 2000}]
    labelled, report = label(rows, COLUMNS, asking(load, tmp_path))
    assert [row["domain"] for row in labelled] == [UNLABELLED] * 2 and report.notes["asked again"] == 2


class Server(ThreadingHTTPServer):
    """Answers /v1/chat/completions from `respond(body) -> (status, payload)`, and keeps what it was sent."""

    def __init__(self, respond: Callable[[dict[str, Any]], tuple[int, Any]]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.respond, self.requests, self.headers = respond, list[dict[str, Any]](), list[dict[str, str]]()
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.requests.append(body)
            self.server.headers.append(dict(self.headers))
            status, payload = self.server.respond(body)
        content = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
        self.send_response(status)
        if status == 429:
            self.send_header("Retry-After", "7")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        pass


Serve = Callable[[Callable[[dict[str, Any]], tuple[int, Any]]], Server]


@pytest.fixture
def serve() -> Iterator[Serve]:
    servers = []

    def start(respond: Callable[[dict[str, Any]], tuple[int, Any]]) -> Server:
        server = Server(respond)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return server

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def completion(text: str | None) -> dict[str, Any]:
    return {"choices": [{"message": {"content": text}, "finish_reason": "stop"}], "usage": {"completion_tokens": 5}}


def test_an_endpoint_labels_in_order(serve: Serve, tmp_path: Path) -> None:
    codes = list(MSC)
    server = serve(lambda body: (200, completion(f"because\n{codes[int(body['messages'][-1]['content'].split()[1])]}")))
    endpoint = Endpoint(server.url, "some/model", api_key="secret", max_tokens=99, concurrency=4)
    rows = [{"problem": str(i)} for i in range(30)]
    labelled, _ = label(rows, COLUMNS, asking(lambda: endpoint, tmp_path))
    assert [row["domain"] for row in labelled] == codes[:30]
    assert len(server.requests) == 30
    assert {(body["model"], body["temperature"], body["max_tokens"]) for body in server.requests} == {
        ("some/model", 0.0, 99)
    }
    assert all(headers["Authorization"] == "Bearer secret" for headers in server.headers)
    keys = [json.loads(line)["key"] for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert keys == sorted(keys) and len(keys) == 30  # whatever the order in which replies came


def test_failures_that_may_pass_are_tried_again(serve: Serve) -> None:
    statuses = iter([503, 429, 200])
    waits: list[float] = []
    server = serve(lambda body: (next(statuses), completion("11")))
    endpoint = Endpoint(server.url, "m", concurrency=1, sleep=waits.append)
    assert list(endpoint([[{"role": "user", "content": "q"}]], [2**59], 0.0)) == [(0, Reply("11", 5, "stop"))]
    assert waits == [1.0, 7.0] and len(server.requests) == 3  # the second as the server asked
    assert server.requests[0]["seed"] < 2**31


def test_failures_that_stay_are_told(serve: Serve) -> None:
    question = [[{"role": "user", "content": "q"}]]
    server = serve(lambda body: (401, {"error": "wrong key"}))
    with pytest.raises(ValueError, match=r"chat/completions: 401 .*wrong key"):
        list(Endpoint(server.url, "m")(question, [0], 0.0))
    assert len(server.requests) == 1
    server = serve(lambda body: (500, b"oh"))
    with pytest.raises(OSError, match="no reply after 3 tries; the last: 500"):
        list(Endpoint(server.url, "m", retries=3, sleep=lambda seconds: None)(question, [0], 0.0))
    for payload, message in (({"choices": []}, "not a chat completion"), (b"<html>", "not JSON")):
        server = serve(lambda body, payload=payload: (200, payload))
        with pytest.raises(ValueError, match=message):
            list(Endpoint(server.url, "m")(question, [0], 0.0))
    server.shutdown()
    server.server_close()
    with pytest.raises(OSError, match="no reply after 2 tries"):
        list(Endpoint(server.url, "m", retries=2, sleep=lambda seconds: None)(question, [0], 0.0))
    with pytest.raises(ValueError, match="--endpoint ftp://x: must begin with http"):
        Endpoint("ftp://x", "m")


def test_a_null_content_is_no_label(serve: Serve) -> None:
    server = serve(lambda body: (200, completion(None)))
    assert list(Endpoint(server.url, "m")([[{"role": "user", "content": "q"}]], [0], 0.0)) == [
        (0, Reply("", 5, "stop"))
    ]
