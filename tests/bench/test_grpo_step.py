"""The comparison of GRPO steps: what padding and repeated prompts cost, ratios and bounds, and its endless task."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from s1engine.bench.reasoning.grading import Grader
from s1engine.bench.speed.floor import Rates, Sizes
from s1engine.bench.training.contestants import execute, rotated
from s1engine.bench.training.grpo_rounds import OURS, Result, Round, least_seconds, needed, real, summary
from s1engine.bench.training.grpo_step import main
from s1engine.bench.training.grpo_tasks import LETTERS, text_of, write_endless, write_problems

LENGTHS = st.lists(st.tuples(st.integers(1, 40), st.lists(st.integers(1, 60), min_size=2, max_size=4)), min_size=1)


def a_round(seconds: dict[str, float], responses: list[list[int]], computed: dict[str, int]) -> Round:
    return Round(seconds, [10] * len(responses), responses, computed, 1.0)


@given(LENGTHS)
def test_needed_tokens_are_those_of_sequences_that_share_their_prompts(groups: list[tuple[int, list[int]]]) -> None:
    prompts, responses = [prompt for prompt, _ in groups], [own for _, own in groups]
    shared = {(g, "prompt", i) for g, (prompt, _) in enumerate(groups) for i in range(prompt)}
    own = {(g, r, i) for g, (_, lengths) in enumerate(groups) for r, n in enumerate(lengths) for i in range(n)}
    fed = {(g, r, i) for g, r, i in own if i + 1 < groups[g][1][r]}
    assert needed(prompts, responses) == {"updates": len(shared | own), "rollouts": len(shared | fed)}
    one_each = [(prompt + n, prompt + n - 1) for prompt, lengths in groups for n in lengths]
    assert real(prompts, responses) == {
        "updates": sum(all_of_it for all_of_it, _ in one_each),
        "rollouts": sum(decoded for _, decoded in one_each),
    }


def test_the_summary_has_ratios_by_token_within_turns_and_what_was_computed() -> None:
    responses = [[2, 4], [4, 6]]  # 16 tokens with two prompts of 10
    least = {"rollouts": 32, "updates": 36}
    ours = a_round({"rollouts": 4.0, "updates": 3.0, "weights": 1.0}, responses, least)
    theirs = a_round(
        {"generation": 9.0, "rollouts": 10.0, "updates": 6.0}, responses, {"rollouts": 4 * 16, "updates": 4 * 16}
    )
    longer = a_round(
        {"generation": 30.0, "rollouts": 40.0, "updates": 12.0},
        [[4, 8], [8, 12]],
        {"rollouts": 4 * 22, "updates": 4 * 22},
    )
    slow = a_round({"rollouts": 8.0, "updates": 6.0, "weights": 2.0}, responses, least)
    found = summary(
        [
            Result("TRL", 0, [theirs], 300),
            Result(OURS, 0, [ours], 100),
            Result(OURS, 1, [slow], 100),
            Result("TRL", 1, [longer], 200),
        ]
    )
    row = found["TRL"]
    # Turn 0: 16 seconds against 8. Turn 1: 26 for as many tokens against 16.
    assert row["ratios"] == pytest.approx({"rollouts": 2.5, "updates": (2 + 1) / 2, "whole": (2 + 26 / 16) / 2})
    assert row["bound"] == pytest.approx((16 / 4 + 26 / 8) / 2)
    assert row["seconds"]["rollouts"] == 25 and row["seconds"]["generation"] == 19.5
    assert row["computed"] == pytest.approx({"rollouts": 152 / (32 + 48), "updates": 152 / (36 + 52)})
    # Real ones: 4 prompts of 10 and 16 or 32 tokens, of which 4 are not decoded from.
    assert row["padding"] == pytest.approx({"rollouts": 1 - (52 + 68) / 152, "updates": 1 - (56 + 72) / 152})
    assert row["memory"] == 2.5 and row["anonymous"] == 300
    assert found[OURS]["ratios"] == {"rollouts": 1, "updates": 1, "weights": 1, "whole": 1}
    assert found[OURS]["computed"] == {"rollouts": 1, "updates": 1} and found[OURS]["padding"]["updates"] == 0


def test_the_least_time_reads_weights_once_a_step_and_multiplies_each_prompt_once() -> None:
    sizes = Sizes(weights=100, body=60, kv=2, vocab=5)
    found = a_round({}, [[1, 3]], {})
    fast_reads = least_seconds(found, sizes, 2, Rates(bandwidth=1e9, operations=10.0))
    # 2 * 60 * 10 for the prompt, then two steps of one row: 2 * 100 each.
    assert fast_reads["rollouts"] == pytest.approx(120 + 40)
    assert fast_reads["updates"] == pytest.approx(6 * (60 * 14 + 40 * 4) / 10)
    fast_products = least_seconds(found, sizes, 2, Rates(bandwidth=100.0, operations=1e9))
    assert fast_products["rollouts"] == pytest.approx((200 + (200 + 4 * 11) + (200 + 4 * 12)) / 100)


def test_an_endless_task_is_read_letter_by_letter_and_graded_by_the_last_token(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2", "vocab_size": 300, "eos_token_id": 7}))
    write_endless(tmp_path)
    write_problems(tmp_path / "problems.jsonl", 4, 25)
    rows = [json.loads(line) for line in (tmp_path / "problems.jsonl").read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    for row in rows:
        turns = [{"role": "user", "content": row["problem"]}]
        ids = tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False, add_generation_prompt=True)
        assert len(ids) == 25 and max(ids) < len(LETTERS)
    assert len({row["problem"] for row in rows}) == 4 and {row["answer"] for row in rows} == {"0", "1"}
    # Every id that the model can write has a text, and none of them ends it.
    assert tokenizer.eos_token_id == 300 == json.loads((tmp_path / "config.json").read_text())["eos_token_id"]
    assert tokenizer.convert_ids_to_tokens([3, 299]) == [text_of(3), text_of(299)]
    texts = [tokenizer.decode(ids) for ids in ([17, 298, 299], [299, 17, 298])]
    with Grader() as grader:
        assert [grade.correct for grade in grader.grade(texts, ["1", "1"], "integer")] == [True, False]


def test_a_process_ends_when_it_has_done_enough_and_its_failure_is_told(tmp_path: Path) -> None:
    done = tmp_path / "done"
    script = f"echo ready > {done}; exec sleep 60"
    assert execute(["sh", "-c", script], tmp_path / "log", done.exists) > 0
    with pytest.raises(RuntimeError, match="no such luck"):
        execute(["sh", "-c", "echo no such luck; sleep 1; exit 3"], tmp_path / "log")


def test_every_contestant_begins_equally_often() -> None:
    assert [rotated(["a", "b", "c"], turn) for turn in range(4)] == [
        ["a", "b", "c"], ["b", "c", "a"], ["c", "a", "b"], ["a", "b", "c"],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds", "1"], "--rounds 1"),
        (["--micro-batch", "12"], "--micro-batch 12"),
        (["--micro-batch", "64"], "--micro-batch 64"),
    ],
)
def test_a_batch_that_does_not_divide_is_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert message in capsys.readouterr().err
