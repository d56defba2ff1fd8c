"""The safetensors files of one model folder, read by memory map."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

INDEX_FILE = "model.safetensors.index.json"
STORED_DTYPES = ("F32", "BF16", "F16")


class Checkpoint:
    """Names, shapes and tensors of a checkpoint of one or more files; a context manager that holds the files open.

    A tensor that it returns lies in the mapped pages of its file: copy from it, do not keep it.
    Raises ValueError where there is no file, or one that the index names is absent.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[str, Any] = {}
        self._places: dict[str, list[str]] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Checkpoint:
        for path in _files(self.folder):
            file = self._stack.enter_context(safe_open(path, framework="pt"))
            self._files[path.name] = file
            for name in file.keys():  # noqa: SIM118  (not a mapping)
                self._places.setdefault(name, []).append(path.name)
        return self

    def __exit__(self, *error: object) -> None:
        self._files.clear()
        self._stack.close()

    def names(self) -> list[str]:
        return list(self._places)

    def tensor(self, name: str) -> Tensor:
        return self._files[self._places[name][0]].get_tensor(name)

    def problems(self, expected: dict[str, tuple[int, ...]], ignored: set[str]) -> Iterator[str]:
        """Everything that keeps the checkpoint from filling tensors of these names and shapes, one sentence each."""
        for name, files in self._places.items():
            if name in ignored:
                continue
            if len(files) > 1:
                yield f"{name} is in {' and in '.join(files)}"
            if name not in expected:
                yield f"{name} is unexpected"
                continue
            stored = self._files[files[0]].get_slice(name)
            if tuple(stored.get_shape()) != expected[name]:
                yield f"{name} has shape {list(stored.get_shape())}, expected {list(expected[name])}"
            if stored.get_dtype() not in STORED_DTYPES:
                yield f"{name} is stored as {stored.get_dtype()}, expected one of {', '.join(STORED_DTYPES)}"
        for name in expected:
            if name not in self._places:
                yield f"{name} is missing"


def _files(folder: Path) -> list[Path]:
    index = folder / INDEX_FILE
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        absent = [name for name in names if not (folder / name).is_file()]
        if absent:
            raise ValueError(f"{index}: names files that are not in the folder: {', '.join(absent)}")
        return [folder / name for name in names]
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder}: no *.safetensors file in this folder")
    return files
