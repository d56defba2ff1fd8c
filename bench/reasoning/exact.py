"""Answers that are compared without computer algebra: equal strings, words, and numbers as exact rationals.

Most answers of AIME, GSM8K and MATH are decided here, in microseconds and in the caller; the others go to math-verify
(`grading_worker`). Two conventions are as there: units are dropped, a percent sign too (25 % is 25, and it is 0.25),
and a decimal may be rounded, to six significant digits.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

MAX_DIGITS = 400  # of a number that is compared here
ROUNDING = Fraction(1, 10**6)  # of the larger number, where one of the two is a decimal

CHARACTERS = str.maketrans(
    {chr(code): None for code in (*range(0x20), 0x7F, 0x200B) if not chr(code).isspace()}
    | {"\u2212": "-", "\u2013": "-", "\uff0c": ",", "°": "^\\circ"}  # minus, en dash, wide comma
)
SPELLINGS = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        (r"\\?\$", ""),
        (r"(?<!\\)\\[()\[\]]", " "),
        (r"\\(?:left|right)(?![A-Za-z])\s*\.?", ""),
        (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
        (r"\\!\s*|\\displaystyle(?![A-Za-z])", ""),
        (r"\{,\}", ","),
        (r"\\(?:[,;: ]|q?quad(?![A-Za-z]))|~", " "),
        (r"\\%", "%"),
        (r"([\^_])\{(\w|\\[A-Za-z]+)\}", r"\1\2"),
        # Spaces mean something between digits ("1 1/2" is not 11/2), between words, and before a word ("18 dollars").
        (r"(?<=\d)\s+(?=\d|[a-z]{4})|(?<=[A-Za-z])\s+(?=[A-Za-z])", "\0"),
        (r"\s+", ""),
        ("\0", " "),
    ]
]
TEXT = r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox)\{([^{}]*)\}"
WRAPPED = re.compile(TEXT)
LETTER_IN_PARENTHESES = re.compile(r"\(([A-Z])\)")
WORDS = re.compile(r"[A-Za-z][A-Za-z' -]+")

UNIT = re.compile(rf"(?:\^\\circ|{TEXT}(?:\^\d)?)$")
PERCENT = re.compile(r"(?:%|percent|\\(?:text|mathrm)\{(?:%|percent)\})$")
# "18 dollars per day", but no factor ("3 million") and no operation ("3 choose 2").
NAMED_UNIT = re.compile(
    r" (?!hundred|thousand|million|billion|trillion|dozen|half|halves|third|quarter|choose|factorial|sqrt|plus|minus|"
    r"times|squared|cubed)[a-z]{4,}(?:[ /-][A-Za-z]+)*$"
)
SEVERAL_CHOICES = re.compile(r"\(?[A-H](?:(?:[,; ]|and|\\text|[{}()])*[A-H]){1,7}\)?")
SEPARATOR = re.compile(r",?(?:\\text\{(?:and|or)\}|and|or)|,")
IN_BASE = re.compile(r"(\d+)(?:_(\d|\{\d+\}))?")
# math-verify skips these in silence: it takes 3 (mod 4) for 3 (mod 6), and one case of several for all.
SKIPPED = re.compile(r"\\(?:equiv|pmod|mid|[lc]?dots|forall|begin\{cases\})(?![A-Za-z])")
WORD = re.compile(r"(?<![A-Za-z\\])[A-Za-z]{4,}")
# A quantity that an answer may name: x, f(n), a_{25}, AB, (x, y)
NAME = r"(?:[A-Za-z]{1,3}|\\[A-Za-z]+)(?:_(?:\w|\{[^{}]*\}))?'*(?:\([^()]*\))?"
NAMES = re.compile(rf"{NAME}|\({NAME}(?:,{NAME})+\)")
# One with other relations, or several, is no plain equation.
RELATIONS = re.compile(
    r"[<>;]|\\(?:[lg]t|[lgn]eq?|[lg]eqslant|in|notin|approx|sim|equiv|mid|to|q?quad)(?![A-Za-z])|\b(?:and|or)\b"
)
NUMBER = re.compile(
    r"(?P<sign>[+-]?)(?:"
    r"(?P<decimal>(?:\d{1,3}(?:[, ]\d{3})+|\d+)(?:\.\d+)?|\.\d+)"
    r"|(?P<whole>\d+)?\\frac(?P<over>\{-?\d+\}|\d)(?P<under>\{-?\d+\}|\d)"
    r"|(?:(?P<plain_whole>\d+) )?(?P<plain_over>\d+)/(?P<plain_under>\d+))"
)


@dataclass(frozen=True)
class Number:
    """A number as it is written.

    Args:
        value: without the percent sign: 25 for 25 %.
        decimal: it has a decimal point, so it may be rounded.
        grouped: its thousands stand apart: 100,200 may also be two numbers.
    """

    value: Fraction
    percent: bool = False
    decimal: bool = False
    grouped: bool = False


def compare(gold: str, answer: str) -> tuple[bool | None, str]:
    """Whether an answer equals the gold answer, and why: "exact" or "numeric".

    (None, "bad_gold") for a gold answer that math-verify would misread, (None, "undecided") for what it should decide.
    """
    gold_text, answer_text = normalise(gold), normalise(answer)
    if not gold_text:
        return None, "bad_gold"
    if gold_text == answer_text:
        return True, "exact"
    if SKIPPED.search(gold_text):
        return None, "bad_gold"
    if SEVERAL_CHOICES.fullmatch(gold_text) and SEVERAL_CHOICES.fullmatch(answer_text):
        return set(re.findall("[A-H]", gold_text)) == set(re.findall("[A-H]", answer_text)), "exact"
    gold_words, answer_words = WORDS.fullmatch(gold_text), WORDS.fullmatch(answer_text)
    if gold_words and answer_words and gold_text.casefold() == answer_text.casefold():
        return True, "exact"
    gold_number, answer_number = read_number(gold_text), read_number(answer_text)
    if gold_number is None and len(WORD.findall(gold_text)) >= 3:  # prose
        return None, "bad_gold"
    if gold_words and answer_words and WRAPPED.search(gold):
        # math-verify would read words as products of letters, and "on" as "no". Letters without \text may be products.
        return False, "exact"
    gold_in_base, answer_in_base = IN_BASE.fullmatch(gold_text), IN_BASE.fullmatch(answer_text)
    if gold_in_base and answer_in_base and (gold_in_base[2] or answer_in_base[2]):
        same_base = gold_in_base[2] == answer_in_base[2] or None in (gold_in_base[2], answer_in_base[2])
        return same_base and int(gold_in_base[1]) == int(answer_in_base[1]), "exact"
    if gold_number is None and answer_number is None:
        golds, answers = _numbers(gold_text), _numbers(answer_text)
        return (_same_values(golds, answers), "numeric") if golds and answers else (None, "undecided")
    if gold_number is None or answer_number is None:
        return None, "undecided"
    if same_value(gold_number, answer_number):
        return True, "numeric"
    return (None, "undecided") if gold_number.grouped or answer_number.grouped else (False, "numeric")


def right_sides(gold: str, answer: str) -> tuple[str, str]:
    """Both without the name of what is asked for: x = 5 and 5, f(n) = 2n and 2n, AB = 3 + 4 = 7 and 7.

    A gold answer that is an equation itself stays as it is, and so does one that names another quantity: y = 5.
    """
    golds, answers = _sides(gold), _sides(answer)
    named = len(golds) == 2 and NAMES.fullmatch(normalise(golds[0])) is not None
    if len(golds) == 1 or len(golds) > 2 or (named and len(answers) == 1):
        return golds[-1], answers[-1]
    if named and normalise(golds[0]) == normalise(answers[0]):
        return golds[-1], answers[-1]
    return gold, answer


def _sides(text: str) -> list[str]:
    """The sides of an equation or a chain of them; the text alone where it is none, or several."""
    if RELATIONS.search(text):
        return [text]
    sides, start, depth = [], 0, 0
    for i, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if depth == 0 and character == ",":
            return [text]
        if depth == 0 and character == "=":
            sides.append(text[start:i].strip(" $."))
            start = i + 1
    return [*sides, text[start:].strip(" $.")] if sides else [text]


def normalise(text: str) -> str:
    """One spelling for what LaTeX and habit spell in several ways; what means something else stays different."""
    text = text.translate(CHARACTERS)
    for pattern, replacement in SPELLINGS:
        text = pattern.sub(replacement, text)
    text = text.lstrip(" ,;").rstrip(" .,;")  # a point in front belongs to a number
    wrapped = WRAPPED.fullmatch(text)
    text = wrapped[1].strip(" .") if wrapped else text
    letter = LETTER_IN_PARENTHESES.fullmatch(text)
    return letter[1] if letter else text


def read_number(text: str) -> Number | None:
    """The integer, decimal, fraction or mixed number of a normalised text, its unit dropped; None for anything else."""
    if len(text) > MAX_DIGITS:
        return None
    bare = PERCENT.sub("", text)
    percent = bare != text
    if not percent:
        bare = NAMED_UNIT.sub("", UNIT.sub("", text))
    match = NUMBER.fullmatch(bare.strip())
    if match is None:
        return None
    sign = -1 if match["sign"] == "-" else 1
    if decimal := match["decimal"]:
        digits = re.sub("[, ]", "", decimal)
        return Number(sign * Fraction(digits), percent, "." in digits, len(digits) < len(decimal))
    whole = int(match["whole"] or match["plain_whole"] or 0)
    over = int((match["over"] or match["plain_over"]).strip("{}"))
    under = int((match["under"] or match["plain_under"]).strip("{}"))
    if under == 0 or (whole and (over < 0 or under < 0)):
        return None
    return Number(sign * (whole + Fraction(over, under)), percent)


def same_value(gold: Number, answer: Number) -> bool:
    """Whether two numbers are equal. A percent sign on one of them alone is a unit or a hundredth."""
    rounded = gold.decimal or answer.decimal
    if _close(gold.value, answer.value, rounded):
        return True
    hundredfold = 100 if answer.percent else Fraction(1, 100)
    return gold.percent != answer.percent and _close(gold.value * hundredfold, answer.value, rounded)


def _numbers(text: str) -> list[Number]:
    """The numbers of a normalised list or set of at least two, in ascending order; empty where it is none."""
    parts = SEPARATOR.split(text.removeprefix("\\{").removesuffix("\\}"))
    numbers = [number for part in parts if (number := read_number(part.strip())) is not None]
    return sorted(numbers, key=lambda number: number.value) if len(numbers) == len(parts) > 1 else []


def _same_values(golds: list[Number], answers: list[Number]) -> bool:
    """Whether lists are equal in any order; how often a number stands there matters where the gold one repeats one."""
    if len({number.value for number in golds}) == len(golds):
        answers = [answer for i, answer in enumerate(answers) if i == 0 or answer.value != answers[i - 1].value]
    return len(golds) == len(answers) and all(map(same_value, golds, answers))


def _close(a: Fraction, b: Fraction, rounded: bool) -> bool:
    return a == b or (rounded and abs(a - b) <= ROUNDING * max(abs(a), abs(b)))
