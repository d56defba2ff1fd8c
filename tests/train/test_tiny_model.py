"""The shipped tiny model: small, loadable by plain transformers, and it gets more right the longer it thinks."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase, Qwen2ForCausalLM

from s1engine.train.tiny import MODEL_DIR, problems
from s1engine.train.tiny.tokenizer import MAX_LENGTH, build_tokenizer
from s1engine.train.tiny.traces import CLOSE
from s1engine.train.tiny.validate import BudgetForcing, Row, Score, decode, score

MEBIBYTE = 1 << 20


@pytest.fixture(scope="module")
def model() -> Qwen2ForCausalLM:
    return AutoModelForCausalLM.from_pretrained(MODEL_DIR).eval()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(MODEL_DIR)


def test_the_folder_is_complete_and_small() -> None:
    sizes = {path.name: path.stat().st_size for path in Path(MODEL_DIR).iterdir()}
    needed = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert needed | {"README.md"} <= sizes.keys()
    assert sizes["model.safetensors"] <= 4 * MEBIBYTE
    assert sum(sizes.values()) <= 4.2 * MEBIBYTE


def test_configuration_suits_the_tokenizer(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    assert isinstance(model, Qwen2ForCausalLM)
    assert model.dtype == torch.float32
    assert model.config.vocab_size == len(tokenizer)
    assert model.config.max_position_embeddings == MAX_LENGTH
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert all(p.isfinite().all() for p in model.parameters())


def test_shipped_tokenizer_is_the_one_the_code_builds(tokenizer: PreTrainedTokenizerBase) -> None:
    built = build_tokenizer()
    assert tokenizer.get_vocab() == built.get_vocab()
    assert tokenizer.chat_template == built.chat_template


def test_thinking_longer_is_worth_it(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    """Greedy, on the validation split, by margins far wider than the sampling error of 100 problems (0.1)."""
    validation = problems("validation", 100)
    budgets = [{"cap": 16}, {"cap": 48}, {"ignore_end": 0}, {"ignore_end": 1}, {"ignore_end": 4}]
    groups = [[Row(p, **budget) for p in validation] for budget in budgets]
    decode(model, tokenizer, [row for rows in groups for row in rows], temperature=0)
    short, middle, once, twice, often = (score(tokenizer, rows).accuracy for rows in groups)
    assert short + 0.05 < middle < once < twice - 0.1
    assert often > twice + 0.1
    assert often > 0.85


def test_budget_forcing_of_one_row(tokenizer: PreTrainedTokenizerBase) -> None:
    """The rule that validation uses, token by token, against what the engine's would write."""
    forcing = BudgetForcing(tokenizer)
    problem = problems("validation", 1)[0]

    def forced(row: Row, text: str) -> str:
        for token in tokenizer.encode(text):
            forcing.step(row, token)
        while row.queue:
            forcing.step(row, tokenizer.pad_token_id)
        return tokenizer.decode(row.tokens)

    close = "".join(CLOSE)
    assert forced(Row(problem), "\na:1+2=3\n<|im_start|>") == "\na:1+2=3\n" + close
    assert forced(Row(problem, ignore_end=1), "\n<|im_start|>\nok\n<|im_end|>") == "\nWait\nok\n" + close
    assert forced(Row(problem, cap=4), "\na:1+") == "\na:1\n" + close
    assert forced(Row(problem, cap=3, ignore_end=1), "\na\n<|im_start|>") == "\na\n" + close
    row = Row(problem, cap=2, ignore_end=9)
    assert forced(row, "\n<|im_start|>") == "\n" + close
    assert (row.thinking_tokens, row.waits) == (1, 0)


def test_score_has_the_normal_interval(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [Row(p) for p in problems("validation", 4)]
    for row, right in zip(rows, (True, True, True, False), strict=True):
        answer = row.problem.answer if right else str((int(row.problem.answer) + 1) % 10)
        row.tokens, row.thinking_tokens = tokenizer.encode(f"Final Answer: {answer}"), 8
    result = score(tokenizer, rows)
    assert result == Score(0.75, pytest.approx(1.96 * (0.75 * 0.25 / 4) ** 0.5), 8)
