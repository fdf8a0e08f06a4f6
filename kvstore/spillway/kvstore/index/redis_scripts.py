"""The changes and look-ups that Redis does in one step, in Lua, and the keys they touch.

All keys of a namespace carry one hash tag, so that a whole chain is looked up on one master of a Redis Cluster; other
identities are other namespaces and spread over the masters.

    …:leases   node number → generation|ends ms|token|node|address|tiers
    …:numbers  node → node number; under |next the highest ever given, none is given twice
    …:generations  node number → generation, only rising    …:about  node number → what a node says of itself, JSON
    …:writes   node number → writes so far: tells a node that Redis has forgotten some of them
    …:cleaner  the number of the node that deletes entries of the dead now; expires
    …:b:<n>    block → 12 bytes (node number, generation, tiers as bits) for each place; small enough to stay compact
    …:r:<n>    the numbers of all buckets that node n may have entries in: what a dead node is deleted by

Time is Redis's own, so a node whose clock jumps keeps and loses its lease like any other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

_NOW = "local t = redis.call('TIME'); local now = t[1] * 1000 + math.floor(t[2] / 1000)\n"
_MINE = """
local lease = redis.call('HGET', KEYS[1], ARGV[1])
if not lease then return -1 end
local generation, token = string.match(lease, '^(%d+)|%d+|([^|]*)|')
if generation ~= ARGV[2] or token ~= ARGV[4] then return -1 end
if (redis.call('HGET', KEYS[2], ARGV[1]) or '0') ~= ARGV[3] then return -1 end
"""

ACQUIRE = (
    _NOW
    + """
local n = redis.call('HGET', KEYS[2], ARGV[1])
if not n then n = redis.call('HINCRBY', KEYS[2], '|next', 1); redis.call('HSET', KEYS[2], ARGV[1], n) end
local old = redis.call('HGET', KEYS[1], n)
if old and ARGV[5] == '0' then
  local ends, token = string.match(old, '^%d+|(%d+)|([^|]*)|')
  if token ~= ARGV[2] and tonumber(ends) > now then return {n, 0} end
end
local g = redis.call('HINCRBY', KEYS[3], n, 1)
local value = table.concat({g, string.format('%.0f', now + ARGV[3]), ARGV[2], ARGV[1], ARGV[4]}, '|')
redis.call('HSET', KEYS[1], n, value)
redis.call('HDEL', KEYS[4], n)
redis.call('HSET', KEYS[5], n, ARGV[6])
return {n, g}
"""
)
"""KEYS leases, numbers, generations, writes, about. ARGV node, token, lease ms, "address|tiers", take over ("1"
or "0"), what the node says of itself.

Number and generation; generation 0 if another process holds the node's lease and it was not to be taken over.
"""

RENEW = (
    _NOW
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
local me = struct.pack('>I4', tonumber(ARGV[1]))
for i = 4, #KEYS do
  local at = 5 + (i - 4) * 3
  local block, bits, bucket = ARGV[at], tonumber(ARGV[at + 1]), ARGV[at + 2]
  local old, new = redis.call('HGET', KEYS[i], block) or '', ''
  for p = 1, #old, 12 do
    if string.sub(old, p, p + 3) ~= me then new = new .. string.sub(old, p, p + 11) end
  end
  if bits > 0 then
    new = new .. me .. struct.pack('>I4I4', tonumber(ARGV[2]), bits)
    redis.call('SADD', KEYS[3], bucket)
  end
  if new ~= '' then redis.call('HSET', KEYS[i], block, new) elseif old ~= '' then redis.call('HDEL', KEYS[i], block) end
end
return redis.call('HINCRBY', KEYS[2], ARGV[1], 1)
"""
)
"""KEYS leases, writes, the node's reverse set, a bucket per block. ARGV number, generation, writes, token, then per
block: its hash, tiers as bits (0 takes it out), bucket number. Writes after this one, or -1 as for `RENEW`."""

LOOK_UP = (
    _NOW
    + """
local call, leases, known, out = redis.call, {}, {}, {}
for i = 2, #KEYS do
  local places = call('HGET', KEYS[i], ARGV[i + 1]) or ''
  local found = known[places]
  if found == nil then
    found = ''
    for p = 1, #places, 12 do
      local n, g, bits = struct.unpack('>I4I4I4', places, p)
      if n ~= tonumber(ARGV[1]) then
        local lease = leases[n]
        if lease == nil then
          local text = call('HGET', KEYS[1], n)
          lease = {0}
          if text then
            local generation, ends = string.match(text, '^(%d+)|(%d+)|')
            if tonumber(ends) > now then lease = {tonumber(generation), text} end
          end
          leases[n] = lease
        end
        if lease[1] == g then found = found .. string.sub(places, p, p + 11) end
      end
    end
    known[places] = found
  end
  if found == '' and ARGV[2] == '0' then break end
  out[#out + 1] = found
end
local alive = {}
for n, lease in pairs(leases) do if lease[2] then alive[#alive + 1] = n; alive[#alive + 1] = lease[2] end end
return {out, alive}
"""
)
"""KEYS leases, a bucket per block. ARGV own number, past gaps ("1" or "0"), a hash per block. Places on other living
nodes of each block, or only of those before the first that is on none; and those nodes' leases."""

CLEAN = """
local lease = redis.call('HGET', KEYS[1], ARGV[1])
local live = lease and tonumber(string.match(lease, '^(%d+)|')) or 0
if ARGV[2] ~= tostring(live) then return -1 end
local removed, kept = 0, false
local all = redis.call('HGETALL', KEYS[3])
for i = 1, #all, 2 do
  local old, new = all[i + 1], ''
  for p = 1, #old, 12 do
    local n, g = struct.unpack('>I4I4', old, p)
    if n == tonumber(ARGV[1]) and (g ~= live or ARGV[4] == '1') then
      removed = removed + 1
    else
      if n == tonumber(ARGV[1]) then kept = true end
      new = new .. string.sub(old, p, p + 11)
    end
  end
  if new == '' then redis.call('HDEL', KEYS[3], all[i])
  elseif new ~= old then redis.call('HSET', KEYS[3], all[i], new) end
end
if not kept then redis.call('SREM', KEYS[2], ARGV[3]) end
return removed
"""
"""KEYS leases, a reverse set, a bucket. ARGV number, generation of its lease as last seen, bucket number, "1" to delete
entries of that generation too (the node is dead). Entries deleted; -1 if the node has another lease by now."""

CLEANER = """
local who = redis.call('GET', KEYS[1])
if who and who ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return 1
"""
"""KEYS cleaner. ARGV number, ms. 1 if the node may clean for so long."""

FORGET = (
    _NOW
    + """
local lease = redis.call('HGET', KEYS[1], ARGV[1])
if not lease or redis.call('SCARD', KEYS[6]) > 0 then return 0 end
local ends, node = string.match(lease, '^%d+|(%d+)|[^|]*|([^|]*)|')
if tonumber(ends) + ARGV[2] > now then return 0 end
redis.call('HDEL', KEYS[2], node)
for i, key in ipairs({KEYS[1], KEYS[3], KEYS[4], KEYS[5]}) do redis.call('HDEL', key, ARGV[1]) end
if #redis.call('HGETALL', KEYS[1]) == 0 then redis.call('HDEL', KEYS[2], '|next') end
return 1
"""
)
"""KEYS leases, numbers, generations, writes, about, the node's reverse set. ARGV number, ms. 1 if the node, without
entries and dead for so long, is forgotten: names of nodes that never come back must not pile up. With the last node
the count of numbers goes too: no entry is left that could be mistaken."""

RELEASE = (
    _NOW
    + """
local lease = redis.call('HGET', KEYS[1], ARGV[1])
if lease and string.match(lease, '^%d+|%d+|([^|]*)|') == ARGV[2] then
  redis.call('HSET', KEYS[1], ARGV[1], (string.gsub(lease, '^(%d+)|%d+', '%1|' .. string.format('%.0f', now))))
end
return 1
"""
)
"""KEYS leases. ARGV number, token. Ends the lease; its entries are invisible from now on."""


@dataclass(frozen=True, slots=True)
class Keys:
    """The names of all keys of one namespace. ``buckets`` is part of what nodes must agree on, so of the name too."""

    prefix: str
    namespace: str
    buckets: int

    def of(self, *parts: object) -> str:
        """One key."""
        tag = f"{self.prefix}:v1:{self.buckets}:{self.namespace}"
        return ":".join((f"{{{tag}}}", *(str(part) for part in parts)))

    def buckets_of(self, blocks: Sequence[bytes]) -> list[str]:
        """The key of each block's bucket."""
        start = self.of("b", "")
        return [f"{start}{self.bucket(block)}" for block in blocks]

    def bucket(self, block: bytes) -> int:
        """Which bucket ``block`` belongs into: hashes are even already."""
        return int.from_bytes(block[:4], "big") % self.buckets


def sha_of(script: str) -> str:
    """What Redis calls a loaded script by."""
    return hashlib.sha1(script.encode(), usedforsecurity=False).hexdigest()
