-- The algorithms of memory.py for many gateways, on Redis' own clock (`clock`, ms, from clock.lua). One call of this
-- script decides for all buckets of a request, so nothing comes between. Numbers are whole and below 2^52: doubles hold
-- them exactly, and %.0f writes them so.
--
-- KEYS[1]: the ledger of the script itself: epoch (made anew when Redis lost everything), seq, last (no clock goes back).
-- KEYS[2..]: the buckets, hashes. KEY:l holds leases (id by the time they end), KEY:z the log of the sliding window.
-- ARGV: op, id, lease in ms, then
--   take:   deadline (0: none), epoch to begin with, and for each bucket 8 numbers: BUCKET, cost, leased
--   settle: when it was decided, how long ids are remembered, and for each bucket 9 numbers: BUCKET, held, leased, used
--   renew:  for each bucket its code; all leases of id go on. Ids are separated by spaces.
-- BUCKET: code, limit, window, up, per, capacity.
local now = tonumber(redis.call('HGET', KEYS[1], 'last') or '0')
if clock > now then
  now = clock
  redis.call('HSET', KEYS[1], 'last', string.format('%.0f', now))
end
local op, id, lease = ARGV[1], ARGV[2], tonumber(ARGV[3])
local floor, max, min = math.floor, math.max, math.min

local function ceil_div(a, b) return -floor(-a / b) end

local function text(number) return string.format('%.0f', number) end

local function get(key, field) return tonumber(redis.call('HGET', key, field) or '0') end

-- 1 fixed window, 3 sliding window counter: w the window's place, p the count of the one before, c its own
local function windows(b)
  local have = redis.call('HMGET', b.key, 'w', 'p', 'c')
  local place = floor(now / b.window)
  b.place, b.left = place, (place + 1) * b.window - now
  b.before, b.count = 0, 0
  if have[1] then
    local was = tonumber(have[1])
    if was == place then
      b.before, b.count = tonumber(have[2]), tonumber(have[3])
    elseif was == place - 1 and b.code == 3 then
      b.before = tonumber(have[3])
    end
  end
end

local function log(b)
  local old = redis.call('ZRANGEBYSCORE', b.key .. ':z', '-inf', text(now - b.window))
  b.sum = get(b.key, 's')
  for _, name in ipairs(old) do
    b.sum = b.sum - get(b.key, 'e:' .. name)
    redis.call('HDEL', b.key, 'e:' .. name)
    redis.call('ZREM', b.key .. ':z', name)
  end
  if #old > 0 then redis.call('HSET', b.key, 's', text(b.sum)) end
end

local function level(b)
  local have = redis.call('HMGET', b.key, 't', 'v')
  local passed
  if b.code == 4 then
    b.level = b.capacity
    if have[1] then
      local was = tonumber(have[2])
      passed = now - tonumber(have[1])
      if passed < ceil_div(b.capacity - was, b.up) then b.level = was + passed * b.up end
    end
  else
    b.level = 0
    if have[1] then
      local was = tonumber(have[2])
      passed = now - tonumber(have[1])
      if passed < ceil_div(was, b.up) then b.level = was - passed * b.up end
    end
  end
end

local function load(b)
  if b.code == 1 or b.code == 3 then windows(b)
  elseif b.code == 2 then log(b)
  elseif b.code == 6 then b.count = redis.call('ZCARD', b.key .. ':l')
  else level(b) end
end

local function save(b)
  local rest
  if b.code == 1 or b.code == 3 then
    redis.call('HSET', b.key, 'w', text(b.place), 'p', text(b.before), 'c', text(b.count))
    rest = 2 * b.window
  elseif b.code == 2 then
    redis.call('HSET', b.key, 's', text(b.sum))
    rest = b.window
  elseif b.code == 6 then
    rest = 0
  else
    redis.call('HSET', b.key, 't', text(now), 'v', text(b.level))
    if b.code == 4 then rest = ceil_div(b.capacity - b.level, b.up) else rest = ceil_div(b.level, b.up) end
  end
  -- What would be as new by then need not be kept.
  local kept = text(max(rest, b.leased and lease or 0) + 1000)
  redis.call('PEXPIRE', b.key, kept)
  if b.code == 2 then redis.call('PEXPIRE', b.key .. ':z', kept) end
  if b.leased then redis.call('PEXPIRE', b.key .. ':l', kept) end
end

local function adjust(b, name, delta, decided)
  if b.code == 1 then
    if delta > 0 or floor(decided / b.window) == b.place then b.count = b.count + delta end
  elseif b.code == 3 then
    local behind = b.place - floor(decided / b.window)
    if delta > 0 or behind == 0 then b.count = b.count + delta
    elseif behind == 1 then b.before = b.before + delta end
  elseif b.code == 2 then
    local amount = redis.call('HGET', b.key, 'e:' .. name)
    if amount or delta > 0 then
      b.sum = b.sum + delta
      local rest = tonumber(amount or '0') + delta
      if rest == 0 then
        redis.call('HDEL', b.key, 'e:' .. name)
        redis.call('ZREM', b.key .. ':z', name)
      else
        redis.call('HSET', b.key, 'e:' .. name, text(rest))
        if not amount then redis.call('ZADD', b.key .. ':z', text(now), name) end
      end
    end
  elseif b.code == 4 then b.level = min(b.capacity, b.level - delta * b.per)
  elseif b.code == 5 then b.level = max(0, b.level + delta * b.per) end
end

-- Give back what gateways held that did not renew it: they are gone.
local function sweep(b)
  if not b.leased then return end
  local ended = redis.call('ZRANGEBYSCORE', b.key .. ':l', '-inf', text(now))
  for _, name in ipairs(ended) do
    redis.call('ZREM', b.key .. ':l', name)
    local held = redis.call('HGET', b.key, 'a:' .. name)
    if held then
      redis.call('HDEL', b.key, 'a:' .. name)
      local amount, decided = string.match(held, '^(%d+):(%d+)$')
      adjust(b, name, -tonumber(amount), tonumber(decided))
    end
  end
  if b.code == 6 then b.count = redis.call('ZCARD', b.key .. ':l') end
  if #ended > 0 then save(b) end
end

-- (ms in the queue, ms until it would fit: 0 if it does, -1 if never)
local function check(b)
  local cost = b.cost
  local most = b.limit
  if b.code == 4 or b.code == 5 then most = floor(b.capacity / b.per) end
  if cost > most then return 0, -1 end
  if b.code == 1 then
    if b.count + cost <= b.limit then return 0, 0 end
    return 0, b.left
  elseif b.code == 2 then
    local need, from = b.sum + cost - b.limit, 0
    if need <= 0 then return 0, 0 end
    while true do
      local some = redis.call('ZRANGE', b.key .. ':z', from, from + 63, 'WITHSCORES')
      for place = 1, #some, 2 do
        need = need - get(b.key, 'e:' .. some[place])
        if need <= 0 then return 0, tonumber(some[place + 1]) + b.window - now end
      end
      from = from + 64
    end
  elseif b.code == 3 then
    local room = b.limit - b.count - cost
    if b.before * b.left <= room * b.window then return 0, 0 end
    if room >= 0 then return 0, b.left - floor(room * b.window / b.before) end
    return 0, b.left + b.window - floor((b.limit - cost) * b.window / b.count)
  elseif b.code == 4 then
    return 0, max(0, ceil_div(cost * b.per - b.level, b.up))
  elseif b.code == 5 then
    return ceil_div(b.level, b.up), max(0, ceil_div(b.level + cost * b.per - b.capacity, b.up))
  end
  if b.count + cost <= b.limit then return 0, 0 end
  return 0, 1000
end

local function add(b)
  if b.code == 1 or b.code == 3 or b.code == 6 then b.count = b.count + b.cost
  elseif b.code == 2 then
    if b.cost > 0 then
      redis.call('ZADD', b.key .. ':z', text(now), id)
      redis.call('HSET', b.key, 'e:' .. id, text(b.cost))
      b.sum = b.sum + b.cost
    end
  elseif b.code == 4 then b.level = b.level - b.cost * b.per
  else b.level = b.level + b.cost * b.per end
  if b.leased then
    redis.call('ZADD', b.key .. ':l', text(now + lease), id)
    if b.code ~= 6 then redis.call('HSET', b.key, 'a:' .. id, text(b.cost) .. ':' .. text(now)) end
  end
end

-- (what remains, ms until the count is as new)
local function state(b)
  if b.code == 1 then return max(0, b.limit - b.count), b.count ~= 0 and b.left or 0 end
  if b.code == 2 then
    local last = redis.call('ZRANGE', b.key .. ':z', -1, -1, 'WITHSCORES')
    return max(0, b.limit - b.sum), last[2] and tonumber(last[2]) + b.window - now or 0
  end
  if b.code == 3 then
    local reset = 0
    if b.count ~= 0 then reset = b.left + b.window elseif b.before ~= 0 then reset = b.left end
    return floor(max(0, b.limit * b.window - b.before * b.left - b.count * b.window) / b.window), reset
  end
  if b.code == 4 then return floor(max(0, b.level) / b.per), ceil_div(b.capacity - b.level, b.up) end
  if b.code == 5 then return floor(max(0, b.capacity - b.level) / b.per), ceil_div(b.level, b.up) end
  return max(0, b.limit - b.count), 0
end

local function bucket(place, from)
  return {
    key = KEYS[place + 1], code = tonumber(ARGV[from]), limit = tonumber(ARGV[from + 1]),
    window = tonumber(ARGV[from + 2]), up = tonumber(ARGV[from + 3]), per = tonumber(ARGV[from + 4]),
    capacity = tonumber(ARGV[from + 5]), cost = tonumber(ARGV[from + 6]), leased = ARGV[from + 7] == '1',
  }
end

if op == 'take' then
  local deadline = tonumber(ARGV[4])
  if deadline > 0 and now > deadline then return {'late', now} end  -- whoever asked has given up
  redis.call('HSETNX', KEYS[1], 'epoch', ARGV[5])
  local epoch, seq = redis.call('HGET', KEYS[1], 'epoch'), redis.call('HINCRBY', KEYS[1], 'seq', 1)
  local buckets, delay, longest, refused = {}, 0, 0, 0
  for place = 1, #KEYS - 1 do
    local b = bucket(place, 6 + (place - 1) * 8)
    buckets[place] = b
    load(b)
    sweep(b)
    if longest >= 0 then
      local wait, retry = check(b)
      delay = max(delay, wait)
      if retry < 0 or retry > longest then longest, refused = retry, place end
    end
  end
  local answer = {refused == 0 and 'yes' or 'no', now, epoch, seq, refused == 0 and delay or longest, refused}
  for _, b in ipairs(buckets) do
    if refused == 0 then
      add(b)
      save(b)
    end
    local remaining, reset = state(b)
    answer[#answer + 1] = remaining
    answer[#answer + 1] = reset
  end
  return answer
end

if op == 'settle' then
  local decided = tonumber(ARGV[4])
  -- A gateway that got no answer says it again; it counts once.
  if not redis.call('SET', KEYS[1] .. ':s:' .. id, '1', 'NX', 'PX', ARGV[5]) then return {'again', now} end
  for place = 1, #KEYS - 1 do
    local from = 6 + (place - 1) * 9
    local b, used = bucket(place, from), tonumber(ARGV[from + 8])
    load(b)
    sweep(b)
    local held = b.cost
    if b.leased then
      if redis.call('ZREM', b.key .. ':l', id) == 0 then held = 0 end
      redis.call('HDEL', b.key, 'a:' .. id)
    end
    if b.code ~= 6 then
      adjust(b, id, used - held, decided)
      save(b)
    end
  end
  return {'done', now}
end

for place = 1, #KEYS - 1 do
  local code = tonumber(ARGV[3 + place])
  for name in string.gmatch(id, '%S+') do
    -- What ended meanwhile was given back and is not taken again, but a call that runs is a call.
    if code == 6 then redis.call('ZADD', KEYS[place + 1] .. ':l', text(now + lease), name)
    else redis.call('ZADD', KEYS[place + 1] .. ':l', 'XX', text(now + lease), name) end
  end
  for _, key in ipairs({KEYS[place + 1], KEYS[place + 1] .. ':l', KEYS[place + 1] .. ':z'}) do
    if redis.call('PTTL', key) < lease + 1000 then redis.call('PEXPIRE', key, text(lease + 1000)) end
  end
end
return {'done', now}
