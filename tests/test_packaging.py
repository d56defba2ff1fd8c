"""What an installed wheel holds, and what a checkout's folders must never stand in front of.

Wheels are built from a copy of the tree: a build in the checkout leaves its `build` folder, and takes from it.
"""

import csv
import importlib.metadata
import io
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAPPED = ("kernels", "train", "bench")


def python(*arguments: str, cwd: Path, **environment: str) -> str:
    """Runs this interpreter and returns its output; a failure shows both streams."""
    done = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{' '.join(arguments)}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def build_wheel(folder: Path, **environment: str) -> tuple[Path, str]:
    """Builds a wheel from a copy of the tree under `folder`, without a network; returns it and the build's log."""
    source = folder / "source"
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy2(ROOT / name, source)
    for name in ("s1engine", "csrc", *MAPPED):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    command = ("-m", "pip", "wheel", "-v", "--no-deps", "--no-index", "--no-build-isolation", "-w", str(folder), ".")
    log = python(*command, cwd=source, **environment)
    (wheel,) = folder.glob("*.whl")
    return wheel, log


def recorded(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        (record,) = (name for name in archive.namelist() if name.endswith(".dist-info/RECORD"))
        return {row[0] for row in csv.reader(io.TextIOWrapper(archive.open(record), "utf-8"))}


@pytest.fixture(scope="module")
def wheel_and_log(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    return build_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def wheel(wheel_and_log: tuple[Path, str]) -> Path:
    return wheel_and_log[0]


def test_wheel_installs_one_top_level_package(wheel: Path) -> None:
    tops = {name.split("/")[0] for name in recorded(wheel)}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"s1engine"}


def test_wheel_holds_every_source_and_data_file(wheel: Path) -> None:
    source = wheel.parent / "source"

    def below(folder: str, pattern: str) -> set[str]:
        names = {path.relative_to(source).as_posix() for path in (source / folder).rglob(pattern) if path.is_file()}
        return names if folder == "s1engine" else {f"s1engine/{name}" for name in names}

    files = recorded(wheel)
    assert {name for name in files if name.endswith(".py")} == set().union(
        *(below(folder, "*.py") for folder in ("s1engine", *MAPPED))
    )
    model = below("train/tiny/model", "*")
    assert model, "the small trained model is part of the project"
    assert model <= files
    assert "s1engine/py.typed" in files
    assert not [name for name in files if "__pycache__" in name]


@pytest.mark.skipif(
    not any(shutil.which(compiler) for compiler in (os.environ.get("CXX", "c++"), "g++")), reason="no C++ compiler"
)
def test_wheel_holds_the_native_libraries(wheel_and_log: tuple[Path, str]) -> None:
    wheel, log = wheel_and_log
    for library in ("s1engine/_native", "s1engine/_ops"):
        assert any(name.startswith(library) for name in recorded(wheel)), log


def test_wheel_builds_without_a_compiler(tmp_path: Path) -> None:
    false = shutil.which("false")
    assert false is not None
    wheel, log = build_wheel(tmp_path, CC=false, CXX=false)
    files = recorded(wheel)
    assert "s1engine/__init__.py" in files
    for library in ("_native", "_ops"):
        assert not [name for name in files if name.startswith(f"s1engine/{library}")]
        assert library in log and "failed" in log, log  # pip shows it with -v


def test_installed_wheel_imports_from_elsewhere(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "site"
    python("-m", "pip", "install", "--no-deps", "--no-index", "--target", str(target), str(wheel), cwd=tmp_path)
    modules = ["s1engine"]
    for folder in MAPPED:
        # One module of each mapped folder, the one with the shortest name: the test knows no module by name.
        paths = [path.relative_to(ROOT).with_suffix("") for path in (ROOT / folder).rglob("[!_]*.py")]
        modules.append("s1engine." + min((".".join(path.parts) for path in paths), key=lambda name: (len(name), name)))
    code = "import importlib, sys\nfor name in sys.argv[1:]: print(importlib.import_module(name).__file__)"
    files = python("-c", code, *modules, cwd=tmp_path, PYTHONPATH=str(target)).splitlines()
    assert len(files) == len(modules)
    assert all(Path(file).is_relative_to(target) for file in files), files


def test_mapped_folders_are_no_regular_packages() -> None:
    assert not [folder for folder in MAPPED if (ROOT / folder / "__init__.py").exists()]


def test_the_checkout_does_not_shadow_an_installed_kernels(tmp_path: Path) -> None:
    package = tmp_path / "kernels"
    package.mkdir()
    (package / "__init__.py").write_text("installed = True\n")
    # With -c the working directory comes first on sys.path, before PYTHONPATH, as it does before site-packages.
    code = "import sys, kernels; assert sys.path[0] == ''; print(kernels.__file__, kernels.installed)"
    output = python("-c", code, cwd=ROOT, PYTHONPATH=str(tmp_path), PYTHONSAFEPATH="")
    assert output.split() == [str(package / "__init__.py"), "True"]


@pytest.mark.skipif(
    any(importlib.metadata.distributions(name="kernels")),
    reason="Hugging Face's kernels is installed here",
)
def test_transformers_does_not_take_the_checkout_for_kernels() -> None:
    code = "import transformers, transformers.utils as utils; print('kernels:', utils.is_kernels_available())"
    assert "kernels: False" in python("-c", code, cwd=ROOT, PYTHONSAFEPATH="")
