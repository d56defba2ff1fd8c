"""Checkpoints: sharded, tied, of any stored dtype; what does not fit is named; memory is taken once."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conditions import needs_csrc
from safetensors.torch import load_file, save_file
from torch import Tensor

from s1engine.kernels.packed import PackedRows
from s1engine.models import CausalLM, load_model, resolve_model_path
from s1engine.models.layers import Linear
from s1engine.models.weights import checkpoint_targets, update_weights

FILE = "model.safetensors"


@pytest.fixture
def edited(make_model, tmp_path) -> Callable[..., Path]:
    """A copy of a random model whose tensors a function has changed."""

    def edit(change: Callable[[dict[str, Tensor]], None], arch: str = "qwen2", **config: object) -> Path:
        folder = tmp_path / "edited"
        shutil.copytree(make_model(arch, **config), folder)
        tensors = load_file(folder / FILE)
        change(tensors)
        save_file(tensors, folder / FILE, metadata={"format": "pt"})
        return folder

    return edit


@pytest.mark.parametrize("arch", ["qwen2", "qwen3", "llama"])
@pytest.mark.parametrize("tied", [False, True])
def test_every_tensor_lands_in_its_place(arch, tied, make_model):
    folder = make_model(arch, tie_word_embeddings=tied)
    stored = load_file(folder / FILE)
    model = load_model(str(folder), packed=False)
    targets = checkpoint_targets(model)
    assert targets.keys() == stored.keys()
    for name, tensor in stored.items():
        assert torch.equal(targets[name], tensor), name
    # The targets are the parameters, and all of them.
    memory = {parameter.untyped_storage().data_ptr(): parameter.numel() for parameter in model.parameters()}
    assert sum(memory.values()) == sum(tensor.numel() for tensor in stored.values())
    assert {target.untyped_storage().data_ptr() for target in targets.values()} == memory.keys()
    assert (model.lm_head.weight is model.embed_tokens) == tied
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())


def test_sharded_checkpoint(make_model):
    whole = load_model(str(make_model("qwen3")), packed=False)
    folder = make_model("qwen3", max_shard_size="200KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    for one, other in zip(whole.parameters(), load_model(str(folder), packed=False).parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("wanted", ["auto", "float32", "bfloat16"])
@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32])
def test_stored_dtypes_are_converted(stored, wanted, make_model):
    folder = make_model("llama", dtype=stored)
    tensors = load_file(folder / FILE)
    assert {tensor.dtype for tensor in tensors.values()} == {stored}
    model = load_model(str(folder), dtype=wanted, packed=False)
    expected = {"auto": torch.float32 if stored == torch.float16 else stored}.get(wanted) or getattr(torch, wanted)
    for name, target in checkpoint_targets(model).items():
        assert target.dtype == expected
        assert torch.equal(target, tensors[name].to(expected))


@needs_csrc
@pytest.mark.parametrize("arch", ["qwen2", "qwen3", "llama"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_matrices_hold_the_checkpoint(arch, tied, dtype, make_model):
    folder = make_model(arch, dtype=dtype, tie_word_embeddings=tied, intermediate_size=150, vocab_size=1001)
    packed = load_model(str(folder))
    for name, tensor in load_file(folder / FILE).items():
        target = checkpoint_targets(packed)[name]
        assert torch.equal(target.read() if isinstance(target, PackedRows) else target, tensor), name
    names = set(dict(packed.named_parameters()))
    assert not any("_proj.weight" in name or name == "lm_head.weight" for name in names)
    assert ("embed_tokens" in names) != tied, "a tied embedding is stored once"


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_update_in_place(packed, tied, make_model, paged_runner):
    """An updated model is the model of the other checkpoint, and no tensor of it has moved."""
    config = {"tie_word_embeddings": tied, "intermediate_size": 150}
    model = load_model(str(make_model("qwen2", seed=1, **config)), packed=packed)
    other = load_model(str(make_model("qwen2", seed=2, **config)), packed=packed)
    tokens = list(range(20))
    places = addresses(model)
    assert not torch.equal(paged_runner(model).step({"a": tokens})["a"], paged_runner(other).step({"a": tokens})["a"])
    update_weights(model, load_file(make_model("qwen2", seed=2, **config) / FILE))
    assert torch.equal(paged_runner(model).step({"a": tokens})["a"], paged_runner(other).step({"a": tokens})["a"])
    assert addresses(model) == places and model.weights_version == 1


def addresses(model: CausalLM) -> list[int]:
    packed = [m.packed.storage.data_ptr() for m in model.modules() if isinstance(m, Linear) and m.packed is not None]
    return packed + [parameter.data_ptr() for parameter in model.parameters()]


def test_an_update_that_does_not_fit_changes_nothing(make_model):
    folder = make_model("llama")
    model = load_model(str(folder))
    before = model.compute_logits(torch.ones(1, 96))
    tensors = load_file(folder / FILE)
    wrong = {
        "model.embed_tokens.weight": tensors["model.embed_tokens.weight"] + 1,
        "lm_head.weight": tensors["lm_head.weight"] + 1,
        "model.norm.weight": torch.zeros(5),
        "model.layers.9.mlp.up_proj.weight": torch.zeros(5, 5),
        "model.layers.0.input_layernorm.weight": torch.zeros(96, dtype=torch.int8),
    }
    with pytest.raises(ValueError) as error:
        update_weights(model, wrong)
    for text in (
        "model.norm.weight has shape [5], expected [96]",
        "model.layers.9.mlp.up_proj.weight is not a tensor of this model",
        "model.layers.0.input_layernorm.weight has dtype torch.int8",
    ):
        assert text in str(error.value)
    assert torch.equal(model.compute_logits(torch.ones(1, 96)), before) and model.weights_version == 0


def test_everything_wrong_is_named(edited):
    def change(tensors: dict[str, Tensor]) -> None:
        del tensors["model.norm.weight"]
        del tensors["model.layers.1.self_attn.k_proj.bias"]
        tensors["model.layers.2.mlp.up_proj.weight"] = torch.zeros(3)
        tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(7, 96)
        tensors["model.layers.0.mlp.down_proj.weight"] = torch.zeros(96, 160, dtype=torch.int8)

    with pytest.raises(ValueError) as error:
        load_model(str(edited(change)))
    for text in (
        "model.norm.weight is missing",
        "model.layers.1.self_attn.k_proj.bias is missing",
        "model.layers.2.mlp.up_proj.weight is unexpected",
        "model.layers.0.mlp.up_proj.weight has shape [7, 96], expected [160, 96]",
        "model.layers.0.mlp.down_proj.weight is stored as I8",
    ):
        assert text in str(error.value)


def test_a_transposed_matrix_is_not_reshaped(edited):
    def change(tensors: dict[str, Tensor]) -> None:
        name = "model.layers.0.mlp.down_proj.weight"
        tensors[name] = tensors[name].T.contiguous()

    with pytest.raises(ValueError, match=r"has shape \[160, 96\], expected \[96, 160\]"):
        load_model(str(edited(change)))


def test_derived_tensors_are_ignored(edited):
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(12)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    model = load_model(str(edited(change, tie_word_embeddings=True)), packed=False)
    assert model.lm_head.weight is model.embed_tokens


def test_a_different_head_is_not_tied(edited, caplog):
    head = torch.full((1000, 96), 0.5)
    folder = edited(lambda tensors: tensors.update({"lm_head.weight": head}), tie_word_embeddings=True)
    model = load_model(str(folder), packed=False)
    assert torch.equal(model.lm_head.weight, head) and not torch.equal(model.embed_tokens, head)
    assert not model.config.tie_word_embeddings
    assert "lm_head.weight" in caplog.text


def test_files_that_are_not_there_are_named(make_model, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(make_model("qwen3", max_shard_size="200KB"), folder)
    shards = sorted(folder.glob("*.safetensors"))
    shards[1].unlink()
    with pytest.raises(ValueError, match=shards[1].name):
        load_model(str(folder))
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    with pytest.raises(ValueError, match=r"no \*\.safetensors file"):
        load_model(str(folder))


def test_a_tensor_in_two_files_is_named(make_model, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(make_model("qwen2"), folder)
    tensors = load_file(folder / FILE)
    save_file({"model.norm.weight": tensors["model.norm.weight"]}, folder / "more.safetensors")
    index = {"weight_map": {**dict.fromkeys(tensors, FILE), "model.norm.weight": "more.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"model\.norm\.weight is in model\.safetensors and in more\.safetensors"):
        load_model(str(folder))


def test_hub_id(make_model, monkeypatch):
    folder = make_model("qwen2")
    asked = []

    def download(name: str, allow_patterns: list[str]) -> str:
        asked.append(name)
        assert "*.safetensors" in allow_patterns
        return str(folder)

    monkeypatch.setattr("s1engine.models.weights.snapshot_download", download)
    assert resolve_model_path("someone/a-model") == folder
    assert load_model("someone/a-model").config.vocab_size == 1000
    assert asked == ["someone/a-model"] * 2
    assert resolve_model_path(str(folder)) == folder and len(asked) == 2


PEAK_MEMORY = """
import sys, threading, torch
from s1engine.models import load_model

def anonymous():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))

load_model(sys.argv[1])  # everything that is imported or started only once
before, peak, done = anonymous(), 0, threading.Event()

def watch():
    global peak
    while not done.wait(0.0005):
        peak = max(peak, anonymous())

thread = threading.Thread(target=watch)
thread.start()
model = load_model(sys.argv[2], packed=sys.argv[3] == "packed")
done.set()
thread.join()
print(max(peak, anonymous()) - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the process's memory from Linux's /proc")
@pytest.mark.parametrize("layout", ["packed", "plain"])
def test_no_second_copy_in_memory(layout, make_model):
    small = make_model("qwen2", dtype=torch.bfloat16)
    large = make_model("qwen2", dtype=torch.bfloat16, vocab_size=100000, hidden_size=512, intermediate_size=8192)
    size = (large / FILE).stat().st_size
    assert size > 200e6
    command = [sys.executable, "-c", PEAK_MEMORY, str(small), str(large), layout]
    taken = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])
    assert 0.9 * size < taken < 1.1 * size
