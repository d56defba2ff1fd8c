"""The softmax that decoding and prompts share: over tiles of keys, and over splits of keys.

It is the online softmax of Milakov and Gimelshein, 2018, with powers of two: the scale of the scores contains log2(e).
The state of a row is the largest score so far, and the sum of the weights and of the weighted values relative to it.
"""

import math

import triton
import triton.language as tl

from s1engine.kernels.registry import INTERPRETED
from s1engine.kernels.triton_build import Build, ModelShape

LOG2_E = math.log2(math.e)

if INTERPRETED:
    # Triton 3.6's interpreter cannot turn its scalars into the bounds of a Python range under numpy 2.4.
    def loop_bound(value):
        return int(value.handle.data.item()) if isinstance(value, tl.tensor) else value
else:

    @triton.jit
    def loop_bound(value):
        return value


@triton.jit
def attend(
    q,
    visible,
    first,
    last,
    maximum,
    total,
    accumulator,
    table,
    k_cache,
    v_cache,
    block_stride,
    kv_head,
    scale,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Continue the softmax of the rows of `q` over the keys first to last - 1, a tile at a time.

    q                            [M, D], D a power of two, zeros from HEAD_DIM on
    visible                      int32 [M]: a row sees keys below this; looked at where MASKED is set
    maximum, total, accumulator  float32 [M], [M], [M, D]: -inf, 0 and 0 before the first key
    table                        pointer to the blocks of the sequence
    Returns the new maximum, total and accumulator. Keys that a row does not see leave its values bit for bit.
    """
    columns = tl.arange(0, q.shape[1])
    for start in range(loop_bound(first), loop_bound(last), TILE):
        keys = start + tl.arange(0, TILE)
        present = keys < last
        blocks = tl.load(table + keys // BLOCK_SIZE, mask=present, other=0).to(tl.int64)
        offsets = blocks * block_stride + ((keys % BLOCK_SIZE) * KV_HEADS + kv_head) * HEAD_DIM
        offsets = offsets[:, None] + columns[None, :]
        mask = present[:, None] & (columns < HEAD_DIM)[None, :]
        k = tl.load(k_cache + offsets, mask=mask, other=0.0)
        v = tl.load(v_cache + offsets, mask=mask, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        if MASKED:
            scores = tl.where(keys[None, :] < visible[:, None], scores, float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(scores, 1))
        # A row that has seen no key yet has no finite maximum, and -inf - -inf is not a number.
        reference = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
        weights = tl.exp2(scores - reference[:, None])
        decay = tl.exp2(maximum - reference)
        total = total * decay + tl.sum(weights, 1)
        accumulator = tl.dot(weights.to(v.dtype), v, accumulator * decay[:, None], input_precision="ieee")
        maximum = new_maximum
    return maximum, total, accumulator


@triton.jit
def merge(maximum, total, accumulator, split_maximum, split_total, split_accumulator):
    """Fold one split's softmax into that of the splits before it.

    A split without visible keys leaves the values bit for bit; the first split of a row has some, its first key.
    """
    new_maximum = tl.maximum(maximum, split_maximum)
    decay = tl.exp2(maximum - new_maximum)
    weight = tl.exp2(split_maximum - new_maximum)
    total = total * decay + split_total * weight
    accumulator = accumulator * decay[:, None] + split_accumulator * weight[:, None]
    return new_maximum, total, accumulator


@triton.jit
def normalise(total, accumulator):
    """The result of the softmax [M, D]; zeros where no key was seen."""
    return accumulator / tl.where(total == 0.0, 1.0, total)[:, None]


def builds(shape: ModelShape) -> list[Build]:
    """None: these functions are parts of other kernels."""
    return []
