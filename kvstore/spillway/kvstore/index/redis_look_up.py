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
local forth, back = ARGV[5], ARGV[6]
local count, leases, out = #forth / 8, {}, {}

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

local number, generation, bits, segment, marks
local opened, backwards, at_the_end = {}, false, false
local guess, expected, before = 32, 32, 0

local function open(which)
  segment = which
  if not opened[segment] then
    opened[segment] = call('HGET', start .. 's:' .. number, bits .. ':' .. segment) or ''
  end
  marks = opened[segment]
end

local function find(i, n)
  local wanted, at = nil, 0
  if backwards then wanted = sub(back, 8 * (count - i - n + 1) + 1, 8 * (count - i + 1))
  else wanted = sub(forth, 8 * i - 7, 8 * (i + n - 1)) end
  repeat at = string.find(marks, wanted, at + 1, true) until not at or at % 8 == 1
  return at
end

local function goes_on(i, n, at)
  if i + n > count then return false end
  local wanted = sub(forth, 8 * (i + n) - 7, 8 * (i + n))
  if backwards then return at > 1 and sub(marks, at - 8, at - 1) == wanted end
  return sub(marks, at + 8 * n, at + 8 * n + 7) == wanted
end

local function longest(i, low, room)
  local most = min(low + room, count - i + 1)
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
  local at = find(i, 1)
  if not at then return 0, 0 end
  if not goes_on(i, 1, at) then backwards = not backwards end
  local room = backwards and (at - 1) / 8 or (#marks - at - 7) / 8
  if not goes_on(i, 1, at) then return 1, room end
  local run = min(expected, 1 + room, count - i + 1)
  at = find(i, run)
  if not at then
    run = longest(i, 1, room)
  elseif goes_on(i, run, at) then
    run = longest(i, run, room + 1 - run)
  end
  return run, room + 1 - run
end

local function run_from(i)
  local run, room = measured(i)
  if run > 0 then
    at_the_end = room == 0
    if expected == guess and not at_the_end then
      if run == before then guess = run end
      before = run
    end
    expected = at_the_end and run < guess and guess - run or guess
  end
  return run
end

local function run_on(i)
  local beside = segment + (backwards and at_the_end and -1 or 1)
  local run = run_from(i)
  if run == 0 then
    open(beside)
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
    local mark = sub(forth, 8 * i - 7, 8 * i)
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
          if n ~= number or its ~= bits then opened = {} end
          number, generation, bits = n, g, its
          open(where)
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
"""KEYS leases. ARGV own number, past gaps ("1" or "0"), what every key starts with, buckets, and the marks of all
blocks, forth and back.

Runs, each as places and a number of blocks: the places on other living nodes of each block or, without going past gaps,
some place of each before the first that has none. Then number and lease of nodes, those among them. A place is 12
bytes here: node number, generation, tiers as bits.
"""


def marks_of(names: bytes) -> tuple[bytes, bytes]:
    """The last two arguments, for blocks whose names are ``names``, one after another."""
    marks = np.frombuffer(names, np.uint64).reshape(-1, HASH_BYTES // MARK_BYTES)[:, 0]
    return marks.tobytes(), marks[::-1].tobytes()
