"""What the tiny reasoner is trained from: the random model, and the traces in the order of the curriculum."""

import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from s1engine.train.examples import read_examples
from s1engine.train.tiny.prepare import main, max_steps_at
from s1engine.train.tiny.task import MAX_STEPS, MIN_STEPS, draw
from s1engine.train.tiny.traces import Role, write_trace

STEPS, BATCH_SIZE, SEED = 40, 6, 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("pyarrow")
    out = tmp_path_factory.mktemp("tiny")
    main(["--out", str(out), "--steps", str(STEPS), "--batch-size", str(BATCH_SIZE), "--seed", str(SEED)])
    return out


def test_traces_are_read_as_they_were_written(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    found = read_examples(folder / "traces.parquet", tokenizer, "tokens", 1024, progress=False)
    assert len(found.examples) == STEPS * BATCH_SIZE and found.dropped == {}
    rng = random.Random(SEED)
    for i, example in enumerate(found.examples):
        trace = write_trace(draw(rng, "train", max_steps_at(i // BATCH_SIZE / STEPS)), rng)
        assert tokenizer.convert_ids_to_tokens(example.token_ids.tolist()) == tokenizer.tokenize(trace.text)
        assert [tokenizer.decode([t]) for t in example.targets] == trace.targets
        heavy = [role in (Role.RECHECK, Role.MEND) for role in trace.roles]
        given = [role == Role.GIVEN for role in trace.roles]
        assert (example.weights == 3).tolist() == heavy and (example.weights == 0).tolist() == given


def test_the_curriculum_grows(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    found = read_examples(folder / "traces.parquet", tokenizer, "tokens", 1024, progress=False)
    questions = [tokenizer.decode(e.token_ids[e.weights == 0]).partition("<|im_end|>")[0] for e in found.examples]
    operations = [question.count(":") for question in questions]
    tenth = len(operations) // 10
    assert max(operations[:tenth]) == MIN_STEPS + 1 and max(operations[-5 * tenth :]) == MAX_STEPS


def test_the_model_is_random_and_repeatable(folder: Path, tmp_path: Path) -> None:
    main(["--out", str(tmp_path), "--steps", "1", "--batch-size", "1", "--seed", str(SEED)])
    one, same = (AutoModelForCausalLM.from_pretrained(x / "model").state_dict() for x in (folder, tmp_path))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(folder / "model").parameters()) < 1e6
