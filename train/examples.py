"""Training data as token ids: what the trainer reads, by one of three templates.

    s1      question, thinking and attempt, in the text of the s1 authors   (`templates`)
    chat    conversations, in the tokenizer's own chat template             (`templates`)
    tokens  rows that are token ids already, with targets and loss weights if they want

A sample that is longer than `max_tokens` is dropped and counted, never cut: a trace without its end teaches a model to
think without coming to an answer (s1 paper, the ablation of the training length).
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from s1engine.train.rows import Columns, Row, read_rows
from s1engine.train.templates import ChatTemplate, S1Template, learns_to_stop

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FIELDS: dict[str, tuple[str, ...]] = {
    "s1": ("question", "thinking", "attempt"),
    "chat": ("messages", "question", "thinking", "attempt"),
    "tokens": (),
}
"""The fields of `Columns` that each template reads."""

BATCH = 256
"""Rows that are given to the tokenizer at once: it encodes them in parallel."""

TOO_LONG = "longer than max_tokens"


@dataclass(frozen=True)
class Example:
    """One sample of n tokens, n at least 2.

    token_ids  int32 [n]
    targets    int32 [n]: what token t is to be predicted as; token_ids itself unless the data say otherwise
    weights    float32 [n], at least 0: of token t in the loss; 0 for the first token, which nothing predicts
    """

    token_ids: np.ndarray
    targets: np.ndarray
    weights: np.ndarray


@dataclass(frozen=True)
class Examples:
    """Samples in the order of their rows, and how many were `dropped`, by reason."""

    examples: list[Example]
    dropped: dict[str, int]

    @property
    def lengths(self) -> list[int]:
        return [len(example.token_ids) for example in self.examples]


def read_examples(
    source: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    max_tokens: int,
    *,
    columns: Columns | None = None,
    split: str | None = None,
    progress: bool = True,
) -> Examples:
    """Reads `source`, a .jsonl or .parquet file or a data set on the hub, wholly into memory (8 bytes a token).

    template    "s1", "chat" or "tokens"
    max_tokens  samples of more tokens are dropped
    columns     where the file has other names for its fields than the usual ones
    split       of a data set on the hub ("train")
    progress    shows a bar on stderr

    Raises ValueError, with file, line and column, for whatever could not be trained on: see `rows` and `templates`.
    """
    columns = columns or Columns()
    _check(template, columns, max_tokens)
    rows, count = read_rows(source, split)
    examples: list[Example] = []
    dropped: Counter[str] = Counter()
    longest = 0
    for example in _bar(_converted(rows, tokenizer, template, columns), count, progress):
        longest = max(longest, len(example.token_ids))
        if len(example.token_ids) > max_tokens:
            dropped[TOO_LONG] += 1
        else:
            examples.append(example)
    if not examples:
        raise ValueError(
            f"{source}: all {count} samples are {TOO_LONG}={max_tokens}; the longest has {longest} tokens; "
            f"raise max_tokens"
        )
    return Examples(examples, dict(dropped))


def _check(template: str, columns: Columns, max_tokens: int) -> None:
    if template not in FIELDS:
        raise ValueError(f"template={template!r}: it must be one of {', '.join(FIELDS)}")
    if max_tokens < 2:
        raise ValueError(f"max_tokens={max_tokens}: it must be at least 2, a token and its successor")
    for field in fields(columns):
        if getattr(columns, field.name) is not None and field.name not in FIELDS[template]:
            raise ValueError(f"columns.{field.name}: template {template!r} reads no {field.name}; leave it out")
    if columns.messages is not None and (columns.question or columns.thinking or columns.attempt):
        raise ValueError("columns.messages: a conversation has no question, thinking or attempt; name it or them")


def _bar(items: Iterator[Example], count: int, progress: bool) -> Iterable[Example]:
    from tqdm import tqdm

    bar: Iterable[Example] = tqdm(
        items, "reading samples", count, unit="sample", unit_scale=True, file=sys.stderr, disable=not progress
    )
    return bar


def _converted(
    rows: Iterator[Row], tokenizer: PreTrainedTokenizerBase, template: str, columns: Columns
) -> Iterator[Example]:
    if template == "tokens":
        vocab_size = len(tokenizer)
        for row in rows:
            yield _from_ids(row, vocab_size)
        return
    form: S1Template | ChatTemplate = (S1Template if template == "s1" else ChatTemplate)(tokenizer, columns)
    end_of_turn: Any = tokenizer.convert_tokens_to_ids(form.end_of_turn)
    while batch := list(islice(rows, BATCH)):
        rendered: list[Any] = [form.render(row) for row in batch]
        for row, encoded in zip(batch, form.encode(rendered), strict=True):
            if not learns_to_stop(encoded, end_of_turn):
                raise ValueError(
                    f"{row.place}: the end of the turn, {form.end_of_turn}, is not among the tokens that are learned: "
                    f"the model would never learn to stop. The chat template must write the tokenizer's eos_token "
                    f"after the assistant's words, and within {{% generation %}} where it has that"
                )
            weights = encoded.learned.astype(np.float32)
            weights[0] = 0
            yield Example(encoded.token_ids, encoded.token_ids, weights)


def _from_ids(row: Row, vocab_size: int) -> Example:
    """Of template "tokens": columns `input_ids`, and optionally `targets` and `weights`, null meaning absent."""
    token_ids = _ids(row, "input_ids", row.cell("input_ids"), vocab_size)
    n = len(token_ids)
    targets, weights = token_ids, np.ones(n, np.float32)
    if (cell := row.cells.get("targets")) is not None:
        targets = _ids(row, "targets", cell, vocab_size)
    if (cell := row.cells.get("weights")) is not None:
        weights = _numbers(row, "weights", cell, "biuf").astype(np.float32)
        if not (np.isfinite(weights) & (weights >= 0)).all():
            bad = int(np.argmin(np.isfinite(weights) & (weights >= 0)))
            raise row.error("weights", f"{cell[bad]!r} at {bad} is not a finite number of at least 0")
    for column, values in (("targets", targets), ("weights", weights)):
        if len(values) != n:
            raise row.error(column, f"{len(values)} values for {n} input_ids; give one for each")
    weights[0] = 0
    if not weights.any():
        raise row.error("weights", "no token after the first has a weight above 0; give one, or remove the row")
    return Example(token_ids, targets, weights)


def _ids(row: Row, column: str, cell: Any, vocab_size: int) -> np.ndarray:
    values = _numbers(row, column, cell, "iu")
    outside = (values < 0) | (values >= vocab_size)
    if outside.any():
        bad = int(outside.argmax())
        raise row.error(column, f"id {values[bad]} at {bad} is outside the vocabulary, 0 to {vocab_size - 1}")
    return values.astype(np.int32)


def _numbers(row: Row, column: str, cell: Any, kinds: str) -> np.ndarray:
    values = np.asarray(cell) if isinstance(cell, list) and not any(isinstance(x, list) for x in cell) else None
    if values is None or values.size == 0 or values.dtype.kind not in kinds:
        what = "whole numbers" if kinds == "iu" else "numbers"
        raise row.error(column, f"it must be a list of {what}, not empty")
    return values
