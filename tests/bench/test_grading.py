"""Grading without a process: where the answer stands, and what strings and exact numbers decide."""

import subprocess
import sys
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from s1engine.bench.reasoning.answers import choice_letter, extract_answer, read_letter
from s1engine.bench.reasoning.exact import compare, normalise, read_number, right_sides
from s1engine.bench.reasoning.grading import Grade, Grader

BIG = 1_000_000


@st.composite
def spelled(draw: st.DrawFn, value: Fraction) -> str:
    """One of the ways in which a rational number is written."""
    n, d = value.numerator, value.denominator
    times = draw(st.integers(1, 9))
    sign = "-" if n < 0 else draw(st.sampled_from(["", "+"]))
    frac = draw(st.sampled_from([r"\frac", r"\dfrac", r"\tfrac"]))
    forms = [
        rf"{sign}{frac}{{{abs(n) * times}}}{{{d * times}}}",
        rf"{frac}{{{n}}}{{{d}}}",
        f"{sign}{abs(n) * times}/{d * times}",
        f"{sign} {abs(n)} / {d}",
    ]
    if abs(n) < 10 and d < 10:
        forms += [rf"{sign}\frac{abs(n)}{d}", rf"{sign}\frac {abs(n)}{d}"]
    if abs(n) > d:
        whole, rest = divmod(abs(n), d)
        forms += [rf"{sign}{whole}\frac{{{rest}}}{{{d}}}", f"{sign}{whole} {rest}/{d}"]
    if d == 1:
        zeros = "0" * draw(st.integers(0, 3))
        forms += [f"{sign}{zeros}{abs(n)}", f"{n}.00", rf"{n}^\circ", rf"{n}^{{\circ}}", f"{n}°"]
        forms += [rf"{n}\text{{ cm}}^2", f"{n} dollars per day", rf"\${n}", rf"\text{{{n}}}", rf"\( {n} \)"]
        forms += [f"{n:,}", f"{n:,}".replace(",", r"{,}"), f"{n:,}".replace(",", r",\! ")]
    places = next((p for p in range(7) if 10**p % d == 0), None)
    if places:
        digits = f"{abs(n) * 10**places // d:0{places + 1}d}"
        decimal = f"{digits[:-places]}.{digits[-places:]}"
        forms += [sign + decimal, sign + decimal + "0", sign + decimal.removeprefix("0")]
    form = draw(st.sampled_from(forms))
    return draw(st.sampled_from(["{}", "${}$", " {} ", "{}.", r"\({}\)"])).format(form)


rationals = st.builds(Fraction, st.integers(-3000, 3000), st.sampled_from([1, 1, 1, 2, 3, 4, 7, 8, 10, 25, 64, 101]))


@given(st.data(), rationals)
def test_spellings_of_a_number_are_equal(data: st.DataObject, value: Fraction) -> None:
    gold, answer = data.draw(spelled(value)), data.draw(spelled(value))
    assert compare(gold, answer)[0] is True, (gold, answer)


@given(st.data(), rationals, rationals)
def test_spellings_of_different_numbers_are_not(data: st.DataObject, value: Fraction, other: Fraction) -> None:
    assume(value != other)
    gold, answer = data.draw(spelled(value)), data.draw(spelled(other))
    # A comma may also separate two numbers: that is left to math-verify.
    assert compare(gold, answer)[0] is (None if "," in normalise(gold + answer) else False), (gold, answer)


@pytest.mark.parametrize(
    ("gold", "answer", "correct"),
    [
        ("025", "25", True),
        ("12\\frac{3}{5}", "63/5", True),
        ("137 \\frac{1}{2}", "137.5", True),
        ("11/2", "1 1/2", False),
        ("1 1/2", "11/2", False),
        ("12", "1 2", None),
        ("\\frac{270}7\\text{ degrees}", "\\dfrac{270}{7}", True),
        ("15\\mbox{ cm}^2", "15", True),
        ("5.4 \\text{ cents}", "5.4", True),
        ("\\$32,\\!348", "32348", True),
        ("10{,}000", "10000", True),
        ("3 million", "3", None),
        ("6", "6 xyz", None),
        ("2 \\pi", "2", None),
        ("17.5%", "17.5", True),
        ("17.5\\%", "0.175", True),
        ("25", "25\\%", True),
        ("0.25", "25 \\text{percent}", True),
        ("25", "24%", False),
        ("0.333333", "1/3", True),
        ("0.333", "1/3", False),
        ("1/3", "2/6", True),
        ("1/0", "1", None),
        (".35625", "0.35625.", True),
        ("1000000", "1\\,000\\,000", True),
        ("\\text{A, B}", "\\text{(B) and (A)}", True),
        ("ABD", "A, B", False),
        ("\\text{AB}", "BA", True),
        ("$\\quad$", ".", None),
        ("\\text{Evelyn}", "evelyn", True),
        ("\\text{no}", "on", False),
        ("no", "on", None),
        ("\\text{(C)}", "C", True),
        ("(C)", "\\text{C}", True),
        ("(3,4]", "\\left( 3, 4 \\right]", True),
        ("(3,4]", "(3,4)", None),
        ("4210_{5}", "4210_5", True),
        (".0000672", "0.0000671", False),
        ("4210_5", "4210", True),
        ("4210_5", "4210_6", False),
        ("4210_5", "4211_{5}", False),
        ("4210_5", "540", False),
        ("p \\equiv 3 \\pmod{4}", "p \\equiv 3 \\pmod{6}", None),
        ("\\text{all odd natural numbers greater than 1}", "\\text{odd}", None),
        ("$(-6,6)$, $(2,6)$", "(-6, 6), (2, 6)", True),
        ("\\frac{11+9a}{20}", "\\dfrac{11 + 9a}{20}", True),
        ("sin x", "sinx", None),
        ("x^{12}", "x^12", None),
        ("100,200", "200,100", None),
        ("0,-1,-\\frac{3}{2}", "\\{-1.5, -1, 0\\}", True),
        ("1,-2", "-2 \\text{ or } 1", True),
        ("1,-2", "-2 and 1", True),
        ("1,-2", "1, 1, -2", True),
        ("1,-2", "1", None),
        ("1,-2", "1, -3", False),
        ("16,3,1,1", "1, 1, 3, 16", True),
        ("16,3,1,1", "16, 3, 1", False),
        ("16,3,1,1", "16, 3, 3, 1", False),
        ("(1,2)", "(2,1)", None),
        ("\u22125", "-5", True),
    ],
)
def test_compare(gold: str, answer: str, correct: bool | None) -> None:
    assert compare(gold, answer)[0] is correct


def test_a_very_long_number_is_not_read() -> None:
    assert read_number("9" * 401) is None
    assert compare("9" * 300, "9" * 299 + "8")[0] is False


@pytest.mark.parametrize(
    ("gold", "answer", "sides"),
    [
        ("25", "m + n = 20 + 5 = 25", ("25", "25")),
        ("x=5", "5", ("5", "5")),
        ("$f(n) = 2 n+1$.", "f(n)=1 + 2n", ("2 n+1", "1 + 2n")),
        ("$m_{\\max }=n^{2}$", "n^2", ("n^{2}", "n^2")),
        ("(x, y) = (7, 5)", "(7,5)", ("(7, 5)", "(7,5)")),
        ("a + b = 3 + 4 = 7", "8", ("7", "8")),
        ("x=5", "y=5", None),
        ("x + y = 0", "0", None),
        ("x=1, y=2", "1, 2", None),
        ("$x=1$ or $x=2$", "x=2", ("$x=1$ or $x=2$", "2")),
        ("x \\ge 2", "x > 2", None),
        ("2", "x \\ge 2", None),
    ],
)
def test_right_sides(gold: str, answer: str, sides: tuple[str, str] | None) -> None:
    assert right_sides(gold, answer) == (sides or (gold, answer))


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("So it is $\\boxed{\\frac{1}{2}}$.", "\\frac{1}{2}"),
        ("\\boxed{1}, no: \\boxed{2}", "2"),
        ("$\\boxed{1}$ and $\\boxed{2}$", "1, 2"),
        ("\\[\\boxed{5}\\]\n\\boxed{5}", "5"),
        ("\\boxed{\\left\\{1, 2\\right.}", "\\left\\{1, 2\\right."),
        ("\\boxed 7", "7"),
        ("\\fbox{7}", "7"),
        ("\\boxed{1} so \\boxed{12", None),
        ("\\boxed{}", None),
        ("thinking \\boxed{1}</think>The answer is 2.", "2"),
        ("<think>thinking \\boxed{1}", None),
        ("<|im_start|>think\n\\boxed{1}", None),
        ("<|im_start|>think\n\\boxed{1}\n<|im_start|>answer\nFinal Answer: 3<|im_end|>\nAnswer: 4", "3"),
        ("**Answer:** $x=5$", "$x=5$"),
        ("**Final Answer**: 5.", "5"),
        ("### Final Answer\n\n$5$", "$5$"),
        ("Answer: 4\n\nAnswer: 5\nI checked: the answer is correct.", "5"),
        ("The final answer is:\n\\[\n5\n\\]\nDone.", "\\[\n5\n\\]"),
        ("The answer is $x=1$ or $x=2$, as asked.", "$x=1$ or $x=2$"),
        ("The answer is $18 per day, not $20", "$18 per day, not $20"),
        ("Thus the answer to the question is 3.5 cm. It is long.", "3.5 cm"),
        ("He makes 18.\n#### 18", "18"),
        ("It is 5.", None),
        ("", None),
    ],
)
def test_extract_answer(response: str, answer: str | None) -> None:
    assert extract_answer(response) == answer


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("\\boxed{C}", "C"),
        ("\\boxed{\\text{(C)}}", "C"),
        ("$\\boxed{\\textbf{(C) }42}$", "C"),
        ("\\boxed{42}", "42"),
        ("\\boxed{a}", "A"),
        ("(A) is wrong.\nAnswer: C", "C"),
        ("**Answer: (C)** because", "C"),
        ("Answer: C, because it is.", "C"),
        ("The answer is (C).", "C"),
        ("If the answer is A, it fails. So the correct option is **B**.", "B"),
        ("Therefore option D is correct.", "D"),
        ("Reasons.\n\n(C)", "C"),
        ("Reasons.\n**C**", "C"),
        ("Reasons.\nHence (B) follows.", "B"),
        ("Reasons.\nHence (B) and (C) follow.", None),
        ("A dog barked.", None),
        ("I think so.", None),
        ("The answer is A and C.", "A and C"),
        ("Answer: (A), (C)", "(A), (C)"),
        ("<think>Answer: B", None),
    ],
)
def test_extract_choice(response: str, answer: str | None) -> None:
    assert extract_answer(response, "choice") == answer


def test_letters_and_texts_of_choices() -> None:
    assert read_letter("option b") == "B"
    assert read_letter("A dog") is None
    assert choice_letter("\\text{True, False}", ["True, True", "false, false", "True, false"]) == "C"
    assert choice_letter("5", ["5", "5"]) is None


PIECES = [
    "\\boxed",
    "\\frac",
    "{",
    "}",
    "\\",
    "$",
    "answer",
    " is",
    ":",
    "1",
    "/",
    ".",
    ",",
    " ",
    "\n",
    "*",
    "(",
    "C",
    ")",
]
PIECES += ["<think>", "</think>", "<|im_start|>answer", "\0", "\ud800", "٣", "%", "and", "\\text", "^", "-", "####"]


@given(st.lists(st.sampled_from(PIECES), max_size=30).map("".join), st.lists(st.sampled_from(PIECES)).map("".join))
def test_any_text_is_graded_without_an_error(response: str, gold: str) -> None:
    for kind in ("choice", "integer"):
        with Grader() as grader:
            (grade,) = grader.grade([response], [gold], kind, [["1", "C"]])
        assert grade.correct in (True, False, None)
    extract_answer(response)
    compare(gold, response)


@pytest.mark.parametrize(
    "text",
    [
        "\\boxed{" * (BIG // 7),
        "\\boxed{" + "{" * BIG,
        "\\boxed{" + "{" * BIG + "}" * BIG + "}",
        "\\boxed{1}" * (BIG // 9),
        "answer " * (BIG // 7),
        "answer" + " " * BIG,
        "*" * BIG + "\nanswer: " + "*" * BIG,
        "the answer to " * (BIG // 14),
        "answer: " + "$1 " * BIG,
        "$" * BIG,
        "<|" * BIG,
        "(A) option " * (BIG // 11),
        "\\frac" * BIG,
    ],
    ids=lambda text: f"{text[:12]}-{len(text)}",
)
def test_a_megabyte_is_searched_in_linear_time(text: str) -> None:
    golds: dict[Any, str] = {"math": "\\sqrt{2}", "choice": "B", "integer": "7"}
    with Grader() as grader:  # a search that is not linear takes minutes
        for kind, gold in golds.items():
            (grade,) = grader.grade([text], [gold], kind)
            assert grade.correct is False, (kind, grade.reason)


def grade_one(response: str, gold: str | None, kind: Any = "math", choices: list[str] | None = None) -> Grade:
    with Grader() as grader:
        (grade,) = grader.grade([response], [gold], kind, [choices])
        assert grader.pids == [], "a process was started"
    return grade


@pytest.mark.parametrize(
    ("response", "gold", "kind", "choices", "expected"),
    [
        ("\\boxed{025}", "25", "math", None, Grade(True, "025", "numeric")),
        ("\\boxed{25}", "25", "math", None, Grade(True, "25", "exact")),
        ("\\boxed{25}", None, "math", None, Grade(None, "25", "bad_gold")),
        ("\\boxed{25}", " ", "math", None, Grade(None, "25", "bad_gold")),
        ("no answer", "25", "math", None, Grade(False, None, "no_answer")),
        ("\\boxed{025}", "25", "integer", None, Grade(True, "025", "numeric")),
        ("\\boxed{m + n = 25}", "025", "integer", None, Grade(True, "m + n = 25", "numeric")),
        ("\\boxed{\\frac{50}{2}}", "25", "integer", None, Grade(True, "\\frac{50}{2}", "numeric")),
        ("\\boxed{25!}", "902", "integer", None, Grade(False, "25!", "parse_fail")),
        ("\\boxed{5, 25}", "25", "integer", None, Grade(False, "5, 25", "parse_fail")),
        ("\\boxed{1}", "\\frac12", "integer", None, Grade(None, "1", "bad_gold")),
        ("\\boxed{(C)}", "C", "choice", None, Grade(True, "C", "exact")),
        ("\\boxed{B}", "C", "choice", None, Grade(False, "B", "exact")),
        ("\\boxed{true, FALSE}", "B", "choice", ["True, True", "True, False"], Grade(True, "B", "exact")),
        ("\\boxed{C}", "B", "choice", ["x", "y"], Grade(False, "C", "parse_fail")),
        ("\\boxed{neither}", "B", "choice", ["x", "y"], Grade(False, "neither", "parse_fail")),
        ("\\boxed{B}", "C", "choice", ["x", "y"], Grade(None, "B", "bad_gold")),
        ("\\boxed{A}", "y", "choice", ["x", "y"], Grade(False, "A", "exact")),
        ("\\boxed{" + "1+" * 1000 + "1}", "1001", "math", None, Grade(False, "1+" * 1000 + "1", "too_long")),
    ],
)
def test_grades_that_need_no_process(
    response: str, gold: str | None, kind: str, choices: list[str] | None, expected: Grade
) -> None:
    assert grade_one(response, gold, kind, choices) == expected


def test_kinds_and_choices_are_given_one_each() -> None:
    with Grader() as grader:
        grades = grader.grade(["\\boxed{B}", "\\boxed{7}"], ["B", "07"], ["choice", "integer"], [["x", "y"], None])
        assert [grade.correct for grade in grades] == [True, True]
        assert grader.grade([], []) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"answers": []}, "answers has 0 entries"),
        ({"kind": ["math", "math"]}, "kind has 2 entries"),
        ({"kind": "maths"}, "kind='maths'"),
        ({"answers": [25]}, r"answers\[0\]=25"),
        ({"responses": [None]}, r"responses\[0\]=None"),
        ({"choices": []}, "choices has 0 entries"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], words: str) -> None:
    with Grader() as grader, pytest.raises(ValueError, match=words):
        grader.grade(**{"responses": ["x"], "answers": ["y"], **arguments})


@pytest.mark.parametrize("arguments", [{"processes": 0}, {"timeout": 0.0}, {"timeout": float("nan")}])
def test_bad_limits(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(arguments))):
        Grader(**arguments)


def test_the_module_loads_neither_torch_nor_sympy() -> None:
    code = (
        "import sys, s1engine.bench.reasoning.grading; assert not {'torch', 'sympy', 'math_verify'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
