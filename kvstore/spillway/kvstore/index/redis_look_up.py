"""Where the blocks of a chain are: one call, and few steps in it where a node entered them one after another.

A block alone costs a step: find its bucket, find it there, see whose leases hold. But a node mostly enters the blocks
of a chain together, and its segments (see `redis_scripts`) keep their order, whichever way round. So where a block is
found, the longest run of marks that its segment has in common with the chain is looked for as a whole, and its blocks
are done; the next ones are looked for in the same segment and in those beside it first. Puts are mostly of one length,
so the last length that was seen twice is tried first.

Strings are what costs in there: Lua hashes every byte of each. So a block is asked for by its mark, 8 bytes of its
name: two blocks with one mark would cost a load that comes back empty, not a wrong byte.

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
local marks_asked, count, leases, out = ARGV[5], #ARGV[5] / 8, {}, {}

local function living(number)
  local lease = leases[number]
  if lease == nil then
    local text = call('HGET', KEYS[1], number)
    lease = {0}
    if text then
      local generation, ends, length = string.match(text, '^(%d+)|(%d+)|.*|(%d+)$')
      if holds(ends, length) then lease = {tonumber(generation), text} end
    end
    leases[number] = lease
  end
  return lease[1]
end

local function tell(places, blocks)
  if out[#out - 1] == places then out[#out] = out[#out] + blocks
  else out[#out + 1] = places; out[#out + 1] = blocks end
end

local number, bits, segment, marks, place, at_hand
local opened, backwards, at_the_end = {}, false, false
local guess, expected, before = 32, 32, 0

local function turn_to(its_number, generation, its_bits)
  if its_number ~= number or its_bits ~= bits then opened = {} end
  number, bits, at_hand = its_number, its_bits, start .. 's:' .. its_number
  place = struct.pack('>I4I4I4', number, generation, bits)
end

local function open(which)
  segment = which
  if not opened[segment] then opened[segment] = call('HGET', at_hand, bits .. ':' .. segment) or '' end
  marks = opened[segment]
end

local function find(i, n)
  local wanted, at = sub(marks_asked, 8 * i - 7, 8 * (i + n - 1)), 0
  repeat at = string.find(marks, wanted, at + 1, true) until not at or at % 8 == 1
  return at
end

local function same(i, at)
  return sub(marks, at, at + 7) == sub(marks_asked, 8 * i - 7, 8 * i)
end

local function longest(i, low, most)
  local high = min(2 * low, most)
  while low < high and find(i, high) do low, high = high, min(2 * high, most) end
  high = high - 1
  while low < high do
    local middle = math.ceil((low + high) / 2)
    if find(i, middle) then low = middle else high = middle - 1 end
  end
  return low
end

local function measured(i)
  local first = find(i, 1)
  if not first then return 0, 0 end
  local room = (#marks - first + 1) / 8
  local most = min(room, count - i + 1)
  local run = min(expected, most)
  if run > 1 and not find(i, run) then run = run > guess and find(i, guess) and guess or 1 end
  if run < most and same(i + run, first + 8 * run) then run = longest(i, run, most) end
  backwards = run == 1 and first > 8 and i < count and same(i + 1, first - 8)
  if not backwards then return run, room - run end
  room, most = (first + 7) / 8, min((first + 7) / 8, count - i + 1)
  repeat run = run + 1 until run == most or not same(i + run, first - 8 * run)
  return run, room - run
end

local function run_from(i)
  local run, room = measured(i)
  if run > 0 then
    at_the_end = room == 0
    if expected == guess and not at_the_end then
      if run == before then guess = run end
      before = run
    end
    expected = at_the_end and (run < guess and guess - run or 128) or guess
  end
  return run
end

local function run_on(i)
  local run, here = run_from(i), segment
  local step = backwards and at_the_end and -1 or 1
  for _ = 1, 2 do
    if run > 0 then break end
    open(here + step)
    run, step = run_from(i), -step
  end
  return run
end

local known, i, again, pause = {}, 1, 1, 1
while i <= count do
  local run = marks and run_on(i) or 0
  if run > 0 then
    tell(place, run)
    i = i + run
  else
    marks = nil
    local mark = sub(marks_asked, 8 * i - 7, 8 * i)
    local entry = call('HGET', start .. 'b:' .. unpack('>I4', mark) % buckets, mark)
    local places = entry and sub(entry, 25) or ''
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
        local n, g, its, where = unpack('>I4I4I4I4', places, p)
        if n ~= own and living(n) == g then
          turn_to(n, g, its)
          open(where)
          run = run_from(i)
          if run > 1 then break end
        end
      end
      if run > 1 then
        tell(place, run - 1)
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
"""KEYS leases. ARGV own number, past gaps ("1" or "0"), what every key starts with, buckets, and the marks of all
blocks.

Runs, each as places and a number of blocks: the places on other living nodes of each block or, without going past gaps,
some place of each before the first that has none. Then number and lease of nodes, those among them. A place is 12
bytes here: node number, generation, tiers as bits.
"""


def marks_of(names: bytes) -> bytes:
    """The last argument, for blocks whose names are ``names``, one after another."""
    return np.frombuffer(names, np.uint64).reshape(-1, HASH_BYTES // MARK_BYTES)[:, 0].tobytes()
