"""Samples from which the tiny reasoner learns what a request for a length means, before it is rewarded for it.

Each problem is decoded once, by a sweep over caps and ignored ends, and gives responses of many lengths. One or two of
them follow a prompt that asks for the length they have (or, of L1-Max, for a little more). The paper found that this
alone does not teach a large model to keep to lengths (arXiv 2503.04697, A.6); here it makes the rollouts of a group
differ in length, without which a reward for length has nothing to choose from.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from s1engine import LLM, CompletionOutput, SamplingParams
from s1engine.train.length_prompts import suffix
from s1engine.train.tiny import MODEL_DIR, Problem, grade, problems

EXAMPLE = "example: python -m s1engine.train.tiny.lengths --out build/tiny/lengths.jsonl"
CAPS = (0, 8, 16, 24, 32, 40, 48)
IGNORED_ENDS = (0, 1, 2, 3, 4)
MAX_TOKENS = 200
# A Max prompt asks for up to so many tokens more than the response has.
SLACK = 12


def samples(llm: LLM, chosen: Sequence[Problem], seed: int) -> Iterator[dict[str, Any]]:
    """Rows of token ids for `s1engine sft`, template "tokens": the response has weight, the prompt has none."""
    tokenizer = llm.get_tokenizer()
    rng = random.Random(seed)
    params = [SamplingParams(seed=seed + i, max_tokens=MAX_TOKENS) for i in range(len(chosen))]
    prompts = [problem.prompt for problem in chosen]
    swept = llm.sweep(prompts, budgets=CAPS, ignore_ends=IGNORED_ENDS, sampling_params=params)
    for problem, output in zip(chosen, swept, strict=True):
        ended = [completion for completion in output.outputs if completion.finish_reason == "stop"]
        for completion in pick(ended, problem, rng):
            length = len(completion.token_ids)
            is_max = rng.random() < 0.5
            asked = suffix("max", length + rng.randint(0, SLACK)) if is_max else suffix("exact", length)
            turns = [{"role": "user", "content": problem.question + asked}]
            ids = tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False, add_generation_prompt=True)
            yield {
                "input_ids": [*ids, *completion.token_ids],
                "weights": [0.0] * len(ids) + [1.0] * length,
            }


def pick(ended: Sequence[CompletionOutput], problem: Problem, rng: random.Random) -> list[CompletionOutput]:
    """One of those that are right, and one of all: short ones are rarely right, and have to be there as well."""
    right = [completion for completion in ended if grade(completion.answer, problem)]
    picked = [rng.choice(kind) for kind in (right, ended) if kind]
    return list({tuple(completion.token_ids): completion for completion in picked}.values())


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=MODEL_DIR, help="default: the shipped model")
    parser.add_argument("--problems", type=int, default=8000, help="training problems (8000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="JSONL file to write")
    args = parser.parse_args(argv)
    rows = list(samples(LLM(str(args.model)), problems("train", args.problems), args.seed))
    partial = args.out.with_name(args.out.name + ".partial")  # what has the name is whole: l1.py goes by it
    partial.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    partial.replace(args.out)
    print(f"{args.out}: {len(rows)} samples of {args.problems} problems")


if __name__ == "__main__":
    main()
