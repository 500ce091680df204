"""Where a prompt's prefill is cut into segments, which cuts get a snapshot, and the cache keys of blocks and snapshots.

Pure functions of tokens, boundaries and settings: a prompt has the same plan whether or not a state is found, so cached
and uncached answers are computed in the same steps. A key covers all tokens up to the end of the segment that its
position is in, all cuts up to there, the positions where the state was rounded, the model (fingerprint) and the tenant
(salt): equal keys mean equal bits.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import struct
from bisect import bisect_left, bisect_right
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

_FAR_TOKENS = 32_768
_FULL_HASH_BYTES = 1 << 28
_SAMPLE_BYTES = 1 << 16
_SAMPLE_EVERY_BYTES = 1 << 24


@dataclass(frozen=True, slots=True)
class PlanSettings:
    """`min_snapshot_distance`: a boundary nearer than this to the last chosen one gets neither cut nor snapshot; beyond
    32K tokens the distance is at least a sixteenth of the position. The last boundary is always chosen.
    `sparse_snapshot_tokens`: distance of snapshots in long stretches without a boundary, to resume after a restart; 0:
    none. All in tokens; segments and sparse snapshots lie on one grid. `int8_snapshots`: snapshots are rounded, and the
    computation continues from the rounded state.

    Raises ValueError when the grids do not fit each other.
    """

    block_tokens: int = 256
    segment_tokens: int = 512
    min_snapshot_distance: int = 2048
    sparse_snapshot_tokens: int = 8192
    int8_snapshots: bool = False

    def __post_init__(self) -> None:
        if self.block_tokens < 1 or self.segment_tokens < 1 or self.min_snapshot_distance < 0:
            raise ValueError(f"block and segment must be at least 1 token, the snapshot distance at least 0: {self}")
        if self.sparse_snapshot_tokens % self.segment_tokens:
            raise ValueError(
                f"sparse_snapshot_tokens {self.sparse_snapshot_tokens} is no multiple of "
                f"segment_tokens {self.segment_tokens}"
            )


@dataclass(frozen=True, slots=True)
class PrefixPlan:
    """Cuts and cache keys of one prompt, which the cache and the engine both follow."""

    num_tokens: int
    cuts: tuple[int, ...]  # ends of the prefill segments, ascending; the last is num_tokens
    block_tokens: int
    block_keys: tuple[str, ...]  # of KV [i * block_tokens, (i + 1) * block_tokens)
    snapshot_keys: dict[int, str]  # position -> key, ascending; every position is a cut
    tags: Mapping[str, int] = field(default_factory=dict)  # document -> position where its tokens begin
    epoch: int = 0

    def next_cut(self, position: int) -> int:
        """End of the segment that starts at `position`."""
        return self.cuts[bisect_right(self.cuts, position)]

    def keys_deepest_first(self, position: int) -> list[str]:
        """Keys of all blocks and snapshots that end within the first `position` tokens, the last end first."""
        size = self.block_tokens
        ends = [(i * size, key) for i, key in enumerate(self.block_keys[: position // size], start=1)]
        ends += [(end, key) for end, key in self.snapshot_keys.items() if end <= position]
        return [key for _, key in sorted(ends, key=lambda pair: pair[0], reverse=True)]

    def deepest(self, there: Container[str], lent_blocks: int = 0) -> int:
        """The last position whose snapshot and blocks (except the first `lent_blocks`) are all in `there` and that
        leaves at least one token to compute; 0 if there is none."""
        keys = self.block_keys
        blocks = next((i for i in range(lent_blocks, len(keys)) if keys[i] not in there), len(keys))
        for position, key in reversed(self.snapshot_keys.items()):
            if key in there and position // self.block_tokens <= blocks and position < self.num_tokens:
                return position
        return 0

    def tags_before(self, position: int) -> frozenset[str]:
        """Documents that a state of the first `position` tokens includes."""
        return frozenset(tag for tag, start in self.tags.items() if start < position)


def plan_prefix(
    root: bytes,
    token_ids: Sequence[int],
    boundaries: Iterable[int],
    settings: PlanSettings,
    tags: Mapping[str, int] | None = None,
    epoch: int = 0,
) -> PrefixPlan:
    """Plan a prompt whose reusable parts end at `boundaries`; `root` comes from `root_key`."""
    num_tokens, grid = len(token_ids), settings.segment_tokens
    snapshots = choose_snapshots(num_tokens, boundaries, settings)
    cuts = sorted({*range(grid, num_tokens, grid), *snapshots, num_tokens})
    rounded = snapshots if settings.int8_snapshots else []
    block_keys, snapshot_keys = _chain_keys(root, token_ids, cuts, snapshots, rounded, settings.block_tokens)
    return PrefixPlan(
        num_tokens, tuple(cuts), settings.block_tokens, block_keys, snapshot_keys, dict(tags or {}), epoch
    )


def choose_snapshots(num_tokens: int, boundaries: Iterable[int], settings: PlanSettings) -> list[int]:
    """Positions that get a snapshot: boundaries at the minimum distance, always the last, and a sparse grid between.

    Each choice depends only on what lies before it (except the last boundary), so prompts with a common beginning agree
    on it. What follows the snapshot has to be recomputed, which is little compared with what the snapshot saves.
    """
    ends = {position for position in boundaries if 0 < position <= num_tokens}
    sparse = settings.sparse_snapshot_tokens
    grid = range(sparse, num_tokens, sparse) if sparse else range(0)
    chosen, last = [], 0
    for position in sorted({*ends, *grid}):
        near = max(settings.min_snapshot_distance, last // 16 if last >= _FAR_TOKENS else 0)
        distance = near if position in ends else sparse
        if position - last >= distance:
            chosen.append(position)
            last = position
    return sorted({*chosen, max(ends)}) if ends else chosen


def root_key(fingerprint: bytes, salt: bytes) -> bytes:
    """First link of every key chain: two models or two tenants share nothing."""
    return hashlib.blake2b(struct.pack("<I", len(fingerprint)) + fingerprint + salt, digest_size=16).digest()


def state_fingerprint(checkpoint: Path, quantization: str | None, layout: bytes) -> bytes:
    """Identifies the model that states belong to: weights and config, quantization, and `StateLayout.fingerprint()`.

    Weight files up to 256 MiB are hashed whole; of larger ones the header and 64 KiB of every 16 MiB.
    """
    digest = hashlib.blake2b(digest_size=16)
    files = sorted([*checkpoint.glob("*.safetensors"), *checkpoint.glob("config.json")])
    whole = sum(path.stat().st_size for path in files) <= _FULL_HASH_BYTES
    for path in files:
        size = path.stat().st_size
        digest.update(struct.pack("<Q", size) + path.name.encode())
        with path.open("rb") as file:
            for start in range(0, size, _SAMPLE_EVERY_BYTES):
                file.seek(start)
                digest.update(file.read(_SAMPLE_EVERY_BYTES if whole else _SAMPLE_BYTES))
    digest.update(repr(quantization).encode() + layout)
    return digest.digest()


def _chain_keys(
    root: bytes,
    token_ids: Sequence[int],
    cuts: Sequence[int],
    snapshots: Sequence[int],
    rounded: Sequence[int],
    block_tokens: int,
) -> tuple[tuple[str, ...], dict[int, str]]:
    """Keys of the full blocks before the last snapshot, and of the snapshots.

    A block's key covers the whole segments that it lies in, since its bits depend on all of their tokens (with MoE, how
    many of them an expert gets decides how its product is computed), and the `rounded` positions up to its last token.
    A snapshot inside a block continues the chain over the block's tail.
    """
    end_of_use = max(snapshots, default=0)
    tokens = np.asarray(token_ids[:end_of_use], dtype="<i4")
    cuts = tuple(cuts[: bisect_right(cuts, end_of_use)])
    segments = tuple(
        struct.pack("<I", end) + hashlib.blake2b(tokens[start:end], digest_size=16).digest()
        for start, end in itertools.pairwise([0, *cuts])
    )
    block_keys, snapshot_keys = _link_keys(root, cuts, segments, tuple(snapshots), tuple(rounded), block_tokens)
    return block_keys, dict(snapshot_keys)


@functools.lru_cache(maxsize=64)
def _link_keys(
    root: bytes,
    cuts: tuple[int, ...],
    segments: tuple[bytes, ...],
    snapshots: tuple[int, ...],
    rounded: tuple[int, ...],
    block_tokens: int,
) -> tuple[tuple[str, ...], tuple[tuple[int, str], ...]]:
    """`_chain_keys` from the segments' digests; memoized, because all questions about a text share the result."""

    def link(previous: bytes, start: int, end: int) -> bytes:
        data = struct.pack("<I", end - start) + b"".join(
            segments[bisect_right(cuts, start) : bisect_left(cuts, end) + 1]
        )
        if rounded:
            seen = rounded[bisect_left(rounded, start) : bisect_left(rounded, end)]
            data += struct.pack(f"<{len(seen)}I", *seen)
        return hashlib.blake2b(data, key=previous, digest_size=16).digest()

    ends = range(block_tokens, max(snapshots, default=0) + 1, block_tokens)
    chain = list(itertools.accumulate(ends, lambda key, end: link(key, end - block_tokens, end), initial=root))
    snapshot_keys = []
    for position in snapshots:
        full, tail = divmod(position, block_tokens)
        digest = link(chain[full], position - tail, position) if tail else chain[full]
        snapshot_keys.append((position, f"snap:{digest.hex()}"))
    return tuple(f"kv:{digest.hex()}" for digest in chain[1:]), tuple(snapshot_keys)
