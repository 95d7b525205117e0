r"""Answers from a server that speaks OpenAI's API: vLLM, llama.cpp's, or whatever else does.

    Ask("def f(x):\n")                         POST /v1/completions        {"prompt": …, "stop": …, "seed": …}
    Ask("def f(x):\n", suffix="return y\n")    POST /v1/completions        {"prompt": …, "suffix": …}
    a chat template is named                  POST /v1/chat/completions   {"messages": [{"role": "user", …}]}

A server that wants a key gets that of the environment variable OPENAI_API_KEY. Whether a server obeys seeds is its own
affair; a run that goes on asks for what is missing alone.
"""

import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

from puna.errors import PunaError, UsageError
from puna.evaluate.completing import PROTOCOLS, Ask, How, OnAnswer

#: OpenAI's API takes no more stop strings; what is written beyond the others is cut here all the same.
MOST_STOPS = 4

#: Names the key of a server that wants one.
KEY_VARIABLE = "OPENAI_API_KEY"

#: Requests at once by default: a server may have few places, and one that waits too long for its turn fails.
REQUESTS = 8

#: Seconds before a request is made a second time, a third …; then it is given up.
PAUSE_SECONDS = (1.0, 4.0, 15.0)

#: What a connection raises that is broken off in the middle, or that speaks no HTTP.
BROKEN_OFF = (OSError, http.client.HTTPException)

#: Longest wait for one answer.
TIMEOUT_SECONDS = 600.0


class RemoteCompleter:
    """Answers by a server; `batch_rows` requests are under way at once.

    Args:
        url: of the server, with or without "/v1".
        model: what the server calls the model; None: the first that it has.
        max_tokens: most tokens of an answer.
        stop: an answer that continues or fills in ends before the first of these.
        batch_rows: requests at once.
        how: greedy by default.
        is_chat: questions are put to the server's chat, in whatever layout it has.

    Attributes:
        url: with "/v1".
        model: what the server calls the model.

    Raises:
        UsageError: the URL is none, or the key cannot be one.
        PunaError: the server cannot be reached, or has no model.
    """

    def __init__(
        self,
        url: str,
        model: str | None = None,
        *,
        max_tokens: int,
        stop: tuple[str, ...],
        batch_rows: int,
        how: How = PROTOCOLS["greedy"],
        is_chat: bool = False,
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise UsageError(f"{url} is not a server's URL; begin it with http:// or https://")
        self.url = url.rstrip("/").removesuffix("/v1") + "/v1"
        self._key = os.environ.get(KEY_VARIABLE, "").strip()
        if not (self._key.isascii() and self._key.isprintable()):
            raise UsageError(f"{KEY_VARIABLE} holds characters that are of no key; set it again")
        self._batch_rows, self._is_chat, self._fills_gaps = batch_rows, is_chat, False
        self.model = model or self._first_model()
        self._settings: dict[str, Any] = {
            "model": self.model,
            "max_tokens": max_tokens,
            "temperature": how.temperature,
            "top_p": how.top_p,
        }
        if stop and not is_chat:  # an answer in chat may well hold such a text
            self._settings["stop"] = list(stop[:MOST_STOPS])

    def __call__(self, asks: Sequence[Ask], seeds: Sequence[int], on_answer: OnAnswer | None = None) -> list[str]:
        """The answers, in the order of the asks; each is given to `on_answer` once it is there."""
        if not self._fills_gaps and any(ask.suffix is not None for ask in asks):
            self._check_suffix()
            self._fills_gaps = True
        with ThreadPoolExecutor(self._batch_rows) as threads:
            answers = [threads.submit(self._answer, *one) for one in zip(asks, seeds, strict=True)]
            number = {answer: i for i, answer in enumerate(answers)}
            try:
                for answer in as_completed(answers):
                    text = answer.result()
                    if on_answer is not None:
                        on_answer(number[answer], text)
                return [answer.result() for answer in answers]
            finally:
                threads.shutdown(wait=False, cancel_futures=True)  # after an error, what is under way is enough

    def _answer(self, ask: Ask, seed: int) -> str:
        request = self._settings | {"seed": seed % 2**31}
        if self._is_chat:
            question = ask.prefix if ask.question is None else ask.question
            choice = self._post("/chat/completions", request | {"messages": [{"role": "user", "content": question}]})
            return _text(choice, lambda choice: choice["message"]["content"])
        asked = {"prompt": ask.prefix} | ({} if ask.suffix is None else {"suffix": ask.suffix})
        return _text(self._post("/completions", request | asked), lambda choice: choice["text"])

    def _check_suffix(self) -> None:
        """Refuses a server that passes over a suffix without a word, as some do: its answers would fill in nothing."""
        lengths = []
        for suffix in ({}, {"suffix": "return 1\n" * 9}):
            answer = self._request("/completions", self._settings | {"prompt": "x = 1\n", "max_tokens": 1} | suffix)
            usage = answer.get("usage") if isinstance(answer, dict) else None
            lengths.append((usage or {}).get("prompt_tokens"))
        if lengths[0] is not None and lengths[0] == lengths[1]:
            raise PunaError(
                f"{self.url}/completions ignores the suffix: it counts {lengths[0]} tokens of prompt with one and "
                "without; score gaps with a server that fills in, or name the model's folder instead"
            )

    def _first_model(self) -> str:
        models = self._request("/models", None).get("data") or []
        if not models:
            raise PunaError(f"{self.url} serves no model")
        return str(models[0]["id"])

    def _post(self, path: str, request: dict[str, Any]) -> Any:
        answer = self._request(path, request)
        try:
            return answer["choices"][0]
        except (KeyError, IndexError, TypeError):
            raise PunaError(f"{self.url}{path} answered without choices: {self._without_key(answer)[:200]}") from None

    def _request(self, path: str, request: dict[str, Any] | None) -> Any:
        body = None if request is None else json.dumps(request).encode()
        asked = urllib.request.Request(self.url + path, body, {"Content-Type": "application/json"})
        if self._key:
            asked.add_unredirected_header("Authorization", f"Bearer {self._key}")  # nobody else gets it
        for pause in (*PAUSE_SECONDS, None):
            try:
                with urllib.request.urlopen(asked, timeout=TIMEOUT_SECONDS) as answer:
                    return json.load(answer)
            except urllib.error.HTTPError as error:
                said = self._without_key(f"{error.code} {error.reason}: {_body(error)}")
                if pause is None or error.code not in (429, 500, 502, 503, 504):
                    hint = f"; is the key in {KEY_VARIABLE} right?" if error.code in (401, 403) else ""
                    raise PunaError(f"{self.url}{path} refuses: {said}{hint}") from None
            except (*BROKEN_OFF, ValueError) as error:  # or it is no JSON
                if pause is None or body is None:
                    said = self._without_key(error)
                    raise PunaError(f"{self.url}{path} cannot be reached: {said}; is the server up?") from None
            time.sleep(pause)
        raise AssertionError("the last try has no pause")

    def _without_key(self, said: Any) -> str:
        """What is said, for a message; a server may repeat what it was sent."""
        return str(said).replace(self._key, "…") if self._key else str(said)


def _body(error: urllib.error.HTTPError) -> str:
    with error:  # which holds the connection
        try:
            return error.read(500).decode(errors="replace")
        except BROKEN_OFF as why:
            return str(why)


def _text(choice: Any, get: Any) -> str:
    try:
        text = get(choice)
    except (KeyError, TypeError):
        text = None
    if not isinstance(text, str):
        raise PunaError(f"the server's answer holds no text: {str(choice)[:200]}")
    return text
