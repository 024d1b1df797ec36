"""What must be one step at the broker: Lua, loaded once a connection.

A script does not roll back: what may fail is written first, and the ack is last (a dead letter acked before a failed write is lost).
Every key of a topic carries one hash tag, so a script stays in one slot of a cluster. Moments are the server's own, in milliseconds.

In a group's pending list an entry's delivery count is 1 + the deaths of receivers that held it. What is given back is moved to the
consumer `free` with a count that is one lower; whoever takes it raises it again, so that a release is never a death.
"""

from __future__ import annotations

import hashlib

FREE = "free"
"""The consumer that holds what was given back."""
OWNER = "owner"
"""The consumer name that the successive owners of a shard share."""

_NOW = """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
"""

_ASK_GROUPS = """
local function groups_of(key)
  local found = redis.pcall('XINFO', 'GROUPS', key)
  if found.err then return nil end
  local groups = {}
  for i, flat in ipairs(found) do
    local group = {}
    for j = 1, #flat, 2 do group[flat[j]] = flat[j + 1] end
    groups[i] = group
  end
  return groups
end
local function group_of(key, name)
  for _, group in ipairs(groups_of(key) or {}) do
    if group['name'] == name then return group end
  end
end
"""

_HASH = """
local function hash_of(key)
  local flat, hash = redis.call('HGETALL', key), {}
  for i = 1, #flat, 2 do hash[flat[i]] = flat[i + 1] end
  return hash
end
"""

# KEYS meta, plain stream. ARGV create, kind, keyed, shards, default shards, priorities, retain. -> status, then the meta hash, flat
DECLARE = (
    _HASH
    + """
for i, wanted in ipairs({'hash', 'stream'}) do
  local kind = redis.call('TYPE', KEYS[i]).ok
  if kind ~= 'none' and kind ~= wanted then return {'kind', KEYS[i], wanted, kind} end
end
local create, kind, keyed, shards, default, priorities, retain = unpack(ARGV)
local meta = hash_of(KEYS[1])
if create == '1' then
  if not meta.declared then
    if not meta.shards or redis.call('XLEN', KEYS[2]) == 0 then
      if shards == '' then shards = keyed == '1' and default or '1' end
      redis.call('HSET', KEYS[1], 'shards', shards)
    end
    redis.call('HSET', KEYS[1], 'declared', '1', 'kind', kind, 'keyed', keyed, 'priorities', priorities)
  elseif keyed == '1' and meta.keyed == '0' then
    redis.call('HSET', KEYS[1], 'keyed', '1')
  end
  if retain ~= '' then redis.call('HSETNX', KEYS[1], 'retain', retain) end
elseif not meta.declared then
  return {'missing'}
end
local found = redis.call('HGETALL', KEYS[1])
table.insert(found, 1, 'ok')
return found
"""
)

# KEYS meta. What a sender must know; a topic that nobody has declared gets one stream.
LAYOUT = """
if redis.call('EXISTS', KEYS[1]) == 0 then
  redis.call('HSET', KEYS[1], 'shards', '1', 'keyed', '0', 'priorities', '0', 'kind', 'work')
end
return redis.call('HGETALL', KEYS[1])
"""

# KEYS meta, n streams, n retry streams. ARGV mode (create, check, revive), group, start, kind, first-group retention -> status
DECLARE_GROUP = (
    _NOW
    + _ASK_GROUPS
    + _HASH
    + """
local mode, group, start, kind, retention = unpack(ARGV)
local n = (#KEYS - 1) / 2
local meta = hash_of(KEYS[1])
local known = meta['g:' .. group]
if mode == 'check' then
  for i = 2, #KEYS do
    if not group_of(KEYS[i], group) then return {'missing'} end
  end
  return {'ok'}
end
if mode == 'revive' and meta['d:' .. group] then return {'dropped'} end
for i = 2, #KEYS do
  local kind = redis.call('TYPE', KEYS[i]).ok
  if kind ~= 'none' and kind ~= 'stream' then return {'kind', KEYS[i], 'stream', kind} end
end
local from = '$'
if kind == 'dead' or known or mode == 'revive' then
  from = '0'
elseif start == 'earliest' then
  local reach = tonumber(meta.retain or '0')
  if not meta.had then reach = math.max(reach, tonumber(retention)) end
  if reach > 0 then from = string.format('%.0f', math.max(0, now - reach)) end
end
for i = 2, #KEYS do
  local done = redis.pcall('XGROUP', 'CREATE', KEYS[i], group, i <= n + 1 and from or '0', 'MKSTREAM')
  if done.err and not string.find(done.err, 'BUSYGROUP') then return redis.error_reply(done.err) end
end
redis.call('HSET', KEYS[1], 'g:' .. group, '1', 'had', '1')
redis.call('HDEL', KEYS[1], 'd:' .. group)
return {'ok'}
"""
)

# KEYS meta, n streams, n retry streams, then what only the group has. ARGV group, n -> groups destroyed
DROP_GROUP = """
local n, dropped = tonumber(ARGV[2]), 0
for i = 2, n + 1 do
  local done = redis.pcall('XGROUP', 'DESTROY', KEYS[i], ARGV[1])
  if type(done) == 'number' then dropped = dropped + done end
end
redis.call('HDEL', KEYS[1], 'g:' .. ARGV[1])
redis.call('HSET', KEYS[1], 'd:' .. ARGV[1], '1')  -- its receivers must not make it again
for i = n + 2, #KEYS do redis.call('DEL', KEYS[i]) end
return dropped
"""

# KEYS ids seen (a prefix), targets. ARGV window, count, then a message: id ('': not looked up), target, sorted set (0: now), delay,
# must the target exist, nonce, number of fields, fields. -> a word a message: '' stored, 'dup', 'nogroup', or the error
ADD = (
    _NOW
    + """
local window = tonumber(ARGV[1])
local bucket = math.floor(now / window)
local current, previous = KEYS[1] .. bucket, KEYS[1] .. (bucket - 1)
local out, at, noted = {}, 3, false
for m = 1, tonumber(ARGV[2]) do
  local id, target, set, delay = ARGV[at], KEYS[tonumber(ARGV[at + 1])], tonumber(ARGV[at + 2]), tonumber(ARGV[at + 3])
  local first = at + 7
  local last = first + tonumber(ARGV[at + 6]) - 1
  if ARGV[at + 4] == '1' and redis.call('EXISTS', target) == 0 then
    out[m] = 'nogroup'
  elseif id ~= '' and (redis.call('SISMEMBER', previous, id) == 1 or redis.call('SADD', current, id) == 0) then
    out[m] = 'dup'
  else
    local done
    if set == 0 then
      done = redis.pcall('XADD', target, '*', unpack(ARGV, first, last))
    else
      done = redis.pcall('ZADD', KEYS[set], now + delay, cmsgpack.pack({target, ARGV[at + 5], unpack(ARGV, first, last)}))
    end
    if type(done) == 'table' and done.err then
      if id ~= '' then redis.call('SREM', current, id) end
      out[m] = done.err
    else
      out[m] = ''
      noted = noted or id ~= ''
    end
  end
  at = last + 1
end
if noted then redis.call('PEXPIRE', current, 2 * window) end
return out
"""
)

# KEYS source stream, lease (or the source again), target, sorted set. ARGV group, consumer, id, token ('': no lease), delay ('': now),
# must the target exist, nonce, fields -> '' done, 'gone', 'nogroup'
FORWARD = (
    _NOW
    + """
local group, consumer, id, token, delay, must, nonce = unpack(ARGV, 1, 7)
if token ~= '' and redis.call('GET', KEYS[2]) ~= token then return 'gone' end
if #redis.call('XPENDING', KEYS[1], group, id, id, 1, consumer) == 0 then return 'gone' end
if must == '1' and redis.call('EXISTS', KEYS[3]) == 0 then return 'nogroup' end
if delay == '' then
  redis.call('XADD', KEYS[3], '*', unpack(ARGV, 8))
else
  redis.call('ZADD', KEYS[4], now + tonumber(delay), cmsgpack.pack({KEYS[3], nonce, unpack(ARGV, 8)}))
end
redis.call('XACK', KEYS[1], group, id)
return ''
"""
)

# KEYS sorted sets. ARGV most -> milliseconds until the next is due, -1 where nothing waits
MOVE = (
    _NOW
    + """
local next = -1
for _, key in ipairs(KEYS) do
  local due = redis.call('ZRANGEBYSCORE', key, '-inf', now, 'LIMIT', 0, tonumber(ARGV[1]))
  for _, member in ipairs(due) do
    local parts = cmsgpack.unpack(member)
    redis.call('XADD', parts[1], '*', unpack(parts, 3))
    redis.call('ZREM', key, member)
  end
  local head = redis.call('ZRANGE', key, 0, 0, 'WITHSCORES')
  if head[2] then
    local wait = math.max(0, tonumber(head[2]) - now)
    if next < 0 or wait < next then next = wait end
  end
end
return next
"""
)

# KEYS streams. ARGV group, me, lease, room -> {lost, {stream, id, fields, count}...}: what was given back, or held by the dead
SWEEP = """
local group, me, lease, room = ARGV[1], ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])
local out = {0}
for number, key in ipairs(KEYS) do
  local function take(list)
    for _, entry in ipairs(list) do
      if room > 0 and entry[2] ~= me then
        local claimed = redis.call('XCLAIM', key, group, me, 0, entry[1], 'RETRYCOUNT', entry[4] + 1)
        if claimed[1] then
          out[#out + 1] = {number, entry[1], claimed[1][2], entry[4] + 1}
          room = room - 1
        else
          redis.call('XACK', key, group, entry[1])
          out[1] = out[1] + 1
        end
      end
    end
  end
  if room > 0 then take(redis.call('XPENDING', key, group, '-', '+', room, 'free')) end
  if room > 0 then take(redis.call('XPENDING', key, group, 'IDLE', lease, '-', '+', room)) end
end
return out
"""

# KEYS stream. ARGV group, me, room, from -> {lost, next or '', {1, id, fields, count}...}: what this consumer holds, in order of ids
OWN = """
local out = {0, ''}
local list = redis.call('XPENDING', KEYS[1], ARGV[1], ARGV[4], '+', ARGV[3], ARGV[2])
for _, entry in ipairs(list) do
  local claimed = redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[2], 0, entry[1], 'RETRYCOUNT', entry[4])
  if claimed[1] then
    out[#out + 1] = {1, entry[1], claimed[1][2], entry[4]}
  else
    redis.call('XACK', KEYS[1], ARGV[1], entry[1])
    out[1] = out[1] + 1
  end
end
if #list == tonumber(ARGV[3]) then out[2] = '(' .. list[#list][1] end
return out
"""

# KEYS streams. ARGV verb (renew, free, ack), group, me, then (stream, id, count): each only if it is still mine
# -> which were not; of acks, how many were
HELD = """
local verb, group, me = ARGV[1], ARGV[2], ARGV[3]
local gone, acked = {}, 0
for at = 4, #ARGV, 3 do
  local key, id = KEYS[tonumber(ARGV[at])], ARGV[at + 1]
  if #redis.call('XPENDING', key, group, id, id, 1, me) == 0 then
    gone[#gone + 1] = (at - 4) / 3
  elseif verb == 'renew' then
    redis.call('XCLAIM', key, group, me, 0, id, 'JUSTID')
  elseif verb == 'free' then
    redis.call('XCLAIM', key, group, 'free', 0, id, 'RETRYCOUNT', ARGV[at + 2], 'JUSTID')
  else
    acked = acked + redis.call('XACK', key, group, id)
  end
end
if verb == 'ack' then return acked end
return gone
"""

# KEYS streams. ARGV group, me: forgets a consumer that holds nothing (one that holds something would take it along)
QUIT = """
for _, key in ipairs(KEYS) do
  if #redis.call('XPENDING', key, ARGV[1], '-', '+', 1, ARGV[2]) == 0 then
    redis.call('XGROUP', 'DELCONSUMER', key, ARGV[1], ARGV[2])
  end
end
return 0
"""

# KEYS meta, private readers, n streams, retry streams. ARGV n, first-group retention, what private readers may lag, dead retention or ''
# Drops what every group has done with: up to the lowest pending id of any group, or what it was last given.
TRIM = (
    _NOW
    + _ASK_GROUPS
    + """
local n, first, lag, dead = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4] or '')
local meta = redis.call('HMGET', KEYS[1], 'retain', 'had')
local watched = redis.call('ZCOUNT', KEYS[2], now, '+inf') > 0
local function halves(id)
  local dash = string.find(id, '-', 1, true)
  return tonumber(string.sub(id, 1, dash - 1)), tonumber(string.sub(id, dash + 1))
end
for i = 3, #KEYS do
  local groups = groups_of(KEYS[i])
  if groups then
    local ms, seq = now, 0
    if #groups == 0 and not meta[2] then ms = now - first end
    for _, group in ipairs(groups) do
      local low, add = group['last-delivered-id'], 1
      if group['pending'] > 0 then low, add = redis.call('XPENDING', KEYS[i], group['name'])[2], 0 end
      local its_ms, its_seq = halves(low)
      its_seq = its_seq + add
      if its_ms < ms or (its_ms == ms and its_seq < seq) then ms, seq = its_ms, its_seq end
    end
    if i <= n + 2 then
      local keep = math.max(tonumber(meta[1] or '0'), watched and lag or 0)
      if keep > 0 and ms >= now - keep then ms, seq = now - keep, 0 end
    end
    if dead and ms < now - dead then ms, seq = now - dead, 0 end
    redis.call('XTRIM', KEYS[i], 'MINID', string.format('%.0f-%.0f', math.max(0, ms), seq))
  end
end
return 0
"""
)

# KEYS members, leases. ARGV me, lease, joins, takes, then those before me in this process
# -> {how many too many, shards that were mine, shards got, those that were my predecessors'}: the even share of the shards
COUNCIL = (
    _NOW
    + """
local me, lease, joins, takes = ARGV[1], tonumber(ARGV[2]), ARGV[3] == '1', ARGV[4] == '1'
local members, before = KEYS[1], {}
if joins then redis.call('ZADD', members, now + lease, me) else redis.call('ZREM', members, me) end
for i = 5, #ARGV do
  before[ARGV[i]] = true
  redis.call('ZREM', members, ARGV[i])
end
redis.call('ZREMRANGEBYSCORE', members, '-inf', now)
redis.call('PEXPIRE', members, 2 * lease)
local held, mine, free, inherited = {}, {}, {}, {}
for i = 2, #KEYS do
  local holder = redis.call('GET', KEYS[i])
  if holder and before[holder] then
    redis.call('SET', KEYS[i], me, 'PX', lease)
    inherited[#inherited + 1] = i - 2
    holder = me
  end
  if holder == me then
    redis.call('PEXPIRE', KEYS[i], lease)
    mine[#mine + 1] = i - 2
  elseif not holder then
    free[#free + 1] = i - 2
  end
  if holder then held[holder] = (held[holder] or 0) + 1 end
end
local got, excess = {}, 0
if joins then
  local all = redis.call('ZRANGE', members, 0, -1)
  table.sort(all, function(a, b)
    local left, right = held[a] or 0, held[b] or 0
    if left ~= right then return left > right end
    return a < b
  end)
  local count = #KEYS - 1
  local quota = math.floor(count / #all)
  for rank, member in ipairs(all) do
    if member == me and rank <= count % #all then quota = quota + 1 end
  end
  excess = #mine - quota
  while takes and excess < 0 and #free > 0 do
    local shard = table.remove(free, 1)
    redis.call('SET', KEYS[shard + 2], me, 'PX', lease)
    got[#got + 1] = shard
    excess = excess + 1
  end
end
return {excess, mine, got, inherited}
"""
)

# KEYS (lease, stream, retry stream) a shard. ARGV group, token, lease, room, then (walk, retry's walk, inherited) a shard.
# A walk is where the pending entries go on: '' once they are through; only then is anything new read.
# -> {lost entries, states, {shard, stream, id, fields, count}...}; a state: {walk, retry's walk}, or {} where the lease is not ours;
# where there was nothing at all, also the last ids of the streams: what comes later is new
TAKE = """
local group, token, lease, room = ARGV[1], ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])
local out, open = {0, {}}, {}
for shard = 1, #KEYS / 3 do
  local key, at = shard * 3 - 2, shard * 3 + 2
  if redis.call('GET', KEYS[key]) ~= token then
    out[2][shard] = {}
  else
    local walks, inherited = {ARGV[at], ARGV[at + 1]}, ARGV[at + 2] == '1'
    for number = 1, 2 do
      local stream = KEYS[key + number]
      while walks[number] ~= '' and room > 0 do
        local asked = room
        local list = redis.call('XPENDING', stream, group, walks[number], '+', asked)
        for _, entry in ipairs(list) do
          local count = entry[4] + 1
          if entry[2] == 'owner' and inherited then count = entry[4] end
          if entry[2] == 'owner' or entry[2] == 'free' or entry[3] >= lease then
            local claimed = redis.call('XCLAIM', stream, group, 'owner', 0, entry[1], 'RETRYCOUNT', count)
            if claimed[1] then
              out[#out + 1] = {shard, number, entry[1], claimed[1][2], count}
              room = room - 1
            else
              redis.call('XACK', stream, group, entry[1])
              out[1] = out[1] + 1
            end
          end
          walks[number] = '(' .. entry[1]
        end
        if #list < asked then walks[number] = '' end
      end
    end
    out[2][shard] = walks
    if walks[1] == '' and walks[2] == '' then open[#open + 1] = shard end
  end
end
local share = math.max(1, math.floor(room / math.max(1, #open)))
for pass = 1, 2 do  -- each its share, so that one with a backlog leaves room for the keys of others; then who has more
  for _, shard in ipairs(open) do
    local left = pass == 1 and math.min(share, room) or room
    for number = 2, 1, -1 do
      if left > 0 then
        local stream = KEYS[shard * 3 - 2 + number]
        local read = redis.call('XREADGROUP', 'GROUP', group, 'owner', 'COUNT', left, 'STREAMS', stream, '>')
        if read then
          for _, entry in ipairs(read[1][2]) do
            out[#out + 1] = {shard, number, entry[1], entry[2], 1}
            room, left = room - 1, left - 1
          end
        end
      end
    end
  end
  if #out == 2 then break end
end
if #out == 2 then
  for shard = 1, #KEYS / 3 do
    local state = out[2][shard]
    for number = 1, #state do
      local info = redis.call('XINFO', 'STREAM', KEYS[shard * 3 - 2 + number])
      for j = 1, #info, 2 do
        if info[j] == 'last-generated-id' then state[number + 2] = info[j + 1] end
      end
    end
  end
end
return out
"""

# KEYS (lease, stream, retry stream) a shard. ARGV group, token, verb (give, ack), then (shard, stream, id, count).
# give: those go back, then the leases are free; ack: only those. Nothing happens where the lease is not ours -> how many it did
OWNED = """
local group, token, verb = ARGV[1], ARGV[2], ARGV[3]
local done = 0
for at = 4, #ARGV, 4 do
  local key = tonumber(ARGV[at]) * 3 - 2
  local stream, id = KEYS[key + tonumber(ARGV[at + 1])], ARGV[at + 2]
  if redis.call('GET', KEYS[key]) == token then
    if verb == 'ack' then
      done = done + redis.call('XACK', stream, group, id)
    else
      done = done + #redis.call('XCLAIM', stream, group, 'free', 0, id, 'RETRYCOUNT', ARGV[at + 3], 'JUSTID')
    end
  end
end
if verb == 'give' then
  for key = 1, #KEYS, 3 do
    if redis.call('GET', KEYS[key]) == token then redis.call('DEL', KEYS[key]) end
  end
end
return done
"""

_AFTER = """
local function after(key, id, most, see)
  local count, from = 0, '(' .. id
  while count < most do
    local list = redis.call('XRANGE', key, from, '+', 'COUNT', 500)
    if #list == 0 then break end
    count = count + #list
    from = '(' .. list[#list][1]
    if see then see(list) end
  end
  return count, string.sub(from, 2)
end
local function pending_of(key, group, consumer)
  for _, flat in ipairs(redis.call('XINFO', 'CONSUMERS', key, group)) do
    if flat[2] == consumer then
      for j = 1, #flat, 2 do
        if flat[j] == 'pending' then return flat[j + 1] end
      end
    end
  end
  return 0
end
"""

# KEYS sorted set of the group, of all groups, streams. ARGV group -> {ready, in flight, delayed}, or {} where there is no such group
DEPTH = (
    _ASK_GROUPS
    + _AFTER
    + """
local ready, flight = 0, 0
for i = 3, #KEYS do
  local group = group_of(KEYS[i], ARGV[1])
  if not group then return {} end
  local given_back = pending_of(KEYS[i], ARGV[1], 'free')
  local lag = group['lag']
  if type(lag) ~= 'number' then lag = after(KEYS[i], group['last-delivered-id'], 10000) end
  ready = ready + lag + given_back
  flight = flight + group['pending'] - given_back
end
return {ready, flight, redis.call('ZCARD', KEYS[1]) + redis.call('ZCARD', KEYS[2])}
"""
)

# KEYS streams. ARGV group -> how many waited and are gone for this group; -1 where there is no such group
PURGE = (
    _ASK_GROUPS
    + _AFTER
    + """
local purged = 0
for _, key in ipairs(KEYS) do
  local group = group_of(key, ARGV[1])
  if not group then return -1 end
  local count, last = after(key, group['last-delivered-id'], math.huge)
  if count > 0 then redis.call('XGROUP', 'SETID', key, ARGV[1], last) end
  purged = purged + count
  local list
  repeat
    list = redis.call('XPENDING', key, ARGV[1], '-', '+', 500, 'free')
    for _, entry in ipairs(list) do purged = purged + redis.call('XACK', key, ARGV[1], entry[1]) end
  until #list == 0
end
return purged
"""
)

# KEYS meta, streams. ARGV group, since -> how many come again; -1 where there is no such group
REPLAY = (
    _ASK_GROUPS
    + _AFTER
    + """
local total = 0
for i = 2, #KEYS do
  if not group_of(KEYS[i], ARGV[1]) then return -1 end
end
if not redis.call('HGET', KEYS[1], 'retain') then return 0 end
for i = 2, #KEYS do
  local before = string.format('%.0f-18446744073709551615', math.max(0, tonumber(ARGV[2]) - 1))
  total = total + after(KEYS[i], before, math.huge)
  redis.call('XGROUP', 'SETID', KEYS[i], ARGV[1], before)
end
return total
"""
)

# KEYS streams. ARGV group -> {last delivered id, ids given back...} a stream, or {} where there is no such group
WAITING = (
    _ASK_GROUPS
    + """
local out = {}
for i, key in ipairs(KEYS) do
  local group = group_of(key, ARGV[1])
  if not group then return {} end
  out[i] = {group['last-delivered-id']}
  for _, entry in ipairs(redis.call('XPENDING', key, ARGV[1], '-', '+', 10000, 'free')) do table.insert(out[i], entry[1]) end
end
return out
"""
)

# KEYS private readers, streams. ARGV me, how long -> the last id of each stream: what comes later is for the reader
WATCH = (
    _NOW
    + """
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now)
redis.call('ZADD', KEYS[1], now + tonumber(ARGV[2]), ARGV[1])
redis.call('PEXPIRE', KEYS[1], 2 * tonumber(ARGV[2]))
local out = {}
for i = 2, #KEYS do
  local info = redis.pcall('XINFO', 'STREAM', KEYS[i])
  out[i - 1] = '0-0'
  if not info.err then
    for j = 1, #info, 2 do
      if info[j] == 'last-generated-id' then out[i - 1] = info[j + 1] end
    end
  end
end
return out
"""
)

ALL = (
    DECLARE, LAYOUT, DECLARE_GROUP, DROP_GROUP, ADD, FORWARD, MOVE, SWEEP, OWN, HELD, QUIT, TRIM, COUNCIL, TAKE, OWNED, DEPTH, PURGE,
    REPLAY, WAITING, WATCH,
)  # fmt: skip

SHA = {script: hashlib.sha1(script.encode(), usedforsecurity=False).hexdigest() for script in ALL}
BY_SHA = {sha: script for script, sha in SHA.items()}
