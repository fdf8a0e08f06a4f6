"""Where the blocks of a chain are: one call, and few steps in it where a node entered them one after another.

A block alone costs a step: find its bucket, find it there, see whose leases hold. But a node mostly enters the blocks
of a chain together, in one direction or the other, and its segments (see `redis_scripts`) keep that order. So where a
block is found, the longest run of marks that its segment has in common with the chain, forth or back, is found by
comparing strings, and its blocks are done. A mark is 8 bytes of a block's name: two blocks with one mark would cost
a load that comes back empty, not a wrong byte.

The buckets and segments that are looked into are known only in the course of it, so they are not among KEYS. They carry
the hash tag of the one that is, hence lie on the same master of a Redis Cluster.
"""

from __future__ import annotations

import numpy as np

from ..identity import HASH_BYTES
from .redis_scripts import HOLDS, MARK_BYTES, NOW

LOOK_UP = (
    NOW
    + HOLDS
    + """
local call, sub, min, unpack = redis.call, string.sub, math.min, struct.unpack
local own, past_gaps, start, buckets = tonumber(ARGV[1]), ARGV[2] == '1', ARGV[3], tonumber(ARGV[4])
local names, forth, back = ARGV[5], ARGV[6], ARGV[7]
local count, leases, out = #names / 32, {}, {}

local function living(number)
  local lease = leases[number]
  if lease == nil then
    local text = call('HGET', KEYS[1], number)
    lease = {0}
    if text then
      local generation, ends, term = string.match(text, '^(%d+)|(%d+)|.*|(%d+)$')
      if holds(ends, term) then lease = {tonumber(generation), text} end
    end
    leases[number] = lease
  end
  return lease[1]
end

local function tell(places, blocks)
  if out[#out - 1] == places then out[#out] = out[#out] + blocks
  else out[#out + 1] = places; out[#out + 1] = blocks end
end

local marks, number, generation, bits, segment
local guess, backwards = 128, false

local function open(which)
  segment = which
  marks = call('HGET', start .. 's:' .. number, bits .. ':' .. segment) or ''
end

local function most_of(limit, same)
  if limit < 1 then return 0 end
  local low, high = min(guess, limit), limit
  if same(low) then
    if low == limit or not same(low + 1) then return low end
    low = low + 1
  else
    if not same(1) then return 0 end
    low, high = 1, low - 1
  end
  while low < high do
    local middle = math.ceil((low + high) / 2)
    if same(middle) then low = middle else high = middle - 1 end
  end
  return low
end

local function forwards_from(i, at)
  return most_of(min(count - i, (#marks - at - 7) / 8), function(n)
    return sub(marks, at + 8, at + 7 + 8 * n) == sub(forth, 8 * i + 1, 8 * (i + n))
  end)
end

local function backwards_from(i, at)
  return most_of(min(count - i, (at - 1) / 8), function(n)
    return sub(marks, at - 8 * n, at - 1) == sub(back, 8 * (count - i - n) + 1, 8 * (count - i))
  end)
end

local function run_from(i)
  local at, mark = 0, sub(forth, 8 * i - 7, 8 * i)
  repeat at = string.find(marks, mark, at + 1, true) until not at or at % 8 == 1
  if not at then return 0 end
  local run = backwards and backwards_from(i, at) or forwards_from(i, at)
  if run == 0 then
    backwards = not backwards
    run = backwards and backwards_from(i, at) or forwards_from(i, at)
  end
  if run > 0 then guess = run end
  return 1 + run
end

local function run_on(i)
  local run = run_from(i)
  if run == 0 and marks ~= '' then
    open(segment + 1)
    run = run_from(i)
  end
  return run
end

local known, i, again, pause = {}, 1, 1, 1
while i <= count do
  local run = marks and run_on(i) or 0
  if run > 0 then
    tell(struct.pack('>I4I4I4', number, generation, bits), run)
    i = i + run
  else
    marks = nil
    local name = sub(names, 32 * i - 31, 32 * i)
    local places = call('HGET', start .. 'b:' .. unpack('>I4', name) % buckets, name) or ''
    local found = known[places]
    if found == nil then
      found = ''
      for p = 1, #places, 16 do
        local n, g = unpack('>I4I4', places, p)
        if n ~= own and living(n) == g then found = found .. sub(places, p, p + 11) end
      end
      known[places] = found
    end
    if found == '' and not past_gaps then break end
    tell(found, 1)
    if not past_gaps and i >= again then
      for p = 1, #places, 16 do
        number, generation, bits, segment = unpack('>I4I4I4I4', places, p)
        if number ~= own and living(number) == generation then
          open(segment)
          run = run_from(i)
          if run > 1 then break end
        end
      end
      if run > 1 then
        tell(struct.pack('>I4I4I4', number, generation, bits), run - 1)
        i, pause = i + run - 1, 1
      else
        marks, pause, again = nil, min(2 * pause, 32), i + pause
      end
    end
    i = i + 1
  end
end
local alive = {}
for number, lease in pairs(leases) do
  if lease[2] then alive[#alive + 1] = number; alive[#alive + 1] = lease[2] end
end
return {out, alive}
"""
)
"""KEYS leases. ARGV own number, past gaps ("1" or "0"), what every key starts with, buckets, and of all blocks: names,
marks, marks backwards.

Runs, each as places and a number of blocks: the places on other living nodes of each block or, without going past gaps,
some place of each before the first that has none. Then number and lease of nodes, those among them. A place is 12
bytes here: node number, generation, tiers as bits.
"""


def of_blocks(names: bytes) -> tuple[bytes, bytes, bytes]:
    """The last three arguments, for blocks whose names are ``names``, one after another."""
    marks = np.frombuffer(names, np.uint64).reshape(-1, HASH_BYTES // MARK_BYTES)[:, 0]
    return names, marks.tobytes(), marks[::-1].tobytes()
