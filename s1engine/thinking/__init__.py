"""Thinking budgets, from their delimiters to the machine that holds a model to them.

`formats` and `named_formats` (delimiters), `budget` (limits), `machine` (the rules: reference and `simulate`),
`program` (the rules as integer tables, laid out by `layout`), `stepper` (steps many requests at once), `split` (the
thinking in outputs that had no budget).
"""

from s1engine.thinking.budget import ThinkingBudget, resolve_extensions
from s1engine.thinking.formats import ThinkingFormat, Trigger
from s1engine.thinking.machine import Machine, Step, Trace, simulate
from s1engine.thinking.named_formats import FORMAT_NAMES, resolve_format
from s1engine.thinking.split import Splitter, ThinkingSpans, split_thinking

__all__ = [
    "FORMAT_NAMES",
    "Machine",
    "Splitter",
    "Step",
    "ThinkingBudget",
    "ThinkingFormat",
    "ThinkingSpans",
    "Trace",
    "Trigger",
    "resolve_extensions",
    "resolve_format",
    "simulate",
    "split_thinking",
]
