"""The tiny reasoner's problems, traces and tokenizer: what it is taught is right, and the test split stays unseen."""

import random
import re
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from s1engine.train.tiny import grade, problems
from s1engine.train.tiny.prepare import build_model
from s1engine.train.tiny.task import LABELS, MAX_STEPS, MIN_STEPS, Problem, draw
from s1engine.train.tiny.tokenizer import build_tokenizer
from s1engine.train.tiny.traces import Role, Trace, prompt_tokens, write_trace

CLOSE = "<|im_start|>answer\nFinal Answer:"
_TOKENIZER = build_tokenizer()
LINE = re.compile(r"([a-h]):(\d)([-+*])(\d)=(\d)")


def true_value(problem: Problem, steps: int | None = None) -> int:
    """The running total after `steps` operations, in plain integers and reduced once at the end."""
    value = problem.start
    for operator, operand in problem.steps[:steps]:
        y = int(operand)
        value = {"+": value + y, "-": value - y, "*": value * y}[operator]
    return value % 10


def traces(n: int, seed: int = 0) -> list[tuple[Problem, Trace]]:
    rng = random.Random(seed)
    drawn = [draw(rng, "train") for _ in range(n)]
    return [(problem, write_trace(problem, rng)) for problem in drawn]


def thinking_of(trace: Trace) -> str:
    return trace.text.partition("<|im_start|>think")[2].partition("<|im_start|>answer")[0]


def test_answers_agree_with_plain_integer_arithmetic() -> None:
    for problem in problems("validation", 300):
        assert problem.answer == str(true_value(problem))
        assert problem.prompt.endswith("<|im_end|>\n<|im_start|>assistant\n<|im_start|>think")
        assert problem.question in problem.prompt
        assert MIN_STEPS <= len(problem.steps) <= MAX_STEPS


def test_splits_are_disjoint_and_reproducible() -> None:
    test = problems("test", 500)
    assert test == problems("test", 500)
    assert test != problems("test", 500, seed=1)
    assert len({p.question for p in test}) == 500
    rng = random.Random(3)
    trained_on = {draw(rng, "train").question for _ in range(20_000)}
    validated_on = {p.question for p in problems("validation", 1000)}
    for problem in test:
        assert problem.split == "test"
        assert problem.question not in trained_on | validated_on
    assert not trained_on & validated_on


def test_every_training_trace_is_of_the_train_split() -> None:
    """The split is read back from the text that is trained on, not from the object it was made of."""
    for _, trace in traces(500):
        question = trace.text.removeprefix("<|im_start|>user\n").partition("<|im_end|>")[0]
        start, *steps = question.split(" ")
        assert Problem(int(start), tuple((s[2], s[3]) for s in steps)).split == "train"


def test_bad_split_and_count_are_refused() -> None:
    with pytest.raises(ValueError, match="split is 'dev'"):
        problems("dev", 3)
    with pytest.raises(ValueError, match="n is -1"):
        problems("test", -1)


def test_grade_reads_the_last_final_answer() -> None:
    problem = Problem(3, (("+", "5"), ("*", "9"), ("-", "7")))
    assert problem.answer == "5"
    for right in ("Final Answer: 5", "answer\nFinal Answer: 5<|im_end|>", " 5", "Final Answer: 3\nFinal Answer: 5"):
        assert grade(right, problem), right
    for wrong in ("Final Answer: 4", "Final Answer: 55", "", "Final Answer:", "Final Answer: x5", "5\nFinal Answer: 3"):
        assert not grade(wrong, problem), wrong


def test_a_wait_mends_a_slip_or_goes_on() -> None:
    """Every other result is right, and a thought that is not finished ends with a slip or at a total of zero."""
    mended = went_on = idle = 0
    for problem, trace in traces(3000):
        chain: list[int] = []
        slipped = False
        segments = thinking_of(trace).split("Wait\n")
        for number, segment in enumerate(segments):
            lines = [match.groups() for match in LINE.finditer(segment)]
            for place, (label, before, operator, operand, result) in enumerate(lines):
                careful = number > 0 and place == 0
                if careful and slipped:
                    chain.pop()
                    mended += 1
                elif careful:
                    went_on += 1
                else:
                    assert not slipped  # a slip is the last line of its thought
                assert LABELS.index(label) == len(chain)
                assert (operator, operand) == problem.steps[len(chain)]
                assert int(before) == (chain[-1] if chain else problem.start)
                slipped = int(result) != true_value(Problem(int(before), ((operator, operand),)))
                if slipped:
                    assert not careful and operator == "-" and int(result) == int(before) < int(operand)
                chain.append(int(result))
            if segment.startswith("ok"):
                idle += 1
                assert not slipped and len(chain) == len(problem.steps) and chain[-1] == true_value(problem)
            if number + 1 < len(segments):
                assert slipped or len(chain) == len(problem.steps) or chain[-1] == 0
    assert min(mended, went_on, idle) > 300


def test_the_answer_is_the_last_result() -> None:
    """Also of a trace that was cut off, where a line without its result does not count."""
    right = 0
    for problem, trace in traces(2000):
        results = LINE.findall(thinking_of(trace))
        expected = results[-1][4] if results else str(problem.start)
        assert trace.text.endswith(f"{CLOSE} {expected}<|im_end|>")
        right += grade(trace.text, problem)
    assert 800 < right < 1800


def test_traces_that_were_checked_have_the_right_answer() -> None:
    complete = 0
    for problem, trace in traces(1000):
        if thinking_of(trace).endswith("ok\n"):
            complete += 1
            assert grade(trace.text, problem)
    assert complete > 100


def test_only_what_the_model_writes_is_learned() -> None:
    for problem, trace in traces(300):
        given_prompt = len(prompt_tokens(problem))
        assert "".join(trace.tokens[:given_prompt]) == problem.prompt
        assert all(role == Role.GIVEN for role in trace.roles[:given_prompt])
        for token, target, role in zip(trace.tokens, trace.targets, trace.roles, strict=True):
            if token == "Wait":
                assert target == "<|im_start|>"
            else:
                assert target == token
            assert (role == Role.ANSWER) <= token.isdigit()
        assert trace.roles.count(Role.ANSWER) == 1


def test_tokens_of_a_trace_are_those_of_its_text() -> None:
    tokenizer = build_tokenizer()
    for _, trace in traces(500):
        ids = tokenizer.encode(trace.text)
        assert [tokenizer.decode([i]) for i in ids] == trace.tokens
        assert tokenizer.decode(ids) == trace.text


@pytest.mark.parametrize("added", ["Wait", f"\n{CLOSE}", CLOSE, "Wait\nok\n"])
def test_a_text_that_is_continued_has_the_tokens_of_the_whole(added: str) -> None:
    """Wherever a token ends, except inside a word: "Wait" after "ok" or a label's letter would be one word with it."""
    tokenizer = build_tokenizer()
    for _, trace in traces(40):
        ids = tokenizer.encode(trace.text)
        for end in range(1, len(ids) + 1):
            text = "".join(trace.tokens[:end])
            if added[0].isalpha() and trace.tokens[end - 1].isalpha():
                continue
            assert tokenizer.encode(text + added) == ids[:end] + tokenizer.encode(added)


@given(st.text())
def test_any_text_round_trips(text: str) -> None:
    """Up to Unicode's canonical composition, which is Qwen2's way."""
    composed = unicodedata.normalize("NFC", text)
    assert _TOKENIZER.decode(_TOKENIZER.encode(text)) == composed


def test_tokenizer_survives_saving(tmp_path: Path) -> None:
    _TOKENIZER.save_pretrained(tmp_path)
    # With the model's configuration beside it, whose model type decides the class that AutoTokenizer takes.
    build_model(_TOKENIZER).config.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.eos_token == "<|im_end|>" and loaded.pad_token == "<|endoftext|>"
    for problem, trace in traces(50):
        assert loaded.encode(trace.text) == _TOKENIZER.encode(trace.text)
        chat = loaded.apply_chat_template(
            [{"role": "user", "content": problem.question}], tokenize=False, add_generation_prompt=True
        )
        assert chat == problem.prompt
    assert len(loaded.encode("<|im_start|>")) == len(loaded.encode("<|im_end|>")) == 1
