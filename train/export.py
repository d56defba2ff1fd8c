"""Writing a trained model as a Hugging Face folder, which transformers and s1engine load."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from s1engine.models import CausalLM, resolve_model_path
from s1engine.models.checkpoint import INDEX_FILE
from s1engine.models.weights import Place, checkpoint_places
from s1engine.train.distributed import gathered

SHARD_BYTES = 4 << 30


def export(model: CausalLM, source: str, folder: Path, rank: int) -> None:
    """Write weights, config and tokenizer. Every rank calls it; under ZeRO 3 parameters are gathered one by one.

    source  the folder or hub id that training started from: config and tokenizer are copied from there
    The folder is complete or absent: it is written beside its name first.
    """
    partial = folder.with_name(folder.name + ".partial")
    if rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    names: dict[str, str] = {}
    shard: dict[str, Tensor] = {}
    number = size = 0
    for name, tensor in named_tensors(model, keep=rank == 0):
        if rank:
            continue
        if shard and size + tensor.nbytes > SHARD_BYTES:
            number, size = number + 1, 0
            names |= _save(shard, partial / f"model-{number:05d}.safetensors")
            shard = {}
        shard[name] = tensor
        size += tensor.nbytes
    if rank:
        return
    if not number:
        _save(shard, partial / "model.safetensors")
    else:
        names |= _save(shard, partial / f"model-{number + 1:05d}.safetensors")
        (partial / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": names}, indent=2))
    for file in resolve_model_path(source).iterdir():
        if file.is_file() and file.suffix in (".json", ".jinja", ".txt", ".model") and file.name != INDEX_FILE:
            shutil.copy(file, partial)
    config = json.loads((partial / "config.json").read_text(encoding="utf-8"))
    config["dtype"] = str(model.config.dtype).removeprefix("torch.")
    config.pop("torch_dtype", None)  # the older name
    config["tie_word_embeddings"] = model.config.tie_word_embeddings
    (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)


def named_tensors(model: CausalLM, keep: bool = True) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the checkpoint by its name there, copied to the host. Collective under ZeRO 3.

    keep  without it the tensors are not copied and have no elements: for ranks that only take part
    """
    for _, places in groupby(checkpoint_places(model), key=lambda pair: id(pair[1].parameter)):
        same: list[tuple[str, Place]] = list(places)
        with gathered([same[0][1].parameter]):
            tensors = [(name, _copy(place) if keep else torch.empty(0)) for name, place in same]
        yield from tensors


def _copy(place: Place) -> Tensor:
    tensor = place.target()
    assert isinstance(tensor, Tensor)
    return tensor.to("cpu", copy=True).contiguous()


def _save(tensors: dict[str, Tensor], file: Path) -> dict[str, str]:
    save_file(tensors, file, metadata={"format": "pt"})
    return dict.fromkeys(tensors, file.name)
