"""Accuracy on the validation split under thinking budgets, with plain `transformers` and no engine.

A few lines of budget forcing, enough to watch a training run. The engine's own measurements are made on the test split,
which nothing here reads.
"""

import math
from dataclasses import dataclass, field

import torch
from transformers import DynamicCache, PreTrainedTokenizerBase, Qwen2ForCausalLM

from s1engine.train.tiny.task import Problem, grade
from s1engine.train.tiny.traces import CLOSE

CAPS = (8, 16, 24, 32, 40, 48, 56, 64)
IGNORED_ENDS = (0, 1, 2, 4)
UNCAPPED = 320
ANSWER_TOKENS = 3


@dataclass
class Row:
    """One problem under one budget: at most `cap` thinking tokens, the first `ignore_end` ends replaced by "Wait"."""

    problem: Problem
    cap: int = UNCAPPED
    ignore_end: int = 0
    tokens: list[int] = field(default_factory=list)
    queue: list[int] = field(default_factory=list)
    thinking_tokens: int = 0
    waits: int = 0
    thinking: bool = True
    left: int = 0  # tokens of the answer still to come, once thinking has ended

    @property
    def done(self) -> bool:
        return not self.thinking and self.left == 0


@dataclass(frozen=True)
class Score:
    """Accuracy with the half-width of its 95% interval (normal approximation), and mean thinking tokens."""

    accuracy: float
    interval: float
    thinking_tokens: float

    def __str__(self) -> str:
        return f"{self.accuracy:.3f} ±{self.interval:.3f} ({self.thinking_tokens:.0f} tokens)"


class BudgetForcing:
    """The rule for one token of one row, over the ids of the tiny tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.newline, self.wait = tokenizer.encode("\n")[0], tokenizer.encode("Wait")[0]
        self.close = tokenizer.encode("".join(CLOSE))
        self.ends = {self.close[0], tokenizer.eos_token_id}

    def step(self, row: Row, sampled: int) -> int:
        """Appends what stands at this position, given the `sampled` token, and returns it."""
        if row.done:
            return sampled
        token = row.queue.pop(0) if row.queue else sampled
        if not row.thinking:
            row.left -= 1
        elif token in self.ends and row.waits < row.ignore_end and row.thinking_tokens + 1 < row.cap:
            token, row.waits = self.wait, row.waits + 1
            row.thinking_tokens += 1
        elif token in self.ends or row.thinking_tokens >= row.cap:
            queue = list(self.close)
            if token not in self.ends and (not row.tokens or row.tokens[-1] != self.newline):
                queue.insert(0, self.newline)
            token, row.queue, row.thinking, row.left = queue[0], queue[1:], False, len(queue) - 1 + ANSWER_TOKENS
        else:
            row.thinking_tokens += 1
        row.tokens.append(token)
        return token


@torch.inference_mode()
def decode(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerBase, rows: list[Row], temperature: float) -> None:
    """Runs all `rows` to their end in lockstep; fills in their `tokens`. `temperature` 0 is greedy."""
    forcing = BudgetForcing(tokenizer)
    generator = torch.Generator().manual_seed(0)
    prompts = [tokenizer.encode(row.problem.prompt) for row in rows]
    width = max(map(len, prompts))
    ids = torch.tensor([[tokenizer.pad_token_id] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    position = (mask.cumsum(1) - 1).clamp(min=0)
    cache = DynamicCache(config=model.config)
    alive = list(range(len(rows)))
    while alive:
        out = model(ids, attention_mask=mask, position_ids=position, past_key_values=cache, logits_to_keep=1)
        logits = out.logits[:, -1].float()
        for i, r in enumerate(alive):
            if rows[r].tokens and rows[r].tokens[-1] == forcing.wait:
                logits[i, list(forcing.ends)] = -math.inf
        if temperature == 0:
            sampled = logits.argmax(-1)
        else:
            sampled = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)[:, 0]
        ids = torch.tensor([[forcing.step(rows[r], x)] for r, x in zip(alive, sampled.tolist(), strict=True)])
        mask = torch.cat([mask, mask.new_ones(len(alive), 1)], 1)
        position = position[:, -1:] + 1
        keep = [i for i, r in enumerate(alive) if not rows[r].done]
        # Dropping finished rows copies the cache: worth it only once in a while.
        if len(keep) < 0.8 * len(alive) or not keep:
            kept = torch.tensor(keep, dtype=torch.long)
            alive, ids, mask, position = [alive[i] for i in keep], ids[kept], mask[kept], position[kept]
            cache.batch_select_indices(kept)


def score(tokenizer: PreTrainedTokenizerBase, rows: list[Row]) -> Score:
    """Grades decoded rows."""
    texts = tokenizer.batch_decode([row.tokens for row in rows])
    right = [grade(text, row.problem) for text, row in zip(texts, rows, strict=True)]
    p = sum(right) / len(rows)
    return Score(p, 1.96 * math.sqrt(p * (1 - p) / len(rows)), sum(row.thinking_tokens for row in rows) / len(rows))


def curves(
    model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerBase, validation: list[Problem], temperature: float
) -> tuple[dict[int, Score], dict[int, Score]]:
    """Accuracy by cap on thinking tokens (no end ignored), and by the number of ignored ends (no cap)."""
    by_cap = {cap: [Row(p, cap=cap) for p in validation] for cap in CAPS}
    by_wait = {n: [Row(p, ignore_end=n) for p in validation] for n in IGNORED_ENDS}
    was_training = model.training
    model.eval()
    decode(model, tokenizer, [row for rows in (*by_cap.values(), *by_wait.values()) for row in rows], temperature)
    model.train(was_training)
    return (
        {cap: score(tokenizer, rows) for cap, rows in by_cap.items()},
        {n: score(tokenizer, rows) for n, rows in by_wait.items()},
    )
