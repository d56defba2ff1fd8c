"""Where the answer stands in a response.

After the thinking: the last `\\boxed{}`, else the last "Answer: ...", as the s1 authors' evaluation reads it
(simplescaling/s1, `eval/lm-evaluation-harness/lm_eval/tasks/aime/utils.py`), else "the answer is ...". Never a guess,
such as the last number: a response that states no answer has none. Every search is linear in the length of the text.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

Kind = Literal["math", "choice", "integer"]

ANSWER_HEADERS = ("<|im_start|>answer", "</think>")
THINKING_STARTS = ("<|im_start|>think", "<think>")
# A chat template's, <|im_end|> or DeepSeek's with wide bars: the answer ends before it.
SPECIAL_TOKEN = re.compile(r"<[|\uff5c][^<>|\uff5c\s]{1,40}[|\uff5c]>")

BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*")
BRACE = re.compile(r"\\.|[{}]", re.DOTALL)  # `\{` and `\}` are literal
UNBRACED = re.compile(r"[^\s$.,;{}\\]+")
# Between two boxes that are one answer: \boxed{1} and \boxed{2}
JOINT = re.compile(r"(?:\s|[$.,;{}]|\\[()\[\]]|\\text|and|or)*")
MAX_BOXES = 32  # in one answer

STATED = re.compile(
    r"\banswer[*_ ]*:"  # Answer: 5   **Answer:** 5   **Final Answer**: 5
    r"|^[#*_ ]*(?:final )?answer[*_ ]*$"  # ### Final Answer (a line by itself)
    r"|####",  # GSM8K
    re.IGNORECASE | re.MULTILINE,
)
SAID = re.compile(r"\banswer(?: to [^.\n]{1,100})? is\b:?", re.IGNORECASE)
# A dollar before "18 per day" is money.
FORMULA = r"(?:\$\$.+?\$\$|\$(?!\d[^$\n]* [a-z]{3})[^$\n]+\$|\\\(.+?\\\)|\\\[.+?\\\])"
FORMULAS = re.compile(rf"{FORMULA}(?:\s*(?:,|,?\s*and|,?\s*or)\s*{FORMULA})*", re.DOTALL)
SENTENCE = re.compile(r"[^\n]*?(?=\.(?:\s|$)|\n|$)")
MAX_STATED = 500  # characters that are read after "Answer:"

MARKUP = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox)\s*\{|\\[ ,;!()\[\]]|[*$_{}]")
LETTER = re.compile(
    r"(?:(?:[Oo]ption|[Cc]hoice|[Aa]nswer)\s+)?"
    # Not the first of several: "(A) and (C)", "A, C".
    r"(?:\(([A-Za-z])\)(?!\s*(?:,|&|and|or)\s*\(?[A-Z]\b)|([A-Z])(?:[).:]|\s+[-\u2013\u2014]\s|,\s+(?!and|or)[a-z])|([A-Za-z])$)"
)
CORRECT_LETTER = re.compile(
    r"\b(?:[Cc]orrect|[Rr]ight|[Bb]est) (?:option|choice|answer|statement)(?: is)?:?[\s*$]*\(?([A-Z])\b"
    r"|\b(?:[Oo]ption|[Cc]hoice)[\s*$]+\(?([A-Z])\)?[\s*$]+is (?:the )?(?:correct|right|best|answer)"
)
IN_PARENTHESES = re.compile(r"\(([A-Z])\)")


def extract_answer(response: str, kind: Kind = "math") -> str | None:
    """The answer that a response states, as it is written there; None where it states none.

    Thinking is not read: what counts is the text after the last s1 answer header or `</think>`. A response whose
    thinking was opened and never closed has no answer, nor has one that breaks off within its last `\\boxed{`.

    Args:
        kind: "choice" gives a letter where one can be told, else the text that stands in its place; "math" and
            "integer" are read alike.
    """
    text = _after_thinking(response)
    if text is None:
        return None
    if BOX.search(text):
        boxed = _last_box(text, join=kind != "choice")
        return boxed if boxed is None or kind != "choice" else read_letter(boxed) or boxed
    return _stated_choice(text) if kind == "choice" else _last_stated(text, STATED) or _last_stated(text, SAID)


def read_letter(text: str) -> str | None:
    """The letter that a short text gives: "C", "(C)", "\\text{(C)}", "C. because", "option C"; None for other text."""
    match = LETTER.match(MARKUP.sub("", text[:MAX_STATED]).strip())
    return next(group for group in match.groups() if group).upper() if match else None


def choice_letter(text: str, choices: Sequence[str]) -> str | None:
    """The letter of the one choice whose text this is, case and markup aside; None where none or several have it."""
    wanted = _plain(text)
    found = [i for i, choice in enumerate(choices) if _plain(choice) == wanted]
    return chr(ord("A") + found[0]) if len(found) == 1 else None


def _plain(text: str) -> str:
    return " ".join(MARKUP.sub(" ", text).casefold().split()).strip(" .")


def _after_thinking(response: str) -> str | None:
    position, header = max((response.rfind(header), header) for header in ANSWER_HEADERS)
    if position >= 0:
        response = response[position + len(header) :]
    elif any(start in response for start in THINKING_STARTS):
        return None
    return SPECIAL_TOKEN.split(response, maxsplit=1)[0]


def _last_box(text: str, join: bool) -> str | None:
    """The content of the last box, with `join` after that of the boxes before it where only "," or "and" lies between.

    None where the last box is not closed.
    """
    contents: list[str] = []
    next_start = len(text)
    for box in list(BOX.finditer(text))[: -MAX_BOXES - 1 : -1]:
        end = _argument_end(text, box.end())
        if end is None or end > next_start or (contents and not JOINT.fullmatch(text, end, next_start)):
            break
        content = text[box.end() : end]
        content = (content[1:-1] if content.startswith("{") else content).strip()
        if content not in contents:
            contents.insert(0, content)
        next_start = box.start()
        if not join:
            break
    return ", ".join(contents) or None


def _argument_end(text: str, position: int) -> int | None:
    """Where the argument ends that begins at a position: a group in braces, or (\\boxed 5) one run of characters."""
    if not text.startswith("{", position):
        run = UNBRACED.match(text, position)
        return run.end() if run else None
    depth = 0
    for match in BRACE.finditer(text, position):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0:
            return match.end()
    return None


def _last_stated(text: str, pattern: re.Pattern[str]) -> str | None:
    for place in reversed([match.end() for match in pattern.finditer(text)]):
        if answer := _expression_at(text, place):
            return answer
    return None


def _expression_at(text: str, place: int) -> str:
    """What stands at a place: one or several formulas in their delimiters, or the words to the end of the sentence."""
    text = text[place : place + MAX_STATED].lstrip(" \t\r\n*_:")
    match = FORMULAS.match(text) or SENTENCE.match(text)
    return match[0].strip(" \t*_") if match else ""


def _stated_choice(text: str) -> str | None:
    stated = [(match.start(), _expression_at(text, match.end())) for match in STATED.finditer(text)]
    stated += [(match.start(), _expression_at(text, match.end())) for match in SAID.finditer(text)]
    letters = [(start, letter) for start, answer in stated if (letter := read_letter(answer))]
    letters += [(match.start(), match[1] or match[2]) for match in CORRECT_LETTER.finditer(text)]
    if letters:
        return max(letters)[1]
    if answers := [(start, answer) for start, answer in stated if answer]:
        return max(answers)[1]
    last_line = text.rstrip().rpartition("\n")[2]
    in_parentheses = set(IN_PARENTHESES.findall(last_line))
    return read_letter(last_line) or (in_parentheses.pop() if len(in_parentheses) == 1 else None)
