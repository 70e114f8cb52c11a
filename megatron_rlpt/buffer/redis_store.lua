-- Every operation of the rollout buffer. Each is atomic: a script runs alone and completes once it has written.
--
-- KEYS[1] holds the buffer's own fields and is the prefix of all other keys; its {} keeps them on one shard.
-- ARGV[1] names the operation, followed by its arguments. The reply is {'ok', result} or {name of a refusal, details}.
-- Times are in milliseconds since the Unix epoch, by the server's clock.
--
--   <base>                   hash: format run epoch next acknowledged capacity max_attempts draining ticket
--                                  (epoch is the fencing token of the trainer that attached last)
--   <base>:group:<n>         hash: episode put ticket state attempts worker lease reason completion payload result again
--   <base>:groups            sorted set: number of every group, by number
--   <base>:<state>           sorted set: numbers of queued, finished or dead groups by number, of leased groups by expiry
--   <base>:loan:<whose>      set: numbers that one claim has leased
--   <base>:letters           hash: number -> dead letter as JSON
--   <base>:replies:<n>       hash: replies by key
--   <base>:announced:<kind>  hash: name -> value, and <base>:until:<kind> a sorted set of names by expiry

local base = KEYS[1]
local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)

local function key(...)
  return table.concat({ base, ... }, ':')
end

local function digits(number) -- Lua would write large numbers with an exponent
  return string.format('%.0f', number)
end

local function field(name)
  return tonumber(redis.call('HGET', base, name) or 0)
end

local function refuse(...)
  error({ refusal = { ... } })
end

local function fence(fencing_token)
  local current = field('epoch')
  if current ~= tonumber(fencing_token) then
    refuse('fencing_token', current)
  end
end

local function of_group(n, ...)
  return redis.call('HMGET', key('group', n), ...)
end

local function loan_key(worker, lease)
  return key('loan', #worker, worker, lease)
end

-- Moves group n to a state; further arguments are fields of its hash and their values.
local function move(n, state, score, ...)
  local from, worker, lease = unpack(of_group(n, 'state', 'worker', 'lease'))
  if from then
    redis.call('ZREM', key(from), n)
  end
  if from == 'leased' then
    redis.call('SREM', loan_key(worker, lease), n)
  end
  redis.call('ZADD', key(state), score, n)
  redis.call('HSET', key('group', n), 'state', state, ...)
end

-- A number that was never used before, even if the server lost its last seconds.
local function new_ticket()
  local ticket = digits(math.max(field('ticket') + 1, clock[1] * 1000000 + clock[2]))
  redis.call('HSET', base, 'ticket', ticket)
  return ticket
end

local function queue_again(n)
  redis.call('HDEL', key('letters'), n)
  redis.call('HDEL', key('group', n), 'result')
  redis.call('HINCRBY', key('group', n), 'again', 1)
  move(n, 'queued', n, 'attempts', 0, 'worker', '', 'lease', '', 'reason', '', 'ticket', new_ticket())
end

local function end_lease(n, reason)
  local episode, attempts = unpack(of_group(n, 'episode', 'attempts'))
  if tonumber(attempts) < field('max_attempts') then
    move(n, 'queued', n, 'worker', '', 'lease', '')
    return
  end
  move(n, 'dead', n, 'lease', '', 'reason', reason)
  local letter = { episode = episode, reason = reason, attempts = tonumber(attempts), time = digits(now) }
  redis.call('HSET', key('letters'), n, cjson.encode(letter))
end

local function expire()
  for _, n in ipairs(redis.call('ZRANGE', key('leased'), '-inf', digits(now), 'BYSCORE')) do
    end_lease(n, 'lease expired')
  end
end

local function is_leased(n, worker, lease, ticket)
  local found = of_group(n, 'state', 'worker', 'lease', 'ticket')
  return found[1] == 'leased' and found[2] == worker and found[3] == lease and found[4] == ticket
end

local function drop(below)
  for _, n in ipairs(redis.call('ZRANGE', key('groups'), '-inf', below, 'BYSCORE')) do
    local state, worker, lease = unpack(of_group(n, 'state', 'worker', 'lease'))
    if state == 'leased' then
      redis.call('SREM', loan_key(worker, lease), n)
    end
    redis.call('ZREM', key(state), n)
    redis.call('DEL', key('group', n), key('replies', n))
    redis.call('ZREM', key('groups'), n)
  end
end

local function entry(n)
  local found = of_group(n, 'state', 'attempts', 'worker', 'reason', 'result')
  local data = found[5] or redis.call('HGET', key('group', n), 'payload')
  return { n, found[1], found[2], found[3], found[4], data }
end

local operations = {}

function operations.open(format, create)
  if create == '1' then
    redis.call('HSETNX', base, 'format', format)
  end
  return redis.call('HGET', base, 'format')
end

-- The holder of the buffer is the only announcement of its kind.
local function hold(holder, duration)
  redis.call('DEL', key('announced', 'holder'), key('until', 'holder'))
  if holder ~= '' then
    redis.call('HSET', key('announced', 'holder'), 'holder', holder)
    redis.call('ZADD', key('until', 'holder'), digits(now + duration), 'holder')
  end
end

function operations.hold(fencing_token, holder, duration)
  fence(fencing_token)
  hold(holder, duration)
end

function operations.attach(run, cursor, capacity, max_attempts, replace, holder, duration, over)
  local before = redis.call('HGET', key('announced', 'holder'), 'holder')
  local till = tonumber(redis.call('ZSCORE', key('until', 'holder'), 'holder') or 0)
  if before and till > now and before ~= holder and before ~= over then
    refuse('held', before, digits(till))
  end
  local owner = redis.call('HGET', base, 'run') or ''
  if owner ~= run then
    local held = redis.call('ZCARD', key('groups'))
    if held > 0 and replace ~= '1' then
      refuse('run', owner, held)
    end
    drop('+inf')
    redis.call('DEL', key('letters'))
  end
  drop('(' .. cursor)
  local fencing_token = digits(math.max(field('epoch') + 1, now))
  redis.call('HSET', base, 'run', run, 'epoch', fencing_token, 'next', cursor, 'acknowledged', cursor,
    'capacity', capacity, 'max_attempts', max_attempts)
  hold(holder, duration)
  return fencing_token
end

-- Arguments after the fencing token: number, episode and payload of every group.
function operations.put(fencing_token)
  fence(fencing_token)
  local acknowledged, full = field('acknowledged'), field('next') + field('capacity')
  local added, accepted = {}, 0
  for at = 3, #ARGV, 3 do
    local n, episode = ARGV[at], ARGV[at + 1]
    if tonumber(n) >= full then
      break
    end
    accepted = accepted + 1
    if tonumber(n) >= acknowledged then
      local held = added[n] and ARGV[added[n] + 1] or redis.call('HGET', key('group', n), 'episode')
      if held and held ~= episode then
        refuse('episode', n, held, episode)
      end
      if not held then
        added[n] = at
      end
    end
  end
  for n, at in pairs(added) do
    redis.call('ZADD', key('groups'), n, n)
    move(n, 'queued', n, 'episode', ARGV[at + 1], 'payload', ARGV[at + 2], 'put', digits(now), 'attempts', 0,
      'worker', '', 'lease', '', 'reason', '', 'ticket', new_ticket())
  end
  return accepted
end

function operations.take(fencing_token, first, count)
  fence(fencing_token)
  local acknowledged, finish = field('acknowledged'), first + count
  if tonumber(first) < acknowledged then
    refuse('acknowledged', first, acknowledged)
  end
  redis.call('HSET', base, 'next', digits(math.max(field('next'), first)))
  expire()
  local waiting, missing, ready = { queued = 0, leased = 0 }, {}, {}
  for number = tonumber(first), finish - 1 do
    local n = digits(number)
    local state = redis.call('HGET', key('group', n), 'state')
    if not state then
      table.insert(missing, n)
    elseif waiting[state] then
      waiting[state] = waiting[state] + 1
    else
      table.insert(ready, n)
    end
  end
  if #ready < tonumber(count) then
    return { 'pending', waiting.queued, waiting.leased, missing }
  end
  redis.call('HSET', base, 'next', digits(math.max(field('next'), finish)))
  local entries = {}
  for at, n in ipairs(ready) do
    entries[at] = entry(n)
  end
  return { 'ready', entries }
end

-- Arguments after the fencing token: number, episode and payload of every group.
function operations.retry(fencing_token)
  fence(fencing_token)
  local following = field('next')
  for at = 3, #ARGV, 3 do
    local n = ARGV[at]
    local state = redis.call('HGET', key('group', n), 'state')
    if state == 'finished' or state == 'dead' then
      redis.call('DEL', key('replies', n))
      redis.call('HSET', key('group', n), 'episode', ARGV[at + 1], 'payload', ARGV[at + 2])
      queue_again(n)
      following = math.min(following, tonumber(n))
    end
  end
  redis.call('HSET', base, 'next', digits(following))
end

-- Delete first: a server that is out of memory can still delete groups.
function operations.acknowledge(fencing_token, finish)
  fence(fencing_token)
  drop('(' .. finish)
  for _, name in ipairs({ 'acknowledged', 'next' }) do
    redis.call('HSET', base, name, digits(math.max(field(name), finish)))
  end
end

function operations.claim(worker, count, duration, lease)
  expire()
  local loan = loan_key(worker, lease)
  if redis.call('EXISTS', loan) == 0 and redis.call('HGET', base, 'draining') ~= '1' and tonumber(count) > 0 then
    for _, n in ipairs(redis.call('ZRANGE', key('queued'), 0, count - 1)) do
      move(n, 'leased', digits(now + duration), 'worker', worker, 'lease', lease)
      redis.call('HINCRBY', key('group', n), 'attempts', 1)
      redis.call('SADD', loan, n)
    end
  end
  local numbers = redis.call('SMEMBERS', loan)
  table.sort(numbers, function(a, b) return tonumber(a) < tonumber(b) end)
  local works = {}
  for at, n in ipairs(numbers) do
    works[at] = { n, unpack(of_group(n, 'attempts', 'ticket', 'payload', 'again')) }
  end
  return works
end

-- Arguments after the duration: number, worker, lease and ticket of every lease. Returns the indices of those renewed.
function operations.renew(duration)
  expire()
  local renewed = {}
  for at = 3, #ARGV, 4 do
    if is_leased(ARGV[at], ARGV[at + 1], ARGV[at + 2], ARGV[at + 3]) then
      redis.call('ZADD', key('leased'), digits(now + duration), ARGV[at])
      table.insert(renewed, (at - 3) / 4)
    end
  end
  return renewed
end

-- `completion` identifies the call: repeated because its reply was lost, it gets the same reply.
function operations.complete(n, worker, ticket, completion, result)
  local state, current, before = unpack(of_group(n, 'state', 'ticket', 'completion'))
  if current ~= ticket then
    return 0
  end
  if state == 'finished' then
    return before == completion and 1 or 0
  end
  if state == 'dead' and tonumber(n) < field('next') then
    return 0
  end
  redis.call('HDEL', key('letters'), n)
  move(n, 'finished', n, 'worker', worker, 'lease', '', 'reason', '', 'completion', completion, 'result', result)
  return 1
end

function operations.give_back(n, worker, lease, ticket, reason)
  if not is_leased(n, worker, lease, ticket) then
    return
  end
  if reason ~= '' then
    end_lease(n, reason)
  else
    redis.call('HINCRBY', key('group', n), 'attempts', -1)
    move(n, 'queued', n, 'worker', '', 'lease', '')
  end
end

function operations.recall(n)
  return redis.call('HGETALL', key('replies', n))
end

function operations.remember(n)
  if redis.call('EXISTS', key('group', n)) == 1 then
    for at = 3, #ARGV, 2 do
      redis.call('HSETNX', key('replies', n), ARGV[at], ARGV[at + 1])
    end
  end
end

local function withdraw(kind, name)
  redis.call('HDEL', key('announced', kind), name)
  redis.call('ZREM', key('until', kind), name)
end
operations.withdraw = withdraw

function operations.announce(kind, name, value, duration)
  for _, expired in ipairs(redis.call('ZRANGE', key('until', kind), '-inf', digits(now), 'BYSCORE')) do
    withdraw(kind, expired)
  end
  redis.call('HSET', key('announced', kind), name, value)
  redis.call('ZADD', key('until', kind), digits(now + duration), name)
end

function operations.announced(kind)
  local found = {}
  for _, name in ipairs(redis.call('ZRANGE', key('until', kind), '(' .. digits(now), '+inf', 'BYSCORE')) do
    table.insert(found, name)
    table.insert(found, redis.call('HGET', key('announced', kind), name))
  end
  return found
end

function operations.stats()
  expire()
  local following, oldest = field('next'), nil
  local below, above = '(' .. digits(following), digits(following)
  for _, n in ipairs(redis.call('ZRANGE', key('groups'), 0, -1)) do
    local state, put = unpack(of_group(n, 'state', 'put'))
    local taken = tonumber(n) < following and (state == 'finished' or state == 'dead')
    if not taken then
      oldest = math.min(oldest or math.huge, tonumber(put))
    end
  end
  return {
    redis.call('ZCARD', key('queued')),
    redis.call('ZCARD', key('leased')),
    redis.call('ZCOUNT', key('finished'), above, '+inf'),
    redis.call('ZCOUNT', key('finished'), '-inf', below) + redis.call('ZCOUNT', key('dead'), '-inf', below),
    redis.call('HLEN', key('letters')),
    following,
    field('acknowledged'),
    oldest and now - oldest or -1,
    field('draining'),
    redis.call('HGET', base, 'run') or '',
    field('capacity'),
  }
end

function operations.dead()
  return redis.call('HGETALL', key('letters'))
end

-- Arguments: 'all', or 'some' and numbers.
function operations.requeue(which)
  expire()
  local wanted, count = {}, 0
  for at = 3, #ARGV do
    wanted[ARGV[at]] = true
  end
  for _, n in ipairs(redis.call('ZRANGE', key('dead'), digits(field('next')), '+inf', 'BYSCORE')) do
    if which == 'all' or wanted[n] then
      queue_again(n)
      count = count + 1
    end
  end
  return count
end

function operations.drain(on)
  redis.call('HSET', base, 'draining', on)
end

function operations.entries(first, count)
  local entries = {}
  for at, n in ipairs(redis.call('ZRANGE', key('groups'), first, '+inf', 'BYSCORE', 'LIMIT', 0, count)) do
    entries[at] = entry(n)
  end
  return { field('next'), entries }
end

-- A list can be longer than Lua allows for arguments, so operations read lists from ARGV.
local done, result = pcall(operations[ARGV[1]], unpack(ARGV, 2, math.min(#ARGV, 9)))
if done then
  return { 'ok', result }
end
if type(result) == 'table' and result.refusal then
  return result.refusal
end
error(result, 0)
