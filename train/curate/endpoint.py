"""A model behind an OpenAI-compatible endpoint (/chat/completions), asked over several connections at once."""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

from s1engine.train.curate.replies import Conversation, Reply

PASSING = {408, 409, 425, 429, 500, 502, 503, 504}
"""Statuses worth a second try: time-outs, limits on the rate, servers that are starting or overloaded."""
LONGEST_WAIT = 60.0


class Endpoint:
    """Answers conversations over HTTP. Failures that may pass are tried again, each wait twice the last.

    base_url: up to and with the version, e.g. https://api.openai.com/v1 or http://localhost:8000/v1.
    retries: tries of one request before an OSError. timeout: seconds for one of them.
    Raises ValueError where the server refuses a request for good (a wrong key or model), with what it says.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        api_key: str | None = None,
        max_tokens: int = 1024,
        concurrency: int = 8,
        retries: int = 6,
        timeout: float = 300.0,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        if not base_url.startswith(("http://", "https://")):
            raise ValueError(f"--endpoint {base_url}: must begin with http:// or https://")
        if concurrency < 1:
            raise ValueError(f"--concurrency {concurrency}: must be at least 1")
        self.url = base_url.rstrip("/") + "/chat/completions"
        self.model, self.max_tokens = model, max_tokens
        self.concurrency, self.retries, self.timeout, self.sleep = concurrency, retries, timeout, sleep
        self._headers = {"Content-Type": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"

    def __call__(
        self, conversations: Sequence[Conversation], seeds: Sequence[int], temperature: float
    ) -> Iterator[tuple[int, Reply]]:
        with ThreadPoolExecutor(self.concurrency) as pool:
            jobs = {
                pool.submit(self._one, conversation, seed, temperature): index
                for index, (conversation, seed) in enumerate(zip(conversations, seeds, strict=True))
            }
            try:
                for job in as_completed(jobs):
                    yield jobs[job], job.result()
            finally:
                pool.shutdown(cancel_futures=True)

    def _one(self, conversation: Conversation, seed: int, temperature: float) -> Reply:
        body = {
            "model": self.model,
            "messages": conversation,
            "temperature": temperature,
            "max_tokens": self.max_tokens,
            "seed": seed % 2**31,  # what every server takes
        }
        reply = self._post(json.dumps(body).encode())
        try:
            choice = reply["choices"][0]
            text = choice["message"]["content"] or ""
            tokens = (reply.get("usage") or {}).get("completion_tokens") or 0
            return Reply(text, tokens, choice.get("finish_reason") or "")
        except (KeyError, IndexError, TypeError):
            raise ValueError(f"{self.url}: not a chat completion: {json.dumps(reply)[:500]}") from None

    def _post(self, body: bytes) -> Any:
        for attempt in range(self.retries):
            wait = min(2.0**attempt, LONGEST_WAIT)
            try:
                request = urllib.request.Request(self.url, body, self._headers)
                with urllib.request.urlopen(request, timeout=self.timeout) as response:
                    return json.load(response)
            except urllib.error.HTTPError as error:
                why = f"{error.code} {error.reason}: {error.read()[:500].decode('utf-8', 'replace')}"
                if error.code not in PASSING:
                    raise ValueError(f"{self.url}: {why}") from None
                asked = error.headers.get("Retry-After", "")
                wait = min(max(wait, float(asked)) if asked.isdigit() else wait, LONGEST_WAIT)
            except json.JSONDecodeError as error:
                raise ValueError(f"{self.url}: the reply is not JSON ({error})") from None
            except (OSError, http.client.HTTPException) as error:  # refused, reset, timed out
                why = str(error) or type(error).__name__
            if attempt + 1 < self.retries:
                self.sleep(wait)
        raise OSError(f"{self.url}: no reply after {self.retries} tries; the last: {why}")
