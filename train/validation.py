"""Validation by generation: the model in training answers questions through the engine, under thinking budgets.

Below ZeRO 3 the engine reads the trainer's own parameters: nothing is copied, and nothing has to be brought up to date.
ZeRO 3 has no rank that holds them all: there the first rank keeps a model of its own, which is overwritten in place.
"""

from __future__ import annotations

import time
from typing import Any

import torch

from s1engine import LLM, SamplingParams, ThinkingBudget
from s1engine.bench.reasoning.grading import Grader
from s1engine.models import CausalLM
from s1engine.train.export import named_tensors
from s1engine.train.rows import Columns, read_rows
from s1engine.train.sft_config import SftConfig

LARGEST_BATCH = 64


def read_questions(config: SftConfig) -> tuple[list[str], list[str]]:
    """Questions and their answers. Raises ValueError with file, line and column where there is none."""
    rows, _ = read_rows(config.validation_data)
    columns = Columns(question=config.columns.get("question"))
    questions, answers = [], []
    for row in rows:
        column = columns.resolve("question", row)
        if column is None:
            raise ValueError(f"{row.place}: no column for the question: name it by columns = {{question = ...}}")
        questions.append(row.text(column))
        answers.append(row.text("answer"))
    return questions, answers


class Validation:
    """Questions with answers, read once. The first rank generates, while the others wait."""

    def __init__(self, config: SftConfig, model: CausalLM, tokenizer: Any, stage: int, rank: int) -> None:
        self.config, self.model, self.tokenizer, self.rank = config, model, tokenizer, rank
        self.partitioned = stage >= 3
        self._own: LLM | None = None
        self.questions, self.answers = read_questions(config)

    def run(self) -> dict[str, Any]:
        """Accuracy and thinking tokens under each budget; on ranks but the first an empty dict."""
        start = time.perf_counter()
        llm, copied = self._engine()
        found: dict[str, Any] = {}
        if llm is not None:
            found = {"weights_seconds": round(copied, 3)} if self.partitioned else {}
            budgets: list[int | None] = [*self.config.validation_budgets] or [None]
            for budget in budgets:
                found |= self._under(llm, budget)
            found["validation_seconds"] = round(time.perf_counter() - start, 2)
        torch.distributed.barrier()
        return found

    def _engine(self) -> tuple[LLM | None, float]:
        """(An engine on the newest weights, on the first rank; seconds that copying them took)."""
        options = {"tokenizer": self.tokenizer, "max_num_seqs": LARGEST_BATCH, "seed": self.config.seed}
        if not self.partitioned:
            return (LLM(self.model, **options) if self.rank == 0 else None), 0.0
        if self.rank == 0 and self._own is None:
            self._own = LLM(self.config.model, dtype=self.config.dtype, **options)
        start = time.perf_counter()
        for name, tensor in named_tensors(self.model, keep=self.rank == 0):
            if self._own is not None:
                self._own.update_weights({name: tensor})
        return self._own, time.perf_counter() - start

    def _under(self, llm: LLM, budget: int | None) -> dict[str, Any]:
        config = self.config
        params = SamplingParams(
            max_tokens=config.validation_max_tokens,
            temperature=config.validation_temperature,
            thinking=ThinkingBudget(max_tokens=budget),
            skip_special_tokens=False,  # the grader looks for the header of the answer
        )
        prompts = [[{"role": "user", "content": question}] for question in self.questions]
        outputs = [output.outputs[0] for output in llm.chat(prompts, params, use_tqdm=False)]
        with Grader() as grader:
            grades = grader.grade([output.text for output in outputs], self.answers)
        readable = [grade for grade in grades if grade.correct is not None]
        thinking = [output.thinking.num_tokens for output in outputs if output.thinking is not None]
        name = "natural" if budget is None else str(budget)
        return {
            f"accuracy_{name}": round(sum(bool(g.correct) for g in readable) / max(1, len(readable)), 4),
            f"thinking_tokens_{name}": round(sum(thinking) / max(1, len(thinking)), 1),
        }
