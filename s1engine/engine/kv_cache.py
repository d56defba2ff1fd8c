"""Which physical block of the KV cache belongs to whom: reference counts, copy-on-write, prefix cache. No tensors here.

A block holds the keys and values of `block_size` consecutive positions. Sequences share blocks by reference; whoever
writes first into a block that others can see gets a copy. A full block whose tokens are final may be *registered*
under the digest of the chain of blocks that ends in it, and then serves every later sequence that starts with the same
tokens (vLLM's automatic prefix caching). A registered block outlives its last owner: it is evicted, least recently used
first, only when no unused block is left.

Every operation costs O(1) per block that it touches.
"""

from __future__ import annotations

from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b


class OutOfBlocks(Exception):
    """No free block is left; the caller has to free (preempt) a sequence first. Nothing was changed."""


@dataclass(slots=True, eq=False)
class BlockTable:
    """The blocks of one sequence. Made by `KVCache.match` or `KVCache.fork`; changed by the cache alone.

    blocks          physical block ids; block i holds positions [i * block_size, (i + 1) * block_size)
    num_registered  leading blocks that are final: entered in the prefix cache, or equal to a block that is
    last_hash       chain digest of the last of those, b"" if there is none
    epoch           the prefix cache's epoch in which the table began (see `KVCache.reset_prefix_cache`)
    own_start, own_end  positions that are known to lie in blocks which this table alone may write: whoever writes there
                    need not `reserve` it again
    """

    blocks: list[int] = field(default_factory=list)
    num_registered: int = 0
    last_hash: bytes = b""
    epoch: int = 0
    own_start: int = 0
    own_end: int = 0


class KVCache:
    """Bookkeeping of `num_blocks` blocks of `block_size` positions each.

    A block is in exactly one of three states: referenced by at least one table, unused, or evictable (registered, with
    no reference left).
    """

    def __init__(self, num_blocks: int, block_size: int, enable_prefix_caching: bool = True) -> None:
        for name, value in (("num_blocks", num_blocks), ("block_size", block_size)):
            if value < 1:
                raise ValueError(f"{name}={value!r}: must be at least 1")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self._ref_counts = [0] * num_blocks
        self._unused = list(range(num_blocks - 1, -1, -1))  # a stack: block 0 goes out first
        self._evictable: OrderedDict[int, None] = OrderedDict()  # oldest first
        # A block with a digest is final. Of several final blocks with the same digest one is in `_cached`.
        self._digests: list[bytes | None] = [None] * num_blocks
        self._cached: dict[bytes, int] = {}
        self._epoch = 0

    @property
    def num_free_blocks(self) -> int:
        """Blocks that `reserve` can hand out: unused or evictable."""
        return len(self._unused) + len(self._evictable)

    def match(self, tokens: Sequence[int], max_tokens: int) -> BlockTable:
        """A new table that references the longest cached prefix of `tokens[:max_tokens]`, in whole blocks.

        The table is empty where nothing is cached. Hashing stops at the first block that is not found. A caller that
        needs the last token's logits passes `len(tokens) - 1`, since a cached position is not computed again.
        """
        table = BlockTable(epoch=self._epoch)
        if not self.enable_prefix_caching:
            return table
        for start in range(0, min(max_tokens, len(tokens)) - self.block_size + 1, self.block_size):
            digest = self._chain(table.last_hash, tokens, start)
            block = self._cached.get(digest)
            if block is None:
                break
            self._acquire(block)
            table.blocks.append(block)
            table.last_hash = digest
        table.num_registered = len(table.blocks)
        return table

    def blocks_needed(self, table: BlockTable, start: int, end: int) -> int:
        """How many free blocks `reserve(table, start, end)` takes: those to append and those to copy into."""
        return self._num_new(table, end) + len(self._to_copy(table, start, end))

    def reserve(self, table: BlockTable, start: int, end: int) -> list[tuple[int, int]]:
        """Make positions [start, end) writable by this table alone.

        Appends blocks up to `end` and replaces existing blocks of the range that another table references or that are
        final. Returns the physical copies (source, destination) that this takes. They have to be done before anything
        else is written, and in the order of the calls or with all sources read first: a source that nobody refers to
        any more may be a later call's destination.

        Raises OutOfBlocks, with nothing changed, if `blocks_needed` exceeds `num_free_blocks`; ValueError if the range
        leaves a gap after the table's last block or reaches into its final blocks.
        """
        to_copy = self._to_copy(table, start, end)
        num_new = self._num_new(table, end)
        needed, free = num_new + len(to_copy), self.num_free_blocks
        if needed > free:
            raise OutOfBlocks(f"{needed} blocks needed, {free} of {self.num_blocks} free")
        copies = []
        for index in to_copy:
            source, destination = table.blocks[index], self._take()
            table.blocks[index] = destination
            copies.append((source, destination))
        table.blocks.extend(self._take() for _ in range(num_new))
        # Last, so that no source of a copy is handed out as a destination by this very call.
        for source, _ in reversed(copies):
            self._release(source)
        if start < end:
            if not table.own_start <= start <= table.own_end:
                table.own_start = table.own_end = start
            table.own_end = max(table.own_end, -(-end // self.block_size) * self.block_size)
        return copies

    def register(self, table: BlockTable, tokens: Sequence[int], num_final: int) -> None:
        """Enter the table's full blocks below position `num_final` into the prefix cache.

        tokens     the sequence from its first token on; only those of newly registered blocks are read
        num_final  positions whose keys and values are written and will never be rewound

        A block whose equal is cached already stays this table's own: swapping it would change block ids under a
        running sequence. It takes the other's place if that has been evicted by the time this one is freed.

        Raises ValueError if `num_final` exceeds the tokens given or the table's blocks.
        """
        if not 0 <= num_final <= min(len(tokens), len(table.blocks) * self.block_size):
            raise ValueError(
                f"num_final={num_final}: must be between 0 and both the {len(tokens)} tokens "
                f"and the {len(table.blocks) * self.block_size} positions of the table"
            )
        # What a table of an earlier epoch holds was in part computed before the reset.
        if not self.enable_prefix_caching or table.epoch != self._epoch:
            return
        for index in range(table.num_registered, num_final // self.block_size):
            block = table.blocks[index]
            digest = self._chain(table.last_hash, tokens, index * self.block_size)
            # A fork may meet blocks that its origin registered after the fork: then the digests agree.
            self._digests[block] = digest
            self._cached.setdefault(digest, block)
            table.last_hash = digest
            table.num_registered = index + 1
        table.own_start = max(table.own_start, table.num_registered * self.block_size)

    def fork(self, table: BlockTable, num_tokens: int) -> BlockTable:
        """A new table that shares the blocks which cover positions [0, num_tokens) of `table`.

        Raises ValueError if the table has fewer positions.
        """
        high = len(table.blocks) * self.block_size
        if not 0 <= num_tokens <= high:
            raise ValueError(f"num_tokens={num_tokens}: must be between 0 and the table's {high} positions")
        blocks = table.blocks[: -(-num_tokens // self.block_size)]
        for block in blocks:
            self._acquire(block)
        table.own_start = table.own_end = 0
        num_registered = min(table.num_registered, num_tokens // self.block_size)
        # A table of an earlier epoch has lost its digests, and never needs them again.
        last_hash = (self._digests[blocks[num_registered - 1]] or b"") if num_registered else b""
        return BlockTable(blocks, num_registered, last_hash, table.epoch)

    def free(self, table: BlockTable) -> None:
        """Drop all references of the table, which is empty afterwards (freeing it again does nothing)."""
        # Tails become evictable before heads: a cached tail is of no use once its head is gone.
        for block in reversed(table.blocks):
            self._release(block)
        table.blocks.clear()
        table.own_start = table.own_end = 0
        table.num_registered = 0
        table.last_hash = b""

    def reset_prefix_cache(self) -> None:
        """Forget all cached prefixes, for instance because the weights changed.

        Live tables keep their blocks, but nothing of theirs enters the prefix cache any more.
        """
        self._cached.clear()
        self._digests = [None] * self.num_blocks
        self._unused.extend(self._evictable)
        self._evictable.clear()
        self._epoch += 1

    def check(self, tables: Iterable[BlockTable]) -> None:
        """Assert that all bookkeeping agrees with the live `tables`. O(blocks); for tests and debugging."""
        tables = list(tables)
        references = Counter(block for table in tables for block in table.blocks)
        states = Counter([*references, *self._unused, *self._evictable])
        assert states == Counter(range(self.num_blocks)), "a block leaked, or is in two states"
        assert self._ref_counts == [references[block] for block in range(self.num_blocks)], "wrong reference counts"
        for digest, block in self._cached.items():
            assert self._digests[block] == digest, f"block {block} is cached under a digest that is not its own"
        for block in self._evictable:
            assert self._is_cached(block), f"block {block} is evictable, but not cached"
        for block in self._unused:
            assert self._digests[block] is None, f"unused block {block} has a digest"
        for table in tables:
            if table.own_start < table.own_end:
                assert not self._to_copy(table, table.own_start, table.own_end), "a table's own blocks are not its own"

    def _chain(self, parent: bytes, tokens: Sequence[int], start: int) -> bytes:
        content = array("q", tokens[start : start + self.block_size]).tobytes()
        return blake2b(parent + content, digest_size=16).digest()

    def _num_new(self, table: BlockTable, end: int) -> int:
        return max(0, -(-end // self.block_size) - len(table.blocks))

    def _to_copy(self, table: BlockTable, start: int, end: int) -> list[int]:
        """Indices of the table's blocks in [start, end) that it may not write in place."""
        low, high = table.num_registered * self.block_size, len(table.blocks) * self.block_size
        if not low <= start <= high or end < start:
            raise ValueError(f"range [{start}, {end}): must start in {low} (final) .. {high} and not end before")
        if start == end:
            return []
        first, last = start // self.block_size, (end - 1) // self.block_size
        return [
            index
            for index, block in enumerate(table.blocks[first : last + 1], first)
            if self._ref_counts[block] > 1 or self._digests[block] is not None
        ]

    def _is_cached(self, block: int) -> bool:
        digest = self._digests[block]
        return digest is not None and self._cached.get(digest) == block

    def _take(self) -> int:
        if self._unused:
            block = self._unused.pop()
        else:
            block, _ = self._evictable.popitem(last=False)
            digest = self._digests[block]
            assert digest is not None
            del self._cached[digest]
            self._digests[block] = None
        self._ref_counts[block] = 1
        return block

    def _acquire(self, block: int) -> None:
        if self._ref_counts[block] == 0:
            del self._evictable[block]
        self._ref_counts[block] += 1

    def _release(self, block: int) -> None:
        self._ref_counts[block] -= 1
        if self._ref_counts[block] > 0:
            return
        digest = self._digests[block]
        if digest is not None and self._cached.setdefault(digest, block) == block:
            self._evictable[block] = None
        else:
            self._digests[block] = None
            self._unused.append(block)
