"""The papers' prompts: the text of the user's turn. The chat template is applied where it is run.

s1: Muennighoff et al., arXiv 2501.19393; its strings stand in simplescaling/s1 under
`eval/lm-evaluation-harness/lm_eval/tasks/`. L1: Aggarwal and Welleck, arXiv 2503.04697; cmu-l3/l1, `scripts/data/`.
"""

from __future__ import annotations

from string import ascii_uppercase
from typing import Literal, get_args

from s1engine.bench.reasoning.l1_wording import EXACT, INSTRUCTION, MAX
from s1engine.bench.reasoning.tasks import Problem, lettered

Style = Literal["plain", "s1", "l1"]

L1_BOXED_LETTER = r"Let's think step by step and output the final answer (eg, A, B, C, D) within \boxed{}."


def user_turn(problem: Problem, style: Style, suffix: str = "") -> str:
    """What the user says: the problem in a paper's wording, and a suffix that asks for a length of thinking.

    "plain" is `problem.question` and nothing else, for models with a format of their own.

    "s1" adds nothing to a question either (`aime/utils.py` and `openai_math/utils.py`: QUERY_TEMPLATE), and writes
    choices as "A) ..." after an empty line (`gpqa/openai/utils.py`; LSAT and MMLU, which s1 does not report, likewise).

    "l1" asks for a box: after a space (`deepscaler_dataset.py`: the training prompts, and those of AIME24, AMC, MATH500
    and OlympiadBench), after the choices where there are some (`generate_gpqa.py`, `generate_mmlu.py`). Two scripts
    differ, and are not followed: `generate_aime.py` (AIME25) has an empty line instead of the space, and
    `generate_lsat.py` gives the choices in AGIEval's running text.

    Raises:
        ValueError: an unknown style.
    """
    if style not in get_args(Style):
        raise ValueError(f"style={style!r}: give one of {', '.join(get_args(Style))}")
    text = problem.question
    if style == "s1" and problem.choices:
        choices = zip(ascii_uppercase, problem.choices, strict=False)
        text = f"{problem.stem}\n\n" + "\n".join(f"{letter}) {choice}" for letter, choice in choices)
    elif style == "l1":
        text = f"{problem.question} {INSTRUCTION}"
        if problem.choices:
            text = f"{problem.stem}\n\nOptions:\n{lettered(problem.choices)}\n\n\n{L1_BOXED_LETTER}"
    return text + suffix


def token_conditional(tokens: int) -> str:
    """s1's suffix for token-conditional control (PROMPTTOKEN in the `utils.py` files; paper, Table 12)."""
    return f"\n\nThink for up to {_positive('tokens', tokens)} tokens."


def step_conditional(steps: int) -> str:
    """s1's suffix for step-conditional control (PROMPTSTEP; Table 13)."""
    return f"\n\nThink for up to {_positive('steps', steps)} steps."


def class_conditional(length: Literal["short", "long"]) -> str:
    """s1's suffix for class-conditional control (PROMPTSHORT, PROMPTLONG; Table 14)."""
    if length == "short":
        return "\n\nAnswer after a short amount of thinking. Do not spend excessive time double-checking your work."
    if length == "long":
        return (
            "\n\nAnswer after a long amount of thinking. If you feel like you are finished early, spend the extra time "
            "trying to double-check your work until you are absolutely sure that you have the correct answer."
        )
    raise ValueError(f"length={length!r}: give 'short' or 'long'")


def l1_exact(tokens: int) -> str:
    """L1-Exact's suffix."""
    return EXACT.format(target=_positive("tokens", tokens))


def l1_max(tokens: int) -> str:
    """L1-Max's suffix (in the authors' code that of a negative `num_tokens`)."""
    return MAX.format(target=_positive("tokens", tokens))


def _positive(name: str, number: int) -> int:
    if number < 1:
        raise ValueError(f"{name}={number}: give at least 1")
    return number
