"""KV cache bookkeeping against a model that stores what each physical position would hold."""

from __future__ import annotations

import random
import sys
from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from s1engine.engine.kv_cache import BlockTable, KVCache, OutOfBlocks


def filled(cache: KVCache, tokens: list[int], tail: int = 0) -> BlockTable:
    """A sequence that has computed `tokens` and registered what is final; `tail` more positions are reserved."""
    table = cache.match(tokens, len(tokens))
    cache.reserve(table, table.num_registered * cache.block_size, len(tokens) + tail)
    cache.register(table, tokens, len(tokens))
    return table


def test_prefix_hit_takes_whole_blocks_up_to_max_tokens() -> None:
    cache = KVCache(8, 4)
    first = filled(cache, list(range(10)))
    assert len(first.blocks) == 3 and first.num_registered == 2
    assert cache.match(list(range(10)), 10).blocks == first.blocks[:2]
    assert cache.match(list(range(8)), 7).blocks == first.blocks[:1]
    assert cache.match([0, 1, 2, 3, 9, 5, 6, 7], 8).blocks == first.blocks[:1]
    assert cache.match([9, 1, 2, 3, 4, 5, 6, 7], 8).blocks == []  # the second block's tokens agree, its prefix does not
    assert cache.match([0, 1, 2], 3).blocks == []


def test_without_prefix_caching_nothing_is_kept() -> None:
    cache = KVCache(4, 2, enable_prefix_caching=False)
    table = filled(cache, [1, 2, 3, 4])
    assert table.num_registered == 0
    assert cache.match([1, 2, 3, 4], 4).blocks == []
    cache.free(table)
    assert cache.match([1, 2, 3, 4], 4).blocks == [] and cache.num_free_blocks == 4
    cache.check([])


def test_matching_hashes_lazily() -> None:
    class Counting(list[int]):
        read = 0

        def __getitem__(self, key):
            result = super().__getitem__(key)
            Counting.read += len(result) if isinstance(key, slice) else 1
            return result

    cache = KVCache(64, 4)
    filled(cache, [7] * 8 + [1] * 40)
    cache.match(Counting([7] * 8 + [2] * 40), 48)
    assert Counting.read == 12  # two hits and the miss

    Counting.read = 0
    table = filled(cache, [3] * 40)
    tokens = Counting([3] * 44)
    cache.reserve(table, 40, 44)
    cache.register(table, tokens, 44)
    assert Counting.read == 4  # the new block alone


def test_eviction_is_least_recently_used_and_tail_first() -> None:
    cache = KVCache(6, 1)
    a, b = filled(cache, [1, 2, 3]), filled(cache, [5, 6, 7])
    cache.free(a)
    cache.free(b)
    assert cache.num_free_blocks == 6
    cache.free(cache.match([1, 2, 3], 1))  # touches the head of a: now the youngest
    fresh = cache.match([], 0)
    cache.reserve(fresh, 0, 3)  # evicts 3, 2 (of a), then 7 (of b)
    assert len(cache.match([1, 2, 3], 3).blocks) == 1
    assert len(cache.match([5, 6, 7], 3).blocks) == 2


def test_unused_blocks_go_before_cached_ones() -> None:
    cache = KVCache(4, 2)
    cache.free(filled(cache, [1, 2, 3, 4]))
    table = cache.match([], 0)
    cache.reserve(table, 0, 4)
    assert len(cache.match([1, 2, 3, 4], 4).blocks) == 2


def test_out_of_blocks_changes_nothing() -> None:
    cache = KVCache(3, 2)
    table = cache.match([], 0)
    cache.reserve(table, 0, 3)
    other = cache.fork(table, 3)
    before = (list(other.blocks), cache.num_free_blocks)
    assert cache.blocks_needed(other, 3, 5) == 2  # one copy, one new block
    with pytest.raises(OutOfBlocks, match="2 blocks needed, 1 of 3 free"):
        cache.reserve(other, 3, 5)
    assert (list(other.blocks), cache.num_free_blocks) == before
    cache.check([table, other])


def test_fork_copies_on_first_write_only() -> None:
    cache = KVCache(8, 4)
    trunk = cache.match([], 0)
    cache.reserve(trunk, 0, 6)
    branches = [cache.fork(trunk, 6) for _ in range(2)]
    old = trunk.blocks[1]
    [(source, copy)] = cache.reserve(branches[0], 6, 7)
    assert source == old and branches[0].blocks == [trunk.blocks[0], copy]
    assert cache.reserve(branches[0], 7, 8) == []  # its own by now
    assert len(cache.reserve(branches[1], 6, 7)) == 1
    assert cache.reserve(trunk, 6, 7) == []  # the last owner writes in place
    cache.check([trunk, *branches])


def test_fork_in_a_final_block_copies_it_although_nobody_else_refers_to_it() -> None:
    cache = KVCache(4, 4)
    trunk = filled(cache, [1, 2, 3, 4, 5, 6, 7, 8])
    branch = cache.fork(trunk, 6)
    assert branch.num_registered == 1
    cache.free(trunk)
    assert len(cache.reserve(branch, 6, 7)) == 1
    assert len(cache.match([1, 2, 3, 4, 5, 6, 7, 8], 8).blocks) == 2  # still cached, and untouched
    cache.register(branch, [1, 2, 3, 4, 5, 6, 9, 9], 6)
    cache.reserve(branch, 7, 8)
    cache.register(branch, [1, 2, 3, 4, 5, 6, 9, 9], 8)
    assert cache.match([1, 2, 3, 4, 5, 6, 9, 9], 8).blocks == branch.blocks


def test_a_duplicate_continues_the_chain_and_replaces_its_evicted_equal() -> None:
    cache = KVCache(4, 1)
    first, second = cache.match([], 0), cache.match([], 0)
    for table in (first, second):
        cache.reserve(table, 0, 1)
    for table in (first, second):
        cache.register(table, [5], 1)
    cache.reserve(second, 1, 2)
    cache.register(second, [5, 6], 2)
    assert cache.match([5, 6], 2).blocks == [first.blocks[0], second.blocks[1]]

    cache = KVCache(3, 1)
    tables = [cache.match([], 0) for _ in range(2)]
    for table in tables:
        cache.reserve(table, 0, 1)
    for table in tables:
        cache.register(table, [5], 1)
    cache.free(tables[0])
    hog = cache.match([], 0)
    cache.reserve(hog, 0, 2)  # evicts the cached one
    duplicate = tables[1].blocks[0]
    assert cache.match([5], 1).blocks == []
    cache.free(tables[1])
    assert cache.match([5], 1).blocks == [duplicate]


def test_reset_forgets_everything_and_live_tables_stay_out() -> None:
    cache = KVCache(8, 2)
    live = filled(cache, [1, 2, 3, 4], tail=2)
    cache.free(filled(cache, [9, 9]))
    cache.reset_prefix_cache()
    assert cache.match([1, 2, 3, 4], 4).blocks == [] and cache.match([9, 9], 2).blocks == []
    fork = cache.fork(live, 4)
    for table in (live, fork):
        cache.register(table, [1, 2, 3, 4], 4)
    assert cache.match([1, 2, 3, 4], 4).blocks == []
    cache.check([live, fork])
    for table in (live, fork):
        cache.free(table)
    assert cache.num_free_blocks == 8
    filled(cache, [1, 2, 3, 4])
    assert len(cache.match([1, 2, 3, 4], 4).blocks) == 2


def test_misuse_is_refused() -> None:
    with pytest.raises(ValueError, match="num_blocks=0"):
        KVCache(0, 4)
    with pytest.raises(ValueError, match="block_size=0"):
        KVCache(4, 0)
    cache = KVCache(8, 2)
    table = filled(cache, [1, 2, 3])
    with pytest.raises(ValueError, match="num_tokens=5"):
        cache.fork(table, 5)
    with pytest.raises(ValueError, match="num_final=4"):
        cache.register(table, [1, 2, 3], 4)
    with pytest.raises(ValueError, match=r"range \[1, 3\)"):
        cache.reserve(table, 1, 3)  # writes into a final block
    with pytest.raises(ValueError, match=r"range \[6, 7\)"):
        cache.reserve(table, 6, 7)  # leaves a gap
    with pytest.raises(ValueError, match=r"range \[3, 2\)"):
        cache.reserve(table, 3, 2)
    cache.free(table)
    cache.free(table)
    cache.check([])


@pytest.mark.parametrize("fault", ["leak", "double", "count"])
def test_check_sees_faults(fault: str) -> None:
    cache = KVCache(4, 2)
    table = filled(cache, [1, 2, 3])
    cache.check([table])
    if fault == "leak":
        cache._unused.pop()
    elif fault == "double":
        cache._unused.append(table.blocks[0])
    else:
        cache._ref_counts[table.blocks[0]] += 1
    with pytest.raises(AssertionError):
        cache.check([table])


@dataclass(eq=False)
class Sequence:
    table: BlockTable
    tokens: list[int]
    # What the KV of each computed position must be: the weights and the whole prefix that it was computed from.
    computed: list[tuple[object, ...]] = field(default_factory=list)


class KVCacheMachine(RuleBasedStateMachine):
    """Any order of operations; each physical position holds what was last written or copied there."""

    sequences = Bundle("sequences")
    # Two tokens and few blocks: equal prefixes, duplicates and evictions are the rule.
    token_lists = st.lists(st.integers(0, 1), max_size=7)

    @initialize(target=sequences, num_blocks=st.integers(1, 16), block_size=st.integers(1, 3), dice=st.integers(0, 7))
    def make(self, num_blocks: int, block_size: int, dice: int) -> Sequence:
        self.cache = KVCache(num_blocks, block_size, enable_prefix_caching=dice < 7)
        self.memory: dict[int, object] = {}
        self.live: list[Sequence] = []
        self.weights = 0
        return self.admit([0] * block_size, 1, 0)

    def slot(self, table: BlockTable, position: int) -> int:
        size = self.cache.block_size
        return table.blocks[position // size] * size + position % size

    def write(self, sequence: Sequence, extra: int) -> None:
        """Compute all known tokens, `extra` more positions being reserved in advance."""
        start, end = len(sequence.computed), len(sequence.tokens)
        cache, table, size = self.cache, sequence.table, self.cache.block_size
        before = (list(table.blocks), cache.num_free_blocks)
        needed = cache.blocks_needed(table, start, end + extra)
        try:
            copies = cache.reserve(table, start, end + extra)
        except OutOfBlocks:
            assert needed > cache.num_free_blocks
            assert (table.blocks, cache.num_free_blocks) == before
            del sequence.tokens[start:]
            return
        assert needed == len(copies) + len(table.blocks) - len(before[0])
        for source, destination in copies:
            assert source in before[0] and destination not in before[0]
            for offset in range(size):
                self.memory[destination * size + offset] = self.memory.get(source * size + offset)
        cached = set(cache._cached.values())
        for position in range(start, end):
            slot = self.slot(table, position)
            owners = sum(slot // size in other.table.blocks for other in self.live)
            assert owners == 1, "a shared block is written"
            assert slot // size not in cached, "a registered block is written"
            content = (self.weights, *sequence.tokens[: position + 1])
            self.memory[slot] = content
            sequence.computed.append(content)

    @rule(target=sequences, tokens=token_lists, extra=st.integers(0, 2), less=st.integers(0, 2))
    def begin(self, tokens: list[int], extra: int, less: int) -> Sequence:
        return self.admit(tokens, extra, less)

    def admit(self, tokens: list[int], extra: int, less: int) -> Sequence:
        table = self.cache.match(tokens, len(tokens) - less)
        hit = len(table.blocks) * self.cache.block_size
        assert hit <= max(0, len(tokens) - less)
        sequence = Sequence(table, list(tokens))
        for position in range(hit):
            content = (self.weights, *tokens[: position + 1])
            assert self.memory[self.slot(table, position)] == content, "a hit that holds something else"
            sequence.computed.append(content)
        self.live.append(sequence)
        self.write(sequence, extra)
        return sequence

    @rule(sequence=sequences, tokens=token_lists, extra=st.integers(0, 2))
    def append(self, sequence: Sequence, tokens: list[int], extra: int) -> None:
        sequence.tokens += tokens
        self.write(sequence, extra)

    @rule(sequence=sequences, short=st.integers(0, 3))
    def register(self, sequence: Sequence, short: int) -> None:
        self.cache.register(sequence.table, sequence.tokens, max(0, len(sequence.computed) - short))

    @rule(sequence=sequences, back=st.integers(0, 5))
    def rewind(self, sequence: Sequence, back: int) -> None:
        num_tokens = len(sequence.computed) - back
        if num_tokens < sequence.table.num_registered * self.cache.block_size:
            return  # final tokens are never taken back
        del sequence.tokens[num_tokens:], sequence.computed[num_tokens:]

    @rule(target=sequences, sequence=sequences, back=st.integers(0, 5))
    def fork(self, sequence: Sequence, back: int) -> Sequence:
        num_tokens = max(0, len(sequence.computed) - back)
        branch = Sequence(
            self.cache.fork(sequence.table, num_tokens), sequence.tokens[:num_tokens], sequence.computed[:num_tokens]
        )
        self.live.append(branch)
        return branch

    @rule(sequence=consumes(sequences))
    def free(self, sequence: Sequence) -> None:
        self.cache.free(sequence.table)
        self.live.remove(sequence)

    @rule(dice=st.integers(0, 7))
    def change_weights(self, dice: int) -> None:
        if dice == 7:  # seldom, or nothing would stay cached for long
            self.weights += 1
            self.cache.reset_prefix_cache()

    @invariant()
    def consistent(self) -> None:
        self.cache.check([sequence.table for sequence in self.live])
        used = {block for sequence in self.live for block in sequence.table.blocks}
        assert self.cache.num_free_blocks == self.cache.num_blocks - len(used)
        for sequence in self.live:
            held = [self.memory[self.slot(sequence.table, i)] for i in range(len(sequence.computed))]
            assert held == sequence.computed, "a sequence reads something that it did not write"


TestKVCacheMachine = KVCacheMachine.TestCase
TestKVCacheMachine.settings = settings(max_examples=200, stateful_step_count=50, deadline=None, derandomize=True)


@pytest.mark.parametrize("num_blocks, block_size", [(2, 1), (5, 3), (9, 2), (16, 1), (24, 2)])
def test_long_random_walk(num_blocks: int, block_size: int) -> None:
    """The same model over thousands of steps: states that take longer to reach than Hypothesis looks."""
    rng = random.Random(num_blocks)
    machine = KVCacheMachine()
    machine.make(num_blocks, block_size, 0)
    for _ in range(3000):
        tokens = [rng.randint(0, 1) for _ in range(rng.randint(0, 7))]
        sequence = rng.choice(machine.live) if machine.live else None
        names = ("begin", "append", "register", "rewind", "fork", "free", "reset")
        [step] = rng.choices(names, (4, 4, 6, 2, 2, 3, 0.3))
        if step == "begin":
            machine.begin(tokens, rng.randint(0, 2), rng.randint(0, 2))
        elif step == "reset":
            machine.change_weights(7)
        elif sequence is None:
            continue
        elif step == "append":
            machine.append(sequence, tokens, rng.randint(0, 2))
        elif step == "free" or len(machine.live) > 8:
            machine.free(sequence)
        else:
            getattr(machine, step)(sequence, rng.randint(0, 5))
        machine.consistent()


def test_cost_does_not_grow_with_the_cache() -> None:
    """Counts the Python lines that a block's operations run, in a small and in a large cache."""

    def lines(num_blocks: int) -> int:
        cache = KVCache(num_blocks, 16)
        rng = random.Random(0)
        for _ in range(num_blocks // 8):  # full of evictable blocks
            cache.free(filled(cache, [rng.randrange(1000) for _ in range(128)]))
        count = 0

        def trace(frame, event, arg):
            nonlocal count
            count += event == "line"
            return trace

        sys.settrace(trace)
        try:
            table = filled(cache, [5] * 64, tail=16)
            branch = cache.fork(table, 70)
            cache.reserve(branch, 70, 90)
            cache.free(table)
            cache.free(branch)
        finally:
            sys.settrace(None)
        return count

    assert lines(64) == lines(1024)
