"""Writes a Hugging Face folder as GGUF, in BF16 and in Q8_0: `python convert_gguf.py MODEL OUT`.

With a vocabulary of nameless tokens: only ids go in and out. Matrices are BF16 or Q8_0, vectors float32, as llama.cpp's
own converter writes them. Llama's rotation would need its query and key rows permuted, so it is not converted.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np

ARCHITECTURES = {"qwen2": gguf.MODEL_ARCH.QWEN2, "qwen3": gguf.MODEL_ARCH.QWEN3}
FILES = {
    "bf16.gguf": (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "q8_0.gguf": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}


def convert(model: Path, out: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    if config["model_type"] not in ARCHITECTURES:
        raise SystemExit(f"{config['model_type']}: only {', '.join(ARCHITECTURES)} are converted to GGUF")
    arch = ARCHITECTURES[config["model_type"]]
    names = gguf.get_tensor_name_map(arch, config["num_hidden_layers"])
    for file, (kind, file_type) in FILES.items():
        writer = gguf.GGUFWriter(out / file, gguf.MODEL_ARCH_NAMES[arch], use_temp_file=True)
        _write_sizes(writer, config)
        writer.add_file_type(file_type)
        for shard in sorted(model.glob("*.safetensors")):
            for name, values in _tensors(shard):
                kept = kind if values.ndim > 1 else gguf.GGMLQuantizationType.F32
                place = names.get_name(name, try_suffixes=(".weight", ".bias"))
                writer.add_tensor(place, gguf.quantize(values, kept), raw_dtype=kept)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def _write_sizes(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")


def _tensors(shard: Path) -> Any:
    """Name and float32 values of each bfloat16 tensor of a safetensors file: numpy has no such type to read it as."""
    data = np.memmap(shard, mode="r")
    size = int(data[:8].view(np.uint64)[0])
    for name, entry in json.loads(bytes(data[8 : 8 + size])).items():
        if name == "__metadata__":
            continue
        if entry["dtype"] != "BF16":
            raise SystemExit(f"{name} is {entry['dtype']}: only BF16 is converted")
        start, end = (8 + size + offset for offset in entry["data_offsets"])
        bits = np.frombuffer(data[start:end].tobytes(), dtype=np.uint16)
        yield name, (bits.astype(np.uint32) << 16).view(np.float32).reshape(entry["shape"])


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
