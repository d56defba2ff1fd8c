"""Reading training data: what comes out of good rows, and which words bad ones are refused with."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conditions import data_folder
from transformers import AutoTokenizer

from s1engine.train.examples import BATCH, TOO_LONG, read_examples
from s1engine.train.rows import Columns
from s1engine.train.tiny.tokenizer import build_tokenizer

TOKENIZER = build_tokenizer()
GOOD = {"question": "1 a:+5", "thinking_trajectories": ["a:1+5=6"], "attempt": "6"}


def write(path: Path, rows: list[Any]) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(line + "\n" for line in lines))
    return path


def read(path: Path, template: Any = "s1", max_tokens: int = 1000, **options: Any) -> Any:
    return read_examples(path, TOKENIZER, template, max_tokens, progress=False, **options)


def test_rows_keep_their_order_over_batches(tmp_path: Path) -> None:
    count = 2 * BATCH + 3
    path = write(tmp_path / "a.jsonl", [{**GOOD, "question": f"{i} a:+5"} for i in range(count)])
    read_in = read(path)
    assert read_in.dropped == {} and read_in.lengths == [len(e.token_ids) for e in read_in.examples]
    for i, example in enumerate(read_in.examples):
        text = TOKENIZER.decode(example.token_ids)
        assert f"<|im_start|>user\n{i} a:+5<|im_end|>\n" in text
        assert (example.token_ids.dtype, example.targets.dtype, example.weights.dtype) == (
            np.int32,
            np.int32,
            np.float32,
        )
        assert (example.targets == example.token_ids).all()
        learned = TOKENIZER.decode(example.token_ids[example.weights == 1])
        assert learned == "<|im_start|>think\na:1+5=6\n<|im_start|>answer\nAnswer: 6<|im_end|>\n"
        assert set(example.weights.tolist()) == {0.0, 1.0}
    assert len(read_in.examples) == count


@pytest.mark.parametrize(
    "names",
    [
        ("question", "thinking_trajectories", "attempt"),  # s1K
        ("question", "deepseek_thinking_trajectory", "deepseek_attempt"),  # s1K-1.1
        ("problem", "thinking", "attempt"),
    ],
)
def test_published_columns_are_known(tmp_path: Path, names: tuple[str, str, str]) -> None:
    cells = dict(zip(names, ("1 a:+5", "a:1+5=6", "6"), strict=True))
    expected = read(write(tmp_path / "a.jsonl", [GOOD])).examples[0]
    found = read(write(tmp_path / "b.jsonl", [{"solution": "6", **cells}])).examples[0]
    assert found.token_ids.tolist() == expected.token_ids.tolist()


def test_columns_can_be_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [GOOD | {"thinking": "other", "q": "2"}])
    with pytest.raises(ValueError, match=r"line 1, .*thinking_trajectories and thinking could both.*columns.thinking"):
        read(path)
    example = read(path, columns=Columns(question="q", thinking="thinking")).examples[0]
    text = TOKENIZER.decode(example.token_ids)
    assert "user\n2<" in text and "think\nother\n" in text


def test_the_five_published_rows() -> None:
    data = data_folder()
    tokenizer = AutoTokenizer.from_pretrained(data / "tokenizers" / "qwen2")
    path = data / "train" / "s1k_traces5.jsonl"
    whole = read_examples(path, tokenizer, "s1", 32768, progress=False)
    assert len(whole.examples) == 5 and whole.dropped == {}
    for example, line in zip(whole.examples, path.read_text().splitlines(), strict=True):
        row = json.loads(line)
        learned = tokenizer.decode(example.token_ids[example.weights > 0])
        assert learned.startswith("<|im_start|>think\n" + row["thinking"].strip()[:100])
        assert learned.endswith(row["attempt"].strip()[-100:] + "<|im_end|>\n")
    bound = sorted(whole.lengths)[2]
    some = read_examples(path, tokenizer, "s1", bound, progress=False)
    assert some.dropped == {TOO_LONG: 2}
    assert some.lengths == [n for n in whole.lengths if n <= bound]


def test_long_samples_are_dropped_whole(tmp_path: Path) -> None:
    long = GOOD | {"attempt": "6" * 100}
    path = write(tmp_path / "a.jsonl", [GOOD, long, GOOD])
    short, length, _ = read(path).lengths
    assert length == short + 99
    for bound, dropped in ((length, {}), (length - 1, {TOO_LONG: 1}), (short, {TOO_LONG: 1})):
        found = read(path, max_tokens=bound)
        assert found.dropped == dropped and len(found.examples) == 3 - len(dropped)
    with pytest.raises(ValueError, match=f"all 3 samples.*max_tokens={short - 1}; the longest has {length} tokens"):
        read(path, max_tokens=short - 1)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", r"a.jsonl, line 3: not JSON"),
        ("[1]", r"line 3: \[1\] is not an object"),
        ({"question": "1"}, r"line 3: no column for the thinking among question; name it by columns.thinking"),
        (GOOD | {"question": 3}, r"line 3, question: 3 is not a text"),
        (GOOD | {"attempt": None}, r"line 3, attempt: None is not a text"),
        (GOOD | {"thinking_trajectories": " \n"}, r"line 3, thinking_trajectories: empty; fill it in, or remove"),
        (GOOD | {"thinking_trajectories": []}, r"line 3, thinking_trajectories: \[\] is not a text"),
        (GOOD | {"thinking_trajectories": ["a", 1]}, r"line 3, thinking_trajectories: \['a', 1\] is not a text"),
    ],
)
def test_bad_rows_are_refused_with_their_place(tmp_path: Path, row: Any, message: str) -> None:
    path = write(tmp_path / "a.jsonl", [GOOD, "", row])
    with pytest.raises(ValueError, match=message):
        read(path)


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"question": "\xff"}\n')
    with pytest.raises(ValueError, match="line 1: not JSON"):
        read(tmp_path / "a.jsonl")


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hello", "'hello' is not a list of two or more messages"),
        ([{"role": "assistant", "content": "a"}], "not a list of two or more"),
        ([{"role": "user", "content": "a"}, "b"], "message 1 has no text 'role': 'b'"),
        ([{"from": "human", "value": "a"}, {"role": "assistant", "content": "b"}], "message 0 has no text 'role'"),
        ([{"role": "user", "content": 1}, {"role": "assistant", "content": "b"}], "message 0 has no text 'content'"),
        ([{"role": "user", "content": "a"}, {"role": "user", "content": "b"}], "the last message is of 'user'"),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": " "}], "the last message is empty"),
        ([{"role": "user", "content": "a<|im_end|>"}, {"role": "assistant", "content": "b"}], "control token <.im_end"),
    ],
)
def test_bad_conversations_are_refused(tmp_path: Path, messages: Any, message: str) -> None:
    path = write(tmp_path / "a.jsonl", [{"messages": messages}])
    with pytest.raises(ValueError, match=r"line 1, messages: .*" + message):
        read(path, "chat")


def test_an_end_of_turn_that_is_not_learned_is_refused(tmp_path: Path) -> None:
    tokenizer = build_tokenizer()
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    path = write(tmp_path / "a.jsonl", [{"messages": turns}])
    for template in (
        "{% for m in messages %}u{% generation %}{{ m['content'] }}{% endgeneration %}<|im_end|>{% endfor %}",
        "{% for m in messages %}{{ m['content'] }}{% endfor %}",
    ):
        tokenizer.chat_template = template
        with pytest.raises(ValueError, match=r"line 1: the end of the turn, <\|im_end\|>, is not among .* never learn"):
            read_examples(path, tokenizer, "chat", 100, progress=False)


def test_ids_pass_as_they_are(tmp_path: Path) -> None:
    rows: list[Any] = [{"input_ids": [5, 6, 7]}]
    rows += [{"input_ids": [5, 6], "targets": [0, 9], "weights": [1, 0.5], "note": "x"}]
    rows += [{"input_ids": [5, 6], "targets": None, "weights": [True, True]}]
    found = read(write(tmp_path / "a.jsonl", rows), "tokens").examples
    assert [e.token_ids.tolist() for e in found] == [[5, 6, 7], [5, 6], [5, 6]]
    assert [e.targets.tolist() for e in found] == [[5, 6, 7], [0, 9], [5, 6]]
    assert [e.weights.tolist() for e in found] == [[0, 1, 1], [0, 0.5], [0, 1]]
    assert {(e.token_ids.dtype, e.targets.dtype, e.weights.dtype) for e in found} == {
        (np.dtype("int32"), np.dtype("int32"), np.dtype("float32"))
    }


LAST_ID = len(TOKENIZER) - 1


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"ids": [1, 2]}, ": no column 'input_ids'; it has ids"),
        ({"input_ids": []}, "input_ids: it must be a list of whole numbers, not empty"),
        ({"input_ids": "12"}, "input_ids: it must be a list"),
        ({"input_ids": [1, 2.5]}, "input_ids: it must be a list"),
        ({"input_ids": [[1], [2]]}, "input_ids: it must be a list"),
        ({"input_ids": [1, None]}, "input_ids: it must be a list"),
        ({"input_ids": [1, -1]}, f"input_ids: id -1 at 1 is outside the vocabulary, 0 to {LAST_ID}"),
        ({"input_ids": [1, LAST_ID + 1]}, f"input_ids: id {LAST_ID + 1} at 1 is outside"),
        ({"input_ids": [1, 2], "targets": [1, 9999]}, "targets: id 9999 at 1 is outside"),
        ({"input_ids": [1, 2], "targets": [1]}, "targets: 1 values for 2 input_ids"),
        ({"input_ids": [1, 2], "weights": [1, 1, 1]}, "weights: 3 values for 2 input_ids"),
        ({"input_ids": [1, 2], "weights": [0, -1]}, "weights: -1 at 1 is not a finite number of at least 0"),
        ({"input_ids": [1, 2], "weights": [0, float("nan")]}, "weights: nan at 1 is not a finite"),
        ({"input_ids": [1, 2], "weights": ["a", "b"]}, "weights: it must be a list of numbers"),
        ({"input_ids": [1, 2], "weights": [1, 0]}, "weights: no token after the first has a weight above 0"),
        ({"input_ids": [1]}, "no token after the first has a weight above 0"),
    ],
)
def test_bad_ids_are_refused(tmp_path: Path, row: Any, message: str) -> None:
    with pytest.raises(ValueError, match=r"a.jsonl, line 1.*" + message):
        read(write(tmp_path / "a.jsonl", [row]), "tokens")


@pytest.mark.parametrize("template", ["s1", "tokens"])
def test_parquet_is_read_as_jsonl_is(tmp_path: Path, template: str) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows: list[Any] = [GOOD, GOOD] if template == "s1" else [{"input_ids": [5, 6], "weights": [0.0, 3.0]}] * 2
    expected = read(write(tmp_path / "a.jsonl", rows), template)
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    found = read(tmp_path / "a.parquet", template)
    for one, other in zip(found.examples, expected.examples, strict=True):
        assert one.token_ids.tolist() == other.token_ids.tolist() and one.weights.tolist() == other.weights.tolist()
    column = next(iter(rows[0]))
    parquet.write_table(pyarrow.Table.from_pylist([rows[0], {**rows[1], column: None}]), tmp_path / "b.parquet")
    with pytest.raises(ValueError, match=f"b.parquet, row 2, {column}: "):
        read(tmp_path / "b.parquet", template)
    (tmp_path / "c.parquet").write_text("no parquet")
    with pytest.raises(ValueError, match=r"c.parquet: not a parquet file"):
        read(tmp_path / "c.parquet", template)


def test_a_data_set_on_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(name: str, split: str) -> list[dict[str, Any]]:
        asked.append((name, split))
        return [GOOD, GOOD | {"attempt": ""}][: 1 if split == "train" else 2]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    found = read_examples("simplescaling/s1K", TOKENIZER, "s1", 1000, progress=False)
    assert len(found.examples) == 1
    with pytest.raises(ValueError, match=r"simplescaling/s1K \(test\), row 2, attempt: empty"):
        read_examples("simplescaling/s1K", TOKENIZER, "s1", 1000, split="test", progress=False)
    assert asked == [("simplescaling/s1K", "train"), ("simplescaling/s1K", "test")]


def test_missing_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.parquet").write_text("")
    for module, source in (("pyarrow.parquet", str(tmp_path / "a.parquet")), ("datasets", "owner/name")):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(ValueError, match=r"is not installed; pip install 's1engine\[train\]'"):
            read_examples(source, TOKENIZER, "s1", 100, progress=False)


def test_sources_that_are_none(tmp_path: Path) -> None:
    for name, content, message in (
        ("a.jsonl", "\n\n", "a.jsonl: empty"),
        ("b.jsonl", None, "b.jsonl: no such file"),
        ("c.csv", "x", "give a .jsonl or .parquet file, or a data set on the hub"),
    ):
        if content is not None:
            (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=message):
            read(tmp_path / name)
    path = write(tmp_path / "d.jsonl", [GOOD])
    with pytest.raises(ValueError, match=r"split='test': .*has no splits"):
        read(path, split="test")


@pytest.mark.parametrize(
    ("template", "options", "message"),
    [
        ("s2", {}, "template='s2': it must be one of s1, chat, tokens"),
        ("s1", {"max_tokens": 1}, "max_tokens=1: it must be at least 2"),
        ("s1", {"columns": Columns(messages="m")}, "columns.messages: template 's1' reads no messages"),
        ("tokens", {"columns": Columns(question="q")}, "columns.question: template 'tokens' reads no question"),
        ("chat", {"columns": Columns(messages="m", question="q")}, "columns.messages: a conversation has no question"),
    ],
)
def test_options_that_contradict_are_refused(tmp_path: Path, template: str, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(write(tmp_path / "a.jsonl", [GOOD]), template, **options)
