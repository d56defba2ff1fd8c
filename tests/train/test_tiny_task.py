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
from s1engine.train.tiny.task import LABELS, MAX_STEPS, MIN_STEPS, Problem, draw
from s1engine.train.tiny.tokenizer import build_tokenizer
from s1engine.train.tiny.traces import Role, Trace, prompt_tokens, write_trace
from s1engine.train.tiny.train import build_model

CLOSE = "<|im_start|>answer\nFinal Answer:"
_TOKENIZER = build_tokenizer()
LINE = re.compile(r"([a-j]):(\d)([-+*])(\d)=([\d?])")


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
        problems("dev", 3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="n is -1"):
        problems("test", -1)


def test_grade_reads_the_last_final_answer() -> None:
    problem = Problem(3, (("+", "5"), ("*", "9"), ("-", "7")))
    assert problem.answer == "5"
    for right in ("Final Answer: 5", "answer\nFinal Answer: 5<|im_end|>", " 5", "Final Answer: 3\nFinal Answer: 5"):
        assert grade(right, problem), right
    for wrong in ("Final Answer: 4", "Final Answer: 55", "", "Final Answer:", "Final Answer: x5", "5\nFinal Answer: 3"):
        assert not grade(wrong, problem), wrong


def test_every_result_is_right_and_a_wait_takes_up_the_first_open_line() -> None:
    skips = mended = went_on = 0
    for problem, trace in traces(3000):
        chain: list[int | None] = []  # the result of each line as the chain stands; None where it is open
        for number, segment in enumerate(thinking_of(trace).split("Wait\n")):
            lines = [match.groups() for match in LINE.finditer(segment)]
            if segment.startswith("ok"):
                assert len(chain) == len(problem.steps) and chain[-1] == true_value(problem)
                assert None not in chain and not lines
            for place, (label, before, operator, operand, result) in enumerate(lines):
                i = LABELS.index(label)
                if number and place == 0:
                    assert i == (chain.index(None) if None in chain else len(chain))
                    assert result != "?"
                    mended += i < len(chain)
                    went_on += i == len(chain)
                    del chain[i:]
                assert i == len(chain)
                assert (operator, operand) == problem.steps[i]
                assert int(before) == next((r for r in reversed(chain) if r is not None), problem.start)
                if result == "?":
                    skips += 1
                    assert operator == "-" and int(before) < int(operand)
                    chain.append(None)
                else:
                    assert int(result) == true_value(Problem(int(before), ((operator, operand),)))
                    chain.append(int(result))
    assert skips > 500 and mended > 300 and went_on > 300


def test_a_thought_ends_early_only_at_a_total_of_zero() -> None:
    early = 0
    for problem, trace in traces(2000):
        for segment in thinking_of(trace).split("Wait\n")[:-1]:
            last = segment.splitlines()[-1]
            finished = last == "ok" or LABELS.index(last[0]) == len(problem.steps) - 1
            early += not finished
            assert finished or last.endswith("=0")
    assert early > 300


def test_the_answer_is_the_last_result() -> None:
    """Also of a trace that was cut off; a line that was left open does not count, nor one without its result."""
    right = 0
    for problem, trace in traces(2000):
        results = [r for *_, r in LINE.findall(thinking_of(trace)) if r != "?"]
        expected = results[-1] if results else str(problem.start)
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
        assert chat + "<|im_start|>think" == problem.prompt
    assert len(loaded.encode("<|im_start|>")) == len(loaded.encode("<|im_end|>")) == 1
