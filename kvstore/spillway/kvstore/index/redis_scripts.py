"""The changes that Redis makes in one step, in Lua, and the keys they touch. What it is asked: `redis_look_up`.

All keys of a namespace carry one hash tag, so that a whole chain is looked up on one master of a Redis Cluster; other
identities are other namespaces and spread over the masters.

    …:leases   node number → generation|ends ms|token|node|address|tiers|length ms
    …:numbers  node → node number; under |next the highest ever given, none is given twice
    …:generations  node number → generation, only rising    …:about  node number → what a node says of itself, JSON
    …:writes   node number → writes so far: tells a node that Redis has forgotten some of them
    …:cleaner  the number of the node that deletes entries of the dead now; expires
    …:b:<n>    mark, the first 8 bytes of a block's name → the other 24, then 16 bytes (node number, generation, tiers
               as bits, segment) for each place; few enough to be compact
    …:s:<n>    tiers as bits:segment → marks of the blocks that node n entered in these tiers, in this order. A block
               is in the segment that its entry names, for as long as the entry is there
    …:r:<n>    the numbers of all buckets that node n may have entries in: what a dead node is deleted by

Time is Redis's own, so a node whose clock jumps keeps and loses its lease like any other. If Redis's clock jumps back,
leases end in the far future: one that ends later than two of its lengths from now does not hold. A living node's next
renewal puts its own right.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from functools import cache

from ..identity import HASH_BYTES, BlockHash

MARK_BYTES = 8
SEGMENT_BLOCKS = 128
PLACE = struct.Struct(">IIII")
"""Node number, generation, tiers as bits, segment."""

NOW = "local t = redis.call('TIME'); local now = t[1] * 1000 + math.floor(t[2] / 1000)\n"
HOLDS = """
local function holds(ends, length)
  local left = tonumber(ends) - now
  return left > 0 and left <= 2 * tonumber(length)
end
"""
"""After `NOW`: whether a lease holds."""
_MINE = """
local lease = redis.call('HGET', KEYS[1], ARGV[1])
if not lease then return -1 end
local generation, token = string.match(lease, '^(%d+)|%d+|([^|]*)|')
if generation ~= ARGV[2] or token ~= ARGV[4] then return -1 end
if (redis.call('HGET', KEYS[2], ARGV[1]) or '0') ~= ARGV[3] then return -1 end
"""

ACQUIRE = (
    NOW
    + HOLDS
    + """
local n = redis.call('HGET', KEYS[2], ARGV[1])
if not n then n = redis.call('HINCRBY', KEYS[2], '|next', 1); redis.call('HSET', KEYS[2], ARGV[1], n) end
local old = redis.call('HGET', KEYS[1], n)
if old and ARGV[5] == '0' then
  local ends, token, length = string.match(old, '^%d+|(%d+)|([^|]*)|.*|(%d+)$')
  if token ~= '' and token ~= ARGV[2] and holds(ends, length) then return {n, 0} end
end
local g = redis.call('HINCRBY', KEYS[3], n, 1)
local value = table.concat({g, string.format('%.0f', now + ARGV[3]), ARGV[2], ARGV[1], ARGV[4], ARGV[3]}, '|')
redis.call('HSET', KEYS[1], n, value)
redis.call('HDEL', KEYS[4], n)
redis.call('HSET', KEYS[5], n, ARGV[6])
redis.call('UNLINK', ARGV[7] .. n)
return {n, g}
"""
)
"""KEYS leases, numbers, generations, writes, about. ARGV node, token, lease ms, "address|tiers", take over ("1"
or "0"), what the node says of itself, what the key of segments starts with.

Number and generation; generation 0 if another process holds the node's lease and it was not to be taken over. The
segments of older generations go, so that their numbers can be given again.
"""

RENEW = (
    NOW
    + _MINE
    + """
local ends, rest = string.match(lease, '^%d+|(%d+)(|.*)$')
if tonumber(ends) <= now then return -1 end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2] .. '|' .. string.format('%.0f', now + ARGV[5]) .. rest)
return 1
"""
)
"""KEYS leases, writes. ARGV number, generation, writes, token, lease ms.

-1 if the lease is lost or over or writes are lost.
"""

WRITE = (
    _MINE
    + """
local call, sub, pack, unpack = redis.call, string.sub, struct.pack, struct.unpack
local me, segments = pack('>I4', tonumber(ARGV[1])), {}

local function marks_of(segment)
  segments[segment] = segments[segment] or call('HGET', KEYS[4], segment) or ''
  return segments[segment]
end

local function leave(segment, mark)
  local marks, at = marks_of(segment), 0
  repeat at = string.find(marks, mark, at + 1, true) until not at or at % 8 == 1
  if at then segments[segment] = sub(marks, 1, at - 1) .. sub(marks, at + 8) end
end

for i = 5, #KEYS do
  local at = 5 + (i - 5) * 4
  local block, bits, segment = ARGV[at], tonumber(ARGV[at + 1]), tonumber(ARGV[at + 3])
  local mark, rest, new, stays = sub(block, 1, 8), sub(block, 9), '', false
  local old = call('HGET', KEYS[i], mark) or ''
  if sub(old, 1, 24) ~= rest then old = '' end
  for p = 25, #old, 16 do
    if sub(old, p, p + 3) ~= me then
      new = new .. sub(old, p, p + 15)
    else
      local its, had, where = unpack('>I4I4I4', old, p + 4)
      if its == tonumber(ARGV[2]) then
        if had == bits then segment, stays = where, true else leave(had .. ':' .. where, mark) end
      end
    end
  end
  if bits > 0 then
    new = new .. me .. pack('>I4I4I4', tonumber(ARGV[2]), bits, segment)
    if not stays then
      local own = bits .. ':' .. segment
      segments[own] = marks_of(own) .. mark
    end
    call('SADD', KEYS[3], ARGV[at + 2])
  end
  if new == '' then
    if old ~= '' then call('HDEL', KEYS[i], mark) end
  elseif rest .. new ~= old then
    call('HSET', KEYS[i], mark, rest .. new)
  end
end
for segment, marks in pairs(segments) do
  if marks == '' then call('HDEL', KEYS[4], segment) else call('HSET', KEYS[4], segment, marks) end
end
return call('HINCRBY', KEYS[2], ARGV[1], 1)
"""
)
"""KEYS leases, writes, the node's reverse set, its segments, a bucket per block. ARGV number, generation, writes,
token, then per block: its name, tiers as bits (0 takes it out), bucket number, the segment for it if it is new in these
tiers. Writes after this one, or -1 as for `RENEW`."""

CLEAN = """
local lease = redis.call('HGET', KEYS[1], ARGV[1])
local live = lease and tonumber(string.match(lease, '^(%d+)|')) or 0
if ARGV[2] ~= tostring(live) then return -1 end
if lease and ARGV[4] == '1' then
  local fenced = string.gsub(lease, '^(%d+|%d+|)[^|]*', '%1')
  if fenced ~= lease then redis.call('HSET', KEYS[1], ARGV[1], fenced) end
end
local removed, kept = 0, false
local all = redis.call('HGETALL', KEYS[3])
for i = 1, #all, 2 do
  local old, new = all[i + 1], ''
  for p = 25, #old, 16 do
    local n, g = struct.unpack('>I4I4', old, p)
    if n == tonumber(ARGV[1]) and (g ~= live or ARGV[4] == '1') then
      removed = removed + 1
    else
      if n == tonumber(ARGV[1]) then kept = true end
      new = new .. string.sub(old, p, p + 15)
    end
  end
  if new == '' then redis.call('HDEL', KEYS[3], all[i])
  elseif #new + 24 ~= #old then redis.call('HSET', KEYS[3], all[i], string.sub(old, 1, 24) .. new) end
end
if not kept then redis.call('SREM', KEYS[2], ARGV[3]) end
return removed
"""
"""KEYS leases, a reverse set, a bucket. ARGV number, generation of its lease as last seen, bucket number, "1" to delete
entries of that generation too: the node is dead, and its lease loses its token, so that it cannot be renewed whatever
the clock does. Entries deleted; -1 if the node has another lease by now."""

CLEANER = """
local who = redis.call('GET', KEYS[1])
if who and who ~= ARGV[1] and redis.call('PTTL', KEYS[1]) <= 2 * ARGV[2] then return 0 end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return 1
"""
"""KEYS cleaner. ARGV number, ms. 1 if the node may clean for so long. A key that expires far later than it can have
been given is one from before Redis's clock jumped back."""

FORGET = (
    NOW
    + """
local lease = redis.call('HGET', KEYS[1], ARGV[1])
if not lease or redis.call('SCARD', KEYS[6]) > 0 then return 0 end
local ends, node = string.match(lease, '^%d+|(%d+)|[^|]*|([^|]*)|')
if tonumber(ends) > now then return 0 end
redis.call('UNLINK', KEYS[7])
if tonumber(ends) + ARGV[2] > now then return 0 end
redis.call('HDEL', KEYS[2], node)
for i, key in ipairs({KEYS[1], KEYS[3], KEYS[4], KEYS[5]}) do redis.call('HDEL', key, ARGV[1]) end
if #redis.call('HGETALL', KEYS[1]) == 0 then redis.call('HDEL', KEYS[2], '|next') end
return 1
"""
)
"""KEYS leases, numbers, generations, writes, about, the node's reverse set, its segments. ARGV number, ms. A dead node
without entries needs no segments. 1 if it has been dead for so long, and is forgotten: names of nodes that never come
back must not pile up. With the last node the count of numbers goes too: no entry is left that could be mistaken."""

RELEASE = (
    NOW
    + """
local lease = redis.call('HGET', KEYS[1], ARGV[1])
if lease and string.match(lease, '^%d+|%d+|([^|]*)|') == ARGV[2] then
  redis.call('HSET', KEYS[1], ARGV[1], (string.gsub(lease, '^(%d+)|%d+', '%1|' .. string.format('%.0f', now))))
end
return 1
"""
)
"""KEYS leases. ARGV number, token. Ends the lease; its entries are invisible from now on."""

END = (
    NOW
    + """
if redis.call('HGET', KEYS[1], ARGV[1]) ~= ARGV[2] then return 0 end
local ends, length = string.match(ARGV[2], '^%d+|(%d+)|.*|(%d+)$')
if tonumber(ends) <= now + 2 * length then return 0 end
redis.call('HSET', KEYS[1], ARGV[1], (string.gsub(ARGV[2], '^(%d+)|%d+', '%1|' .. string.format('%.0f', now))))
return 1
"""
)
"""KEYS leases. ARGV number, lease as last seen. 1 if that is still its lease, ended too far in the future to hold, and
ends now: its node cannot renew it."""


def unpack_entry(mark: bytes, entry: bytes) -> tuple[BlockHash, list[tuple[int, int, int, int]]]:
    """The name and the places of a block, from the two sides of its entry in a bucket."""
    start = HASH_BYTES - MARK_BYTES
    return BlockHash(mark + entry[:start]), list(PLACE.iter_unpack(entry[start:]))


@dataclass(frozen=True, slots=True)
class Keys:
    """The names of all keys of one namespace. ``buckets`` is part of what nodes must agree on, so of the name too."""

    prefix: str
    namespace: str
    buckets: int

    def of(self, *parts: object) -> str:
        """One key."""
        tag = f"{self.prefix}:v2:{self.buckets}:{self.namespace}"
        return ":".join((f"{{{tag}}}", *(str(part) for part in parts)))

    def bucket(self, block: bytes) -> int:
        """Which bucket ``block`` belongs into: hashes are even already."""
        return int.from_bytes(block[:4], "big") % self.buckets


@cache
def sha_of(script: str) -> str:
    """What Redis calls a loaded script by."""
    return hashlib.sha1(script.encode(), usedforsecurity=False).hexdigest()
