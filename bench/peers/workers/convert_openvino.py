"""Exports a Hugging Face folder for OpenVINO, in bfloat16 and in int8: `python convert_openvino.py MODEL OUT`.

Both as optimum-intel does: the weights as they are, and nncf's default compression of them (int8, asymmetric, a scale
per output channel), which is that of `optimum-cli export openvino --weight-format int8`.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import nncf
import openvino
from optimum.exporters.openvino import main_export
from optimum.intel.openvino import OVConfig

FILE = "openvino_model.xml"


def convert(model: Path, out: Path) -> None:
    # A configuration, though an empty one: without any, models of a billion weights are compressed unasked.
    main_export(
        str(model),
        out / "bf16",
        task="text-generation-with-past",
        convert_tokenizer=False,
        ov_config=OVConfig(),
    )
    shutil.copytree(out / "bf16", out / "int8", ignore=shutil.ignore_patterns("openvino_model.*"))
    compressed = nncf.compress_weights(openvino.Core().read_model(out / "bf16" / FILE))
    openvino.save_model(compressed, out / "int8" / FILE, compress_to_fp16=False)


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
