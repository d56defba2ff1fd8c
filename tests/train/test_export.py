"""The exported folder: every tensor under its name, in one file or several, and never half a folder."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from s1engine.models import load_model
from s1engine.train import export as exporting
from s1engine.train.export import export


def tensors(folder):
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("arch", ["qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shard_bytes", [10_000, 4 << 30])
def test_a_round_trip(make_model, tmp_path, monkeypatch, arch, tied, shard_bytes):
    monkeypatch.setattr(exporting, "SHARD_BYTES", shard_bytes)
    source = make_model(arch, tie_word_embeddings=tied, dtype=torch.bfloat16)
    model = load_model(str(source), packed=False)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "stale").touch()
    export(model, str(source), tmp_path / "out", 0)
    before, after = tensors(source), tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert (len(list((tmp_path / "out").glob("*.safetensors"))) > 1) == (shard_bytes == 10_000)
    assert not (tmp_path / "out" / "stale").exists() and not (tmp_path / "out.partial").exists()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    again = load_model(str(tmp_path / "out"), packed=False)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))
