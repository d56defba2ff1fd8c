"""Asking a model many questions, so that an answer once given is never asked for again.

Every reply is appended to a JSONL file as it comes. Its key is a hash of the conversation and of all settings
that can change the reply: a run that was killed goes on where it stopped, and a changed setting asks anew.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from s1engine.train.curate.rows import write_rows
from s1engine.train.rows import read_jsonl

Conversation = list[dict[str, str]]

TOO_LONG = "too long"
"""finish_reason of a prompt that left no room in the model's context: it was not asked."""


@dataclass(frozen=True)
class Reply:
    """What a model said: its text, number of tokens, and finish_reason ("stop", "length", TOO_LONG)."""

    text: str
    tokens: int
    finish_reason: str


class Model(Protocol):
    """Answers conversations, one seed each; yields (index of the conversation, reply) as replies come, in any order."""

    def __call__(
        self, conversations: Sequence[Conversation], seeds: Sequence[int], temperature: float
    ) -> Iterator[tuple[int, Reply]]: ...


class Replies:
    """The replies so far, in a JSONL file. A last line that was cut off by a kill is left out."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._records: dict[str, dict[str, Any]] = {}
        if self.path.exists():
            _drop_torn_line(self.path)
            for row in read_jsonl(self.path)[0]:
                record = dict(row.cells)
                for name in ("key", "text", "tokens", "finish_reason"):
                    if name not in record:
                        raise ValueError(
                            f"{row.place}: no {name!r} in it; it is not a file of replies, name another with --replies"
                        )
                self._records[record["key"]] = record

    def __contains__(self, key: str) -> bool:
        return key in self._records

    def __getitem__(self, key: str) -> Reply:
        record = self._records[key]
        return Reply(record["text"], record["tokens"], record["finish_reason"])

    def add(self, key: str, model: str, reply: Reply) -> None:
        """Append one reply; once this returns, a kill does not lose it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._records[key] = {"key": key, "model": model, **asdict(reply)}
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(self._records[key], ensure_ascii=False) + "\n")

    def sort(self) -> None:
        """Bring the file into the order of its keys, so that it does not tell in which order replies came."""
        write_rows(self.path, [self._records[key] for key in sorted(self._records)])


def _drop_torn_line(path: Path) -> None:
    with open(path, "rb+") as file:
        content = file.read()
        end = content.rfind(b"\n") + 1
        if end != len(content):
            file.truncate(end)


@dataclass(frozen=True)
class Asking:
    """Whom to ask and how.

    load makes the model; it is not called where every reply is known. settings: all that can change a reply beside the
    conversation, the model's name and the temperature.
    """

    load: Callable[[], Model]
    replies: Replies
    model: str
    settings: Mapping[str, Any]
    temperature: float = 0.0


def ask(conversations: Sequence[Conversation], asking: Asking, describe: str) -> list[Reply]:
    """A reply to each conversation, asking only for those that are not known. Seeds are drawn from the keys.

    describe: what the progress bar says.
    """
    settings = {"model": asking.model, "temperature": asking.temperature, **asking.settings}
    keys = [_key(conversation, settings) for conversation in conversations]
    known = asking.replies
    missing = {key: conversation for key, conversation in zip(keys, conversations, strict=True) if key not in known}
    if missing:
        model = asking.load()
        todo = list(missing)
        with tqdm(total=len(keys), initial=len(keys) - len(todo), desc=describe, unit="question") as bar:
            for index, reply in model([missing[key] for key in todo], [_seed(key) for key in todo], asking.temperature):
                known.add(todo[index], asking.model, reply)
                bar.update()
        known.sort()
    return [known[key] for key in keys]


def _key(conversation: Conversation, settings: Mapping[str, Any]) -> str:
    written = json.dumps([conversation, settings], sort_keys=True)
    return hashlib.sha256(written.encode()).hexdigest()[:24]


def _seed(key: str) -> int:
    return int(key[:15], 16)  # 60 bits
