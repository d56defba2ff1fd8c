"""The training command: what a batch holds, that a run repeats itself, and that it leaves a usable folder."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from s1engine.train.tiny.task import MAX_STEPS, MIN_STEPS
from s1engine.train.tiny.tokenizer import build_tokenizer
from s1engine.train.tiny.traces import Role
from s1engine.train.tiny.train import batches, build_model, learning_rate, max_steps_at, parse, train


def test_a_batch_is_shifted_by_one_and_within_its_size() -> None:
    tokenizer = build_tokenizer()
    end = tokenizer.eos_token_id
    for batch in batches(tokenizer, steps=20, batch_tokens=1024, seed=0):
        assert batch.ids.shape == batch.targets.shape == batch.roles.shape
        assert batch.ids.shape[0] * (batch.ids.shape[1] + 1) <= 1024
        for ids, targets, roles in zip(batch.ids, batch.targets, batch.roles, strict=True):
            waits = ids[1:] == tokenizer.encode("Wait")[0]
            assert torch.equal(ids[1:][~waits], targets[:-1][~waits])
            learned = roles.nonzero()[:, 0]
            assert tokenizer.decode(ids[: learned[0] + 1]).endswith("<|im_start|>assistant\n<|im_start|>think")
            assert targets[learned[-1]] == end
            assert (roles == Role.ANSWER).sum() == 1


def test_the_same_seed_gives_the_same_batches() -> None:
    tokenizer = build_tokenizer()
    one, same, other = (list(batches(tokenizer, 30, 1024, seed)) for seed in (4, 4, 5))
    assert len(one) == 30
    assert all(torch.equal(a.ids, b.ids) and torch.equal(a.roles, b.roles) for a, b in zip(one, same, strict=True))
    assert not all(torch.equal(a.ids, b.ids) for a, b in zip(one, other, strict=True))


def test_schedules() -> None:
    longest = [max_steps_at(i / 100) for i in range(100)]
    assert longest == sorted(longest)
    assert longest[0] == longest[9] == MIN_STEPS + 1
    assert longest[40] == longest[99] == MAX_STEPS
    rates = [learning_rate(step, 1000, 2e-3) for step in range(1000)]
    assert rates[0] == pytest.approx(1e-4)
    assert max(rates) == rates[20] == rates[600] == 2e-3
    assert 0 < rates[-1] < 1e-4


def test_an_untrained_model_is_small_and_starts_at_chance() -> None:
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    assert sum(p.numel() for p in model.parameters()) <= 950_000
    batch = next(batches(tokenizer, 1, 2048, 0))
    with torch.inference_mode():
        loss = torch.nn.functional.cross_entropy(model(batch.ids).logits.flatten(0, 1), batch.targets.flatten())
    chance = torch.tensor(float(len(tokenizer))).log()
    assert chance - 0.5 < loss < chance + 2


def test_a_short_run_learns_and_leaves_a_folder(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    options = ["--steps", "12", "--batch-tokens", "512", "--validation-problems", "1"]
    train(parse(["--out", str(tmp_path / "a"), *options]))
    train(parse(["--out", str(tmp_path / "b"), *options]))
    one, same = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in "ab")
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), same.parameters(), strict=True))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "a")
    assert tokenizer.get_vocab() == build_tokenizer().get_vocab()
    torch.manual_seed(1)
    start = build_model(tokenizer)
    batch = next(batches(tokenizer, 1, 2048, 7))
    losses = []
    for model in (start, one):
        with torch.inference_mode():
            logits = model(batch.ids).logits[batch.roles != Role.GIVEN]
        losses.append(torch.nn.functional.cross_entropy(logits, batch.targets[batch.roles != Role.GIVEN]).item())
    assert losses[1] < losses[0] - 0.5
    assert '"step": 12' in capfd.readouterr().out


def test_bad_options_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--save-every", "0"])
    assert "0 is not a positive integer" in capsys.readouterr().err
