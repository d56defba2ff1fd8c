"""The difficulty stage: the tiny reasoner really solves, a killed run asks nothing twice, no grade is no verdict."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from s1engine import ThinkingBudget
from s1engine.bench.reasoning.grading import Grade, Grader
from s1engine.train.curate.difficulty import Solving, difficulty, grade_attempts, question_prompt, trace_lengths
from s1engine.train.curate.engine_model import EngineModel
from s1engine.train.curate.replies import TOO_LONG, Conversation, Replies, Reply
from s1engine.train.curate.rows import Columns
from s1engine.train.tiny import MODEL_DIR, grade, problems

COLUMNS = Columns()
PLAIN = Solving(suffix="")


@pytest.fixture(scope="module")
def grader() -> Iterator[Grader]:
    with Grader(processes=1) as found:
        yield found


class Scripted:
    """Answers from a table, in an order of its own, and counts; is interrupted after `limit` replies."""

    def __init__(self, answers: dict[str, str], limit: int | None = None) -> None:
        self.answers, self.limit = answers, limit
        self.asked: Counter[str] = Counter()
        self.seeds: dict[str, int] = {}

    def __call__(
        self, conversations: Sequence[Conversation], seeds: Sequence[int], temperature: float
    ) -> Iterator[tuple[int, Reply]]:
        order = list(range(len(conversations)))
        random.Random(len(order)).shuffle(order)
        for index in order:
            if self.asked.total() == self.limit:
                raise KeyboardInterrupt
            question = conversations[index][-1]["content"]
            self.asked[question] += 1
            self.seeds[question] = seeds[index]
            yield index, Reply(f"\\boxed{{{self.answers.get(question, 'none')}}}", 3, "stop")


def pool(count: int) -> list[dict[str, Any]]:
    return [{"problem": f"q{i}", "answer": str(i), "id": i} for i in range(count)]


def run(
    rows: list[dict[str, Any]],
    models: dict[str, Scripted],
    path: Path,
    grader: Any,
    solving: Solving = PLAIN,
    **settings: Any,
) -> tuple[list[int], Any]:
    kept, report = difficulty(rows, COLUMNS, list(models), models.__getitem__, Replies(path), grader, settings, solving)
    return [row["id"] for row in kept], report


def test_what_any_model_solves_goes(tmp_path: Path, grader: Grader) -> None:
    weak, strong = Scripted({"q0": "0", "q3": "3"}), Scripted({"q1": "1.0", "q2": "9", "q3": "3"})
    kept, report = run(pool(6), {"weak": weak, "strong": strong}, tmp_path / "r.jsonl", grader)
    assert kept == [2, 4, 5]
    assert [(row["id"], row["model"]) for row in report.dropped] == [(0, "weak"), (1, "strong"), (3, "weak")]
    assert set(strong.asked) == {"q1", "q2", "q4", "q5"}  # what the first solved is not asked again
    assert report.notes["weak"]["solved"] == 2 and report.notes["strong"]["asked"] == 4
    assert report.steps[0].removed == {"solved": 3}


def test_a_killed_run_asks_nothing_twice(tmp_path: Path, grader: Grader) -> None:
    rows, answers = pool(22), {f"q{i}": str(i) for i in range(0, 22, 3)}
    whole = Scripted(answers)
    expected = run(rows, {"m": whole}, tmp_path / "whole.jsonl", grader)
    path, asked, seeds = tmp_path / "r.jsonl", Counter[str](), {}
    for limit in (9, 0, 5):
        model = Scripted(answers, limit)
        with pytest.raises(KeyboardInterrupt):
            run(rows, {"m": model}, path, grader)
        asked, seeds = asked + model.asked, seeds | model.seeds
    with open(path, "ab") as file:
        file.write(b'{"key": "torn by the ki')
    model = Scripted(answers)
    assert run(rows, {"m": model}, path, grader)[0] == expected[0]
    assert asked + model.asked == Counter(f"q{i}" for i in range(22))
    assert seeds | model.seeds == whole.seeds and len(set(whole.seeds.values())) == 22
    assert path.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()

    def load(name: str) -> Scripted:
        raise AssertionError("a model was loaded for nothing")

    kept, report = difficulty(rows, COLUMNS, ["m"], load, Replies(path), grader, {}, PLAIN)
    assert [row["id"] for row in kept] == expected[0] and report.as_dict() == expected[1].as_dict()


def test_changed_settings_ask_anew(tmp_path: Path, grader: Grader) -> None:
    path = tmp_path / "r.jsonl"
    for settings, solving in (
        ({"max_tokens": 8}, PLAIN),
        ({"max_tokens": 9}, PLAIN),
        ({"max_tokens": 9}, Solving(suffix="?")),
        ({"max_tokens": 9}, Solving(suffix="", temperature=1.0)),
    ):
        model = Scripted({})
        run(pool(3), {"m": model}, path, grader, solving, **settings)
        assert model.asked.total() == 3
    model = Scripted({})
    run(pool(4), {"m": model}, path, grader, max_tokens=8)
    assert set(model.asked) == {"q3"}


def test_a_damaged_file_of_replies_is_named(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text('{"key": "a", "text": "", "tokens": 1, "finish_reason": "stop"}\n{"problem": "q"}\n')
    with pytest.raises(ValueError, match=r"r\.jsonl, line 2: no 'key' in it; it is not a file of replies"):
        Replies(path)
    path.write_text('{"key": \n{}\n')
    with pytest.raises(ValueError, match=r"r\.jsonl, line 1: not JSON"):
        Replies(path)


def test_rows_without_a_readable_answer_stay_and_are_counted(tmp_path: Path, grader: Grader) -> None:
    rows = [*pool(2), {"problem": "prove it", "answer": None, "id": 2}]
    model = Scripted({"q0": "0", "prove it": "1"})
    kept, report = run(rows, {"m": model}, tmp_path / "r.jsonl", grader)
    assert kept == [1, 2] and "prove it" not in model.asked
    assert report.notes["rows without a readable answer"] == 1
    kept, report = run(rows, {"m": model}, tmp_path / "r.jsonl", grader, Solving("", drop_unreadable=True))
    assert kept == [1] and report.steps[0].removed == {"solved": 1, "no readable answer": 1}
    with pytest.raises(ValueError, match="no column for the answer"):
        run([{"problem": "q"}], {"m": model}, tmp_path / "r.jsonl", grader)


def test_an_answer_that_the_grader_cannot_read_solves_nothing(tmp_path: Path) -> None:
    class Unreadable:
        def grade(self, responses: list[str], *args: Any, **options: Any) -> list[Grade]:
            return [Grade(correct=None, extracted=response, reason="bad_gold") for response in responses]

    models = {"a": Scripted({}), "b": Scripted({})}
    kept, report = run(pool(3), models, tmp_path / "r.jsonl", Unreadable())
    assert kept == [0, 1, 2] and report.notes["rows without a readable answer"] == 3
    assert models["a"].asked.total() == 3 and models["b"].asked.total() == 0  # nobody could solve them


def test_choices_are_part_of_the_question(tmp_path: Path, grader: Grader) -> None:
    row = {"problem": "Which?", "answer": "B", "choices": ["no", "yes"], "id": 0}
    assert question_prompt(row, COLUMNS, "!") == "Which?\nA) no\nB) yes!"
    for said, kept in (("B", []), ("yes", []), ("A", [0])):
        model = Scripted({"Which?\nA) no\nB) yes": said})
        assert run([row], {said: model}, tmp_path / "r.jsonl", grader)[0] == kept


def test_traces_are_measured_and_attempts_graded(grader: Grader) -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    rows = [
        {"thinking": "a:3+5=8\n", "attempt": "Answer: 8", "answer": "8"},
        {"thinking": ["a:3+5=8", "second"], "attempt": "\\boxed{9}", "answer": "8"},
        {"attempt": "8", "answer": None},
    ]
    measured = trace_lengths(rows, COLUMNS, tokenizer)
    assert [row["trace_tokens"] for row in measured] == [8, 7, None]
    assert [row["correct"] for row in grade_attempts(measured, COLUMNS, grader)] == [True, False, None]
    assert "trace_tokens" not in rows[0]


@pytest.fixture(scope="module")
def tiny() -> EngineModel:
    return EngineModel(str(MODEL_DIR), max_tokens=320, device="cpu")


def replies_of(model: EngineModel, questions: list[str], temperature: float = 0.0) -> list[Reply]:
    conversations = [[{"role": "user", "content": question}] for question in questions]
    found = dict(model(conversations, list(range(len(questions))), temperature))
    return [found[index] for index in range(len(questions))]


def test_the_tiny_reasoner_solves(tmp_path: Path, grader: Grader, tiny: EngineModel) -> None:
    """Half of its problems at a temperature near 0; nearly all of them when four ends of thinking are ignored."""
    test = {p.question: p for p in problems("test", 60)}
    rows = [{"problem": question, "answer": p.answer} for question, p in test.items()]
    right = {}

    def recorded(
        conversations: Sequence[Conversation], seeds: Sequence[int], temperature: float
    ) -> Iterator[tuple[int, Reply]]:
        for index, reply in tiny(conversations, seeds, temperature):
            question = conversations[index][-1]["content"]
            right[question] = grade(reply.text, test[question])
            yield index, reply

    kept, _ = difficulty(rows, COLUMNS, ["t"], lambda _: recorded, Replies(tmp_path / "r"), grader, {}, PLAIN)
    assert [row["problem"] for row in kept] == [question for question in test if not right[question]]
    assert 10 < len(kept) < 50
    tiny.thinking = ThinkingBudget(ignore_end=4)
    kept, _ = difficulty(rows, COLUMNS, ["t"], lambda _: tiny, Replies(tmp_path / "r4"), grader, {}, PLAIN)
    tiny.thinking = None
    assert len(kept) < 10


def test_replies_do_not_depend_on_the_batch(tiny: EngineModel) -> None:
    conversations = [[{"role": "user", "content": p.question}] for p in problems("test", 9)]
    together = dict(tiny(conversations, list(range(9)), 1.0))
    assert [together[i] for i in range(9)] == [dict(tiny([c], [i], 1.0))[0] for i, c in enumerate(conversations)]
    assert len({reply.text for reply in together.values()}) > 5


def test_a_question_beyond_the_context_is_not_asked(tiny: EngineModel, grader: Grader, tmp_path: Path) -> None:
    """Also where such questions alone fill all that would be asked at a time."""
    (problem,) = problems("test", 1)
    rows = [{"problem": f"{i} {'a:+5 ' * 400}", "answer": "1", "id": i} for i in range(9)]
    rows.append({"problem": problem.question, "answer": problem.answer, "id": 9})
    small = EngineModel(str(MODEL_DIR), max_tokens=320, device="cpu", max_num_seqs=2)
    replies = replies_of(small, [row["problem"] for row in rows])
    assert replies[:9] == [Reply("", 0, TOO_LONG)] * 9
    assert replies[9] == replies_of(tiny, [problem.question])[0] and replies[9].tokens > 10
    kept, report = difficulty(rows, COLUMNS, ["t"], lambda _: small, Replies(tmp_path / "r"), grader, {}, PLAIN)
    assert [row["id"] for row in kept][:9] == list(range(9)) and report.notes["t"]["too long for its context"] == 9


def test_an_interrupt_leaves_nothing_running(tiny: EngineModel) -> None:
    coming = tiny([[{"role": "user", "content": p.question}] for p in problems("test", 5)], list(range(5)), 0.0)
    next(coming)
    assert tiny.llm.engine.has_unfinished_requests()
    coming.close()
    assert not tiny.llm.engine.has_unfinished_requests()


def test_thinking_that_never_ends_has_no_answer(tiny: EngineModel) -> None:
    tiny.max_tokens = 12
    (reply,) = replies_of(tiny, [problems("test", 1)[0].question])
    tiny.max_tokens = 320
    assert reply.finish_reason == "length" and reply.text.startswith("<think>\n")
