"""ThinkingBudget: every impossible value is refused by name, and extensions become ids."""

from types import SimpleNamespace
from typing import Any

import pytest

from s1engine.thinking import ThinkingBudget, resolve_extensions


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_tokens": -1}, r"max_tokens=-1 .*None or an integer from 0"),
        ({"max_tokens": 1.5}, r"max_tokens=1\.5"),
        ({"max_tokens": True}, r"max_tokens=True"),
        ({"max_tokens": 2**31}, r"max_tokens=2147483648"),
        ({"min_tokens": None}, r"min_tokens=None"),
        ({"ignore_end": -2}, r"ignore_end=-2"),
        ({"grace_tokens": "3"}, r"grace_tokens='3'"),
        ({"min_answer_tokens": -1}, r"min_answer_tokens=-1"),
        ({"scope": "block"}, r"scope='block' .*'total', 'segment'"),
        ({"on_budget": "stop"}, r"on_budget='stop' .*'force_end', 'truncate'"),
        ({"extensions": "Wait"}, r"extensions='Wait'"),
        ({"extensions": [""]}, r"extensions holds an empty item"),
        ({"extensions": [[]]}, r"extensions holds an empty item"),
        ({"extensions": [7]}, r"extensions holds 7"),
        ({"extensions": [[-7]]}, r"extensions holds -7"),
        ({"extensions": (), "ignore_end": 1}, r"extensions is empty although ignore_end=1"),
        ({"extensions": (), "min_tokens": 5}, r"extensions is empty although min_tokens=5"),
        ({"format": 3}, r"format=3"),
    ],
)
def test_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ThinkingBudget(**fields)


def test_budgets_are_values() -> None:
    assert ThinkingBudget(extensions=[[1, 2], "Wait"]) == ThinkingBudget(extensions=((1, 2), "Wait"))
    assert len({ThinkingBudget(max_tokens=3), ThinkingBudget(max_tokens=3)}) == 1


def test_extensions_become_ids() -> None:
    tokenizer = SimpleNamespace(encode=lambda text, add_special_tokens: [ord(c) for c in text] if text != "?" else [])
    budget = ThinkingBudget(ignore_end=1, extensions=["ab", [5]])
    assert resolve_extensions(budget, tokenizer) == ((97, 98), (5,))
    assert resolve_extensions(ThinkingBudget(extensions=["ab"])) == ()  # no end is ever ignored
    with pytest.raises(ValueError, match=r"extensions='\?'.*no token"):
        resolve_extensions(ThinkingBudget(min_tokens=1, extensions=["?"]), tokenizer)
