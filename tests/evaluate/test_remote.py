"""A server as the source of answers: what is asked of it, what it may do wrong, and a score at the end."""

import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

import puna
from puna.cli import run
from puna.errors import PunaError
from puna.evaluate import evaluate, remote
from puna.evaluate.completing import PROTOCOLS, Ask
from puna.evaluate.remote import RemoteCompleter

TASK = {
    "task_id": "Tiny/0",
    "prompt": "def one():\n",
    "entry_point": "one",
    "test": "def check(candidate):\n    assert candidate() == 1\n",
}


class FakeServer(ThreadingHTTPServer):
    """Answers every request with what `says` makes of it; keeps the requests."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests: list[tuple[str, Any]] = []
        self.failures: list[int] = []
        self.key: str | None = None
        self.answer: Any = {
            "choices": [{"text": "    return 1\n", "message": {"content": "```\ndef one(): return 1\n```"}}]
        }
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: FakeServer

    def do_GET(self) -> None:
        if self._is_known():
            self._say(200, {"data": [{"id": "first"}, {"id": "second"}]})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.requests.append((self.path, json.loads(body)))
        if not self._is_known():
            return
        if self.server.failures:
            self._say(self.server.failures.pop(), {"error": "too much at once"})
        else:
            self._say(200, self.server.answer)

    def _is_known(self) -> bool:
        given = self.headers["Authorization"]
        if self.server.key is None or given == f"Bearer {self.server.key}":
            return True
        self._say(401, {"error": f"wrong: {given}"})
        return False

    def _say(self, code: int, what: Any) -> None:
        self.send_response(code)
        self.end_headers()
        self.wfile.write(json.dumps(what).encode())

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "PAUSE_SECONDS", (0.0, 0.0, 0.0))


def completer(server: FakeServer, **options: Any) -> RemoteCompleter:
    return RemoteCompleter(server.url, **{"max_tokens": 9, "stop": tuple("abcdef"), "batch_rows": 2, **options})


def test_what_is_asked_is_what_the_protocol_says(server: FakeServer) -> None:
    complete = completer(server, how=PROTOCOLS["sample"], model="mine")
    assert complete([Ask("x = "), Ask("a", suffix="b")], [1, 2**40 + 7]) == ["    return 1\n"] * 2
    (path, plain), (_, infill) = sorted(server.requests[2:], key=lambda request: "suffix" in request[1])
    assert path == "/v1/completions"
    assert plain == {
        "model": "mine",
        "max_tokens": 9,
        "temperature": 0.8,
        "top_p": 0.95,
        "stop": ["a", "b", "c", "d"],
        "seed": 1,
        "prompt": "x = ",
    }
    assert (infill["prompt"], infill["suffix"], infill["seed"]) == ("a", "b", 7)


def test_an_answer_is_given_as_it_comes_and_the_next_ask_takes_its_place() -> None:
    class Turns(RemoteCompleter):
        """The first ask is answered once the answer of the last is given."""

        last_is_given = threading.Event()

        def _answer(self, ask: Ask, seed: int) -> str:
            assert ask.prefix != "0" or self.last_is_given.wait(20)
            return ask.prefix

    def note(number: int, text: str) -> None:
        given.append((number, text))
        if number == 4:
            Turns.last_is_given.set()

    given: list[tuple[int, str]] = []
    complete = Turns("http://nowhere", "model", max_tokens=1, stop=(), batch_rows=2)
    answers = complete([Ask(f"{i}") for i in range(5)], [0] * 5, note)
    assert answers == ["0", "1", "2", "3", "4"]
    assert given[-1] == (0, "0")
    assert sorted(given) == list(enumerate(answers))


def test_a_question_goes_to_the_chat_without_stop_strings(server: FakeServer) -> None:
    assert "return 1" in completer(server, is_chat=True)([Ask("def", question="Write it.")], [0])[0]
    ((path, request),) = server.requests
    assert path == "/v1/chat/completions"
    assert request["messages"] == [{"role": "user", "content": "Write it."}]
    assert "stop" not in request
    assert request["model"] == "first"


def test_a_server_that_passes_over_a_suffix_is_refused(server: FakeServer) -> None:
    server.answer = server.answer | {"usage": {"prompt_tokens": 5}}
    assert completer(server)([Ask("x")], [0]) == ["    return 1\n"]
    with pytest.raises(PunaError, match="completions ignores the suffix: it counts 5 tokens of prompt with one and"):
        completer(server)([Ask("x", suffix="y")], [0])


def test_a_busy_server_is_asked_again_and_a_refusal_is_said(server: FakeServer) -> None:
    server.failures = [503, 429]
    assert completer(server)([Ask("x")], [0]) == ["    return 1\n"]
    assert len(server.requests) == 3
    server.failures = [400]
    with pytest.raises(PunaError, match=r"/v1/completions refuses: 400 .*too much at once"):
        completer(server)([Ask("x")], [0])
    server.failures = [500] * 9
    with pytest.raises(PunaError, match=r"refuses: 500"):
        completer(server)([Ask("x")], [0])


@pytest.mark.parametrize(
    "broken",
    [
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n500\r\nabc",
        b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n{",
        b"HTTP/1.1 503 Busy\r\nTransfer-Encoding: chunked\r\n\r\n500\r\nabc",
        b"no HTTP\r\n\r\n",
        b"",
    ],
)
def test_an_answer_that_is_broken_off_is_asked_for_again(broken: bytes) -> None:
    whole = b'HTTP/1.0 200 OK\r\n\r\n{"choices": [{"text": "whole"}]}'
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def answer() -> None:
            for text in (broken, whole):
                connection, _ = listening.accept()
                with connection:
                    while not connection.recv(1 << 16).endswith(b"}"):
                        pass
                    connection.sendall(text)

        thread = threading.Thread(target=answer)
        thread.start()
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        complete = RemoteCompleter(url, "model", max_tokens=1, stop=(), batch_rows=1)
        assert complete([Ask("x")], [0]) == ["whole"]
        thread.join()


@pytest.mark.parametrize("answer", [{}, {"choices": []}, {"choices": [{"text": None}]}, []])
def test_an_answer_without_text_is_an_error_and_no_empty_sample(server: FakeServer, answer: Any) -> None:
    server.answer = answer
    with pytest.raises(PunaError, match=r"without choices|holds no text"):
        completer(server)([Ask("x")], [0])


def test_a_server_that_is_not_there_is_said() -> None:
    with pytest.raises(PunaError, match=r"http://127.0.0.1:9/v1/models cannot be reached: .*is the server up"):
        RemoteCompleter("http://127.0.0.1:9/v1/", max_tokens=1, stop=(), batch_rows=1)


def test_a_served_model_is_scored(
    server: FakeServer, bubblewrap: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tasks.jsonl").write_text(json.dumps(TASK))
    command = ["evaluate", "humaneval", "--server", server.url, "--data", str(tmp_path / "tasks.jsonl"), "--json"]
    assert run(command) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["model"], result["server"], result["pass@1"]) == ("first", f"{server.url}/v1", 1.0)
    assert run([*command, "second", "--template", "chat"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["model"], result["pass@1"]) == ("second", 1.0)
    assert [path for path, _ in server.requests] == ["/v1/completions", "/v1/chat/completions"]
    assert evaluate("humaneval", server=server.url, data=tmp_path / "tasks.jsonl")["model"] == "first"


def test_a_server_that_wants_a_key_gets_it_and_nothing_else_has_it(
    server: FakeServer,
    bubblewrap: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "tasks.jsonl").write_text(json.dumps(TASK))
    server.key = "sk-secret"
    command = ["evaluate", "humaneval", "--server", server.url, "--data", str(tmp_path / "tasks.jsonl")]
    command += ["-o", str(tmp_path / "out")]
    for key, said in (("", "wrong: None"), ("sk-other", "wrong: Bearer …"), ("sk-\nother", "set it again")):
        monkeypatch.setenv(remote.KEY_VARIABLE, key)
        assert run(command) != 0
        captured = capsys.readouterr()
        assert said in captured.err
        assert "other" not in captured.err
    monkeypatch.setenv(remote.KEY_VARIABLE, "sk-secret\n")
    assert run([*command, "--json"]) == 0
    written = [path.read_text() for path in (tmp_path / "out").iterdir()]
    assert len(written) > 4
    assert not any("sk-secret" in text for text in [*capsys.readouterr(), *written])


def test_a_run_goes_on_with_another_server_or_version_and_names_both(
    server: FakeServer, bubblewrap: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, folder = tmp_path / "tasks.jsonl", tmp_path / "run"
    data.write_text("".join(json.dumps(TASK | {"task_id": f"Tiny/{i}"}) + "\n" for i in range(2)))
    evaluate("humaneval", server=server.url, data=data, output=folder)
    settings = json.loads((folder / "settings.json").read_text())
    assert settings["server"] == f"{server.url}/v1"
    settings |= {"server": "http://elsewhere/v1", "puna": "0.0.1"}
    (folder / "settings.json").write_text(json.dumps(settings))
    samples = folder / "samples.jsonl"
    samples.write_text(samples.read_text().splitlines(keepends=True)[0])
    both = {"server": f"http://elsewhere/v1, {server.url}/v1", "puna": f"0.0.1, {puna.__version__}"}
    for _ in range(2):
        result = evaluate("humaneval", server=server.url, data=data, output=folder)
        assert {name: result[name] for name in both} == both
    said = capsys.readouterr().err
    assert said.count("holds answers from server http://elsewhere/v1; those that are missing come from") == 1
    assert said.count("holds answers from puna 0.0.1; those that are missing come from") == 1
    (folder / "settings.json").write_text(json.dumps({k: v for k, v in settings.items() if k not in both}))
    assert evaluate("humaneval", server=server.url, data=data, output=folder)["puna"] == puna.__version__
