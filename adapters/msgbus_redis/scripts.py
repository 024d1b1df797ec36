"""What must be one step at the broker: Lua, loaded once a connection.

A script does not roll back: what may fail is written first, and the ack is last (a dead letter acked before a failed write is lost).
Every key of a topic carries one hash tag, so a script stays in one slot of a cluster. Moments are the server's own, in milliseconds.

In a group's pending list an entry's delivery count is 1 + the deaths of receivers that held it. What is given back is moved to the
consumer `free` with a count that is one lower; whoever takes it raises it again, so that a release is never a death.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

_COMMON = """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local function group_of(key, name)  -- all of them by number, where there is no name
  local found, groups = redis.pcall('XINFO', 'GROUPS', key), {}
  for i, flat in ipairs(found.err and {} or found) do
    groups[i] = {}
    for j = 1, #flat, 2 do groups[i][flat[j]] = flat[j + 1] end
    if groups[i].name == name then return groups[i] end
  end
  return not name and groups
end
local function give_back(key, group, entry)
  redis.call('XCLAIM', key, group, 'free', 0, entry[1], 'RETRYCOUNT', math.max(0, entry[4] - 1), 'JUSTID')
end
"""

# KEYS ids sent of late (a prefix), source stream, targets and sorted sets. ARGV how long ids are known, group, consumer, id of the entry
# that is acked for it ('': none), then runs of messages that are alike: how many, target, sorted set (0: at once), delay, must the target
# exist, are their ids looked up, how many fields each has, their names, the id's first, and each message's values in that order.
# -> a word a message: '' stored, 'dup', 'nogroup', 'gone' (the entry is no longer ours), an error
SEND = """
local group, consumer, source = unpack(ARGV, 2, 4)
local out, at, turn = {}, 5, math.floor(now / ARGV[1])
local seen, before = KEYS[1] .. turn, KEYS[1] .. (turn - 1)
if source ~= '' and #redis.call('XPENDING', KEYS[2], group, source, source, 1, consumer) == 0 then return {'gone'} end
while ARGV[at] do
  local messages, target, set, delay, must, looked_up, count = unpack(ARGV, at, at + 6)
  local fields, known = {}, looked_up == '1'
  target, count = KEYS[tonumber(target)], tonumber(count)
  for i = 1, count do fields[2 * i - 1] = ARGV[at + 6 + i] end
  at = at + 7 + count
  local missing = must == '1' and redis.call('EXISTS', target) == 0
  for _ = 1, tonumber(messages) do
    local id, m = ARGV[at], #out + 1
    if missing then
      out[m] = 'nogroup'
    elseif known and (redis.call('SISMEMBER', before, id) == 1 or redis.call('SADD', seen, id) == 0) then
      out[m] = 'dup'
    else
      local done
      for i = 1, count do fields[2 * i] = ARGV[at + i - 1] end
      if set == '0' then
        done = redis.pcall('XADD', target, '*', unpack(fields))
      else  -- the time and the number make equal envelopes two
        local member = cmsgpack.pack({target, time[1] .. '.' .. time[2] .. '.' .. m, unpack(fields)})
        done = redis.pcall('ZADD', KEYS[tonumber(set)], now + delay, member)
      end
      out[m] = type(done) == 'table' and done.err or ''
      if out[m] ~= '' and known then redis.call('SREM', seen, id) end
    end
    at = at + count
  end
end
redis.call('PEXPIRE', seen, 2 * ARGV[1])
if source ~= '' and out[1] == '' then redis.call('XACK', KEYS[2], group, source) end
return out
"""

# One read of a receiver, after which it knows of all that concerns it. KEYS what is delayed for all, and for the group, then
# (lease, stream) a source. ARGV group ('': a private reader), me, lease, room, tick (1: look at what is due, and at who died),
# exclusive, then a walk a source: where what is pending goes on, '' once it is through (then what is new is read); of a private
# reader the last id, '-' at first. -> {lost entries, milliseconds until the next is due or -1, a state a source, {source, id, fields,
# count}...}; a state is {walk, where nothing was read: the id that what is new comes after}, or {} where the lease is not ours
TAKE = """
local group, me, lease, room = ARGV[1], ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])
local tick, exclusive = ARGV[5] == '1', ARGV[6] == '1'
local states, open = {}, {}
local out = {0, -1, states}
if tick then
  for i = 1, 2 do
    for _, member in ipairs(redis.call('ZRANGEBYSCORE', KEYS[i], '-inf', now, 'LIMIT', 0, 500)) do
      local parts = cmsgpack.unpack(member)
      if type(redis.pcall('XADD', parts[1], '*', unpack(parts, 3))) == 'table' then break end  -- no memory: reading must go on
      redis.call('ZREM', KEYS[i], member)
    end
    local head = redis.call('ZRANGE', KEYS[i], 0, 0, 'WITHSCORES')
    if head[2] and (out[2] < 0 or head[2] - now < out[2]) then out[2] = math.max(0, head[2] - now) end
  end
end
for n = 1, (#KEYS - 2) / 2 do
  local key, walk = KEYS[2 * n + 2], ARGV[n + 6]
  local function claim(list, also_mine)
    for _, entry in ipairs(list) do
      if room > 0 and (also_mine or entry[2] ~= me) then
        local count = entry[2] == me and entry[4] or entry[4] + 1
        local claimed = redis.call('XCLAIM', key, group, me, 0, entry[1], 'RETRYCOUNT', count)
        if claimed[1] then
          out[#out + 1] = {n, entry[1], claimed[1][2], count}
          room = room - 1
        else
          redis.call('XACK', key, group, entry[1])
          out[1] = out[1] + 1
        end
      end
    end
  end
  if exclusive and redis.call('GET', KEYS[2 * n + 1]) ~= me then
    states[n] = {}
  else
    if group == '' and walk == '-' then
      local newest = redis.call('XREVRANGE', key, '+', '-', 'COUNT', 1)
      walk = newest[1] and newest[1][1] or '0-0'
    elseif group ~= '' then
      while walk ~= '' and room > 0 do  -- an owner goes through all that is pending, in order, before it reads on
        local asked = room
        local list = redis.call('XPENDING', key, group, walk, '+', asked, unpack(exclusive and {} or {me}))
        claim(list, true)
        walk = list[asked] and '(' .. list[asked][1] or ''
      end
      claim(redis.call('XPENDING', key, group, '-', '+', math.max(1, room), 'free'))  -- an error where the group is gone
      if tick and not exclusive and room > 0 then claim(redis.call('XPENDING', key, group, 'IDLE', lease, '-', '+', room)) end
    end
    states[n] = {walk}
    if walk == '' or group == '' then open[#open + 1] = n end
  end
end
local share = math.max(1, math.floor(room / math.max(1, #open)))
for pass = 1, 2 do  -- each its share, so that one with a backlog leaves room for the others; then who has more
  for _, n in ipairs(open) do
    local left = pass == 1 and math.min(share, room) or room
    if left > 0 then
      local key, read = KEYS[2 * n + 2], nil
      if group == '' then
        read = redis.call('XREAD', 'COUNT', left, 'STREAMS', key, states[n][1])
      else
        read = redis.call('XREADGROUP', 'GROUP', group, me, 'COUNT', left, 'STREAMS', key, '>')
      end
      for _, entry in ipairs(read and read[1][2] or {}) do
        out[#out + 1] = {n, entry[1], entry[2], 1}
        room = room - 1
        if group == '' then states[n][1] = entry[1] end
      end
    end
  end
  if #out == 3 then break end
end
if #out == 3 and room > 0 then
  for _, n in ipairs(open) do
    states[n][2] = group == '' and states[n][1] or group_of(KEYS[2 * n + 2], group)['last-delivered-id']
  end
end
return out
"""

# KEYS streams. ARGV verb (renew, free), group, me, then (stream, id): each only if it is still mine -> the numbers of the others
HELD = """
local verb, group, me = unpack(ARGV, 1, 3)
local gone = {}
for at = 4, #ARGV, 2 do
  local key, id = KEYS[tonumber(ARGV[at])], ARGV[at + 1]
  local entry = redis.call('XPENDING', key, group, id, id, 1, me)[1]
  if not entry then
    gone[#gone + 1] = (at - 4) / 2
  elseif verb == 'renew' then
    redis.call('XCLAIM', key, group, me, 0, id, 'JUSTID')
  else
    give_back(key, group, entry)
  end
end
return gone
"""

# KEYS (lease, stream) a source. ARGV group, me: all that is mine goes back, then the leases; the consumer is forgotten
LEAVE = """
local group, me = ARGV[1], ARGV[2]
for n = 1, #KEYS, 2 do
  local key = KEYS[n + 1]
  local list = redis.call('XPENDING', key, group, '-', '+', 1000000, me)
  for _, entry in ipairs(list) do give_back(key, group, entry) end
  redis.call('XGROUP', 'DELCONSUMER', key, group, me)  -- one that held something would take it along
end
for n = 1, #KEYS, 2 do
  if redis.call('GET', KEYS[n]) == me then redis.call('DEL', KEYS[n]) end
end
return 0
"""

# KEYS members, leases. ARGV me, lease, joins. -> {my even share of the shards, those that are mine...}
COUNCIL = """
local me, lease, joins = ARGV[1], tonumber(ARGV[2]), ARGV[3] == '1'
local members, count, quota, mine, free = KEYS[1], #KEYS - 1, 0, {}, {}
if joins then redis.call('ZADD', members, now + lease, me) else redis.call('ZREM', members, me) end
redis.call('ZREMRANGEBYSCORE', members, '-inf', now)
redis.call('PEXPIRE', members, 2 * lease)
local all = redis.call('ZRANGE', members, 0, -1)
table.sort(all)
for rank, member in ipairs(all) do
  if member == me then quota = math.floor(count / #all) + (rank <= count % #all and 1 or 0) end
end
for shard = 0, count - 1 do
  local holder = redis.call('GET', KEYS[shard + 2])
  if holder == me then
    redis.call('PEXPIRE', KEYS[shard + 2], lease)
    mine[#mine + 1] = shard
  elseif not holder then
    free[#free + 1] = shard
  end
end
while #mine < quota and #free > 0 do
  mine[#mine + 1] = table.remove(free, 1)
  redis.call('SET', KEYS[mine[#mine] + 2], me, 'PX', lease)
end
return {quota, unpack(mine)}
"""

# KEYS meta, what is there while there are private readers, streams. ARGV streams that are a group's own (the last), first-group
# retention, what private readers may lag, dead-letter retention or ''. Drops what every group has done with: up to the lowest pending
# id of any, or what it was last given
TRIM = """
local own, first, lag, dead = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4])
local meta = redis.call('HMGET', KEYS[1], 'retain', 'had')
local keep = math.max(tonumber(meta[1] or 0), redis.call('EXISTS', KEYS[2]) == 1 and lag or 0)
for i = 3, #KEYS do
  local groups, ms, seq = group_of(KEYS[i]), now, 0
  if #groups == 0 and not meta[2] then ms = now - first end
  for _, group in ipairs(groups) do
    local low, add = group['last-delivered-id'], 1
    if group.pending > 0 then low, add = redis.call('XPENDING', KEYS[i], group.name)[2], 0 end
    local its_ms, its_seq = string.match(low, '(%d+)-(%d+)')
    its_ms, its_seq = tonumber(its_ms), its_seq + add
    if its_ms < ms or its_ms == ms and its_seq < seq then ms, seq = its_ms, its_seq end
  end
  if i <= #KEYS - own and keep > 0 and ms >= now - keep then ms, seq = now - keep, 0 end
  if dead and ms < now - dead then ms, seq = now - dead, 0 end
  redis.call('XTRIM', KEYS[i], 'MINID', string.format('%.0f-%.0f', math.max(0, ms), seq))
end
return 0
"""

# KEYS streams. ARGV verb (look; purge: what waits is gone; replay: what came since waits again), group, since.
# -> {how many wait, are in flight, {last id that was given, ids given back...} a stream}; {} where there is no such group
GROUP = """
local verb, name, ready, flight, out = ARGV[1], ARGV[2], 0, 0, {}
for i, key in ipairs(KEYS) do
  local group = group_of(key, name)
  if not group then return {} end
  local last = group['last-delivered-id']
  local count, till = tonumber(group.lag), last
  if verb == 'replay' then
    till = string.format('%.0f-9007199254740991', math.max(0, ARGV[3] - 1))  -- of a moment nobody has so many, and Lua counts no further
    if tonumber(string.match(last, '%d+')) >= tonumber(ARGV[3]) then last = till end  -- else it waits from before that on
  end
  if verb ~= 'look' or not count then  -- 6.2 does not say, and later ones do not always know
    count = 0
    repeat
      local list = redis.call('XRANGE', key, '(' .. till, '+', 'COUNT', 500)
      count = count + #list
      till = #list > 0 and list[#list][1] or till
    until #list == 0 or verb == 'look' and count >= 10000
  end
  if verb ~= 'look' then redis.call('XGROUP', 'SETID', key, name, verb == 'purge' and till or last) end
  out[i] = {last}
  local back = redis.call('XPENDING', key, name, '-', '+', 1000000, 'free')
  for _, entry in ipairs(back) do
    out[i][#out[i] + 1] = entry[1]
    if verb == 'purge' then redis.call('XACK', key, name, entry[1]) end
  end
  ready = ready + count + (verb == 'replay' and 0 or #back)
  flight = flight + group.pending - #back
end
return {ready, flight, out}
"""

SOURCES = {script: _COMMON + script for script in (SEND, TAKE, HELD, LEAVE, COUNCIL, TRIM, GROUP)}
"""What is loaded, by what it is called here."""


def digest(source: str) -> str:
    """What EVALSHA calls a script that is loaded."""
    return hashlib.sha1(source.encode(), usedforsecurity=False).hexdigest()


_SHA = {script: digest(source) for script, source in SOURCES.items()}


def call(script: str, keys: Sequence[str], arguments: Iterable[Any]) -> tuple[Any, ...]:  # Any: str, bytes, int or float
    """The command that runs a script."""
    return ("EVALSHA", _SHA[script], len(keys), *keys, *arguments)
