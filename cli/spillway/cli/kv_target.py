"""Which store a `spillway kv` command is about: an index in Redis, some of its nodes, a disk directory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from spillway.api.errors import SpillwayError
from spillway.cli.peer_options import PeerSecrets
from spillway.kvstore.errors import KVStoreError
from spillway.kvstore.identity import HASH_BYTES, BlockHash
from spillway.kvstore.index.redis_scripts import Keys
from spillway.kvstore.operations.nodes import NodeCall
from spillway.kvstore.operations.shared_index import Node, SharedIndex
from spillway.kvstore.peer.config import PeersConfig
from spillway.kvstore.tiers.disk.audit import ShareView, shares_of

EXIT_NOT_ALL = 3
"""The command did its work, and what it found is not all well: damaged, missing or unreachable."""
_SHORTEST_START = 8
_STALL_S = 10.0


class KvError(SpillwayError):
    """What was asked of a live store cannot be had."""


@dataclass(frozen=True, slots=True)
class KvTarget:
    """What the options said. ``identity``: the beginning of an identity's digest, empty for all."""

    index_url: str | None
    disk_dir: Path | None
    identity: str
    nodes: tuple[str, ...]
    secrets: PeerSecrets


@dataclass(frozen=True, slots=True)
class Space:
    """The nodes that share the blocks of one identity."""

    keys: Keys
    nodes: tuple[Node, ...]

    @property
    def block_bytes(self) -> int:
        """One block on the device; 0 if no node says."""
        return max((node.about.block_bytes for node in self.nodes), default=0)


@contextmanager
def explained() -> Iterator[None]:
    """What the store raises becomes a message and exit status 1."""
    try:
        yield
    except KVStoreError as error:
        raise KvError(str(error)) from error


@contextmanager
def opened(target: KvTarget) -> Iterator[SharedIndex | None]:
    """The index, None if none was named. Raises KvError, also if there is no disk directory either."""
    if target.index_url is None:
        if target.disk_dir is None:
            raise KvError("which store?", "Give --kv-index (or the variable SPILLWAY_KV_INDEX), --disk-dir, or both.")
        if target.nodes:
            raise KvError("nodes are found through an index", "Give --kv-index.")
        yield None
        return
    with explained():
        index = SharedIndex(target.index_url)
        try:
            yield index
        finally:
            index.close()


def spaces(index: SharedIndex, target: KvTarget) -> list[Space]:
    """Those that the target is about. Raises KvError if it names what is not there."""
    found = [Space(keys, tuple(index.nodes(keys))) for keys in index.namespaces()]
    wanted = target.identity.lower()
    if wanted:
        known = [space.keys.namespace for space in found]
        found = [space for space in found if space.keys.namespace.startswith(wanted[: len(space.keys.namespace)])]
        if not found:
            raise KvError(f"no blocks of identity {wanted} in the index", f"Known: {', '.join(known) or 'none'}.")
    names = {node.name for space in found for node in space.nodes}
    missing = sorted(set(target.nodes) - names)
    if missing:
        raise KvError(f"no node {', '.join(missing)} in the index", f"Known: {', '.join(sorted(names)) or 'none'}.")
    if not target.nodes:
        return found
    chosen = [Space(each.keys, tuple(node for node in each.nodes if node.name in target.nodes)) for each in found]
    return [space for space in chosen if space.nodes]


def living(found: list[Space], verb: str) -> list[Node]:
    """Living nodes that can be spoken to. Raises KvError if there are none."""
    nodes = [node for space in found for node in space.nodes if node.live and node.address]
    if not nodes:
        raise KvError(f"there is no living node to {verb}", "See `spillway kv status`; agents need --peer-listen.")
    return nodes


def call(node: Node, secrets: PeerSecrets) -> NodeCall:
    """A connection to ``node``. Raises KvError for the caller's own files, `NodeUnreachableError` for the node."""
    token = secrets.read_token()
    if not token:
        raise KvError("agents do as their peers say, and those know a secret", "Give the agents' --peer-token-file.")
    tls = secrets.tls()
    with explained():
        config = PeersConfig(
            token, stall_s=_STALL_S, client_tls=tls.client() if tls else None, tls_name=tls.name if tls else ""
        )
    return NodeCall(node, config)


def shares(target: KvTarget) -> list[ShareView]:
    """The shares of the target's disk directory, none without one; ``identity`` selects. Raises KvError."""
    if target.disk_dir is None:
        return []
    with explained():
        return [share for share in shares_of(target.disk_dir) if share.identity.startswith(target.identity.lower())]


def parse_hash(text: str) -> bytes:
    """A block's hash, or its first eight hex digits or more. Raises KvError."""
    try:
        start = bytes.fromhex(text)
    except ValueError:
        start = b""
    if not _SHORTEST_START // 2 <= len(start) <= HASH_BYTES:
        raise KvError(
            f"{text!r} is no block hash", f"Write {2 * HASH_BYTES} hex digits, or the first {_SHORTEST_START} or more."
        )
    return start


def whole_hashes(index: SharedIndex, found: list[Space], starts: list[bytes]) -> list[BlockHash]:
    """The blocks that ``starts`` stand for, as the index knows them. Raises KvError for one that it does not know."""
    known = [block for space in found for block in index.find(space.keys, space.nodes, starts)]
    for start in starts:
        if len(start) < HASH_BYTES and not any(block.startswith(start) for block in known):
            raise KvError(f"the index knows no block {start.hex()}…", "Write all of its hash, or look with kv where.")
    return list(dict.fromkeys([*known, *(BlockHash(start) for start in starts if len(start) == HASH_BYTES)]))
