"""Reading and writing rows: suffixes, bad rows with their place, columns by role."""

from __future__ import annotations

from pathlib import Path

import pytest

from s1engine.train.curate.rows import Columns, check_output, question_key, read_rows, text, write_rows

ROWS = [
    {"problem": "Was ist 1 + 1?", "answer": "2", "meta": {"year": 1983, "tags": ["a", "b"]}, "solution": None},
    {
        "problem": "Ünïcode \\frac{1}{2} — ∑",
        "answer": "\\frac{1}{2}",
        "meta": {"year": None, "tags": []},
        "solution": "s",
    },
]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_rows_survive_a_file(tmp_path: Path, suffix: str) -> None:
    if suffix == "parquet":
        pytest.importorskip("datasets")
    path = tmp_path / f"rows.{suffix}"
    write_rows(path, ROWS)
    first = path.read_bytes()
    assert read_rows([str(path)]) == ROWS
    write_rows(path, read_rows([str(path)]))
    assert path.read_bytes() == first
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_row_without_a_column_gets_null_in_parquet(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    path = tmp_path / "rows.parquet"
    write_rows(path, [{"problem": "a"}, {"problem": "b", "domain": "11"}])
    assert read_rows([str(path)]) == [{"problem": "a", "domain": None}, {"problem": "b", "domain": "11"}]
    with pytest.raises(ValueError, match=r"several types .*write \.jsonl"):
        write_rows(path, [{"answer": 1}, {"answer": "x"}])


def test_files_are_read_in_order_and_blank_lines_skipped(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"problem": "1"}\n\n{"problem": "2"}\n')
    (tmp_path / "b.jsonl").write_text('{"problem": "3"}')
    rows = read_rows([str(tmp_path / "b.jsonl"), str(tmp_path / "a.jsonl")])
    assert [row["problem"] for row in rows] == ["3", "1", "2"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", '{"problem": "a"}\n{"problem": \n', r"x\.jsonl, line 2: not JSON"),
        ("x.jsonl", '{"problem": "a"}\n[1]\n', r"x\.jsonl, line 2: \[1\] is not an object with named columns"),
        ("x.jsonl", '\n{"problem": 7}\n', r"x\.jsonl, line 2, problem: '7': a question has to be text"),
        ("x.jsonl", "\n\n", r"x\.jsonl: empty; it needs at least one row"),
        ("x.csv", "problem\n1\n", r"x\.csv: give a \.jsonl or \.parquet file"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, name: str, content: str, message: str) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        read_rows([str(path)])


def test_what_is_neither_file_nor_hub_id_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"gone\.jsonl: no such file"):
        read_rows([str(tmp_path / "gone.jsonl")])
    with pytest.raises(ValueError, match="give a"):
        read_rows([str(tmp_path / "gone.csv")])
    with pytest.raises(ValueError, match="or a data set on the hub"):
        read_rows(["no such thing"])
    with pytest.raises(ValueError, match="--input"):
        read_rows([])


def test_a_hub_id_is_read_by_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(name: str, split: str) -> list[dict[str, str]]:
        asked.append((name, split))
        return [{"question": "q"}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read_rows(["simplescaling/s1K", "owner/na-me.2:test"]) == [{"question": "q"}] * 2
    assert asked == [("simplescaling/s1K", "train"), ("owner/na-me.2", "test")]


def test_output_is_checked_before_anything_is_computed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown suffix"):
        check_output("out.txt")
    with pytest.raises(ValueError, match="also an input"):
        check_output(str(tmp_path / "a.jsonl"), [str(tmp_path / "b" / ".." / "a.jsonl")])


def test_columns_are_found_by_their_usual_names() -> None:
    rows = [{"question": "q", "source_type": "x"}, {"thinking_trajectories": ["t"], "gold": "1"}]
    columns = Columns.find(rows, {"answer": "gold"})
    assert (columns.question, columns.source, columns.trace) == ("question", "source_type", "thinking_trajectories")
    assert (columns.answer, columns.attempt) == ("gold", "attempt")
    assert text(rows[1], columns.trace) == "t" and text(rows[0], columns.trace) == ""
    with pytest.raises(ValueError, match="--answer-column nope: no row has it; the columns are gold, question"):
        Columns.find(rows, {"answer": "nope"})
    with pytest.raises(ValueError, match=r"no column for the attempt .* name it with --attempt-column"):
        columns.require(rows, "question", "attempt")


def test_the_key_is_the_authors() -> None:
    """The hash that the s1 authors' notebook (simplescaling/s1, data/filter.ipynb) prints for the first row of s1K."""
    question = (
        r"Let  $a,b,A,B$  be given reals. We consider the function defined by "
        r"\[ f(x) = 1 - a \cdot \cos(x) - b \cdot \sin(x) - A \cdot \cos(2x) - B \cdot \sin(2x). \] "
        r"Prove that if for any real number  $x$  we have  $f(x) \geq 0$  then  $a^2 + b^2 \leq 2$  and  "
        r"$A^2 + B^2 \leq 1.$ "
    )
    assert question_key(question) == "329b4f5d56d005d3"
