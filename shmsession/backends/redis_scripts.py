"""What runs inside Redis: scripts for one key each, and the form of the rows that they compare.

A row is a string: a head, the user, the body. That takes 400 bytes less than a hash of its parts.
"""

import struct
from hashlib import sha1
from typing import Final

from .base import FOREVER, Row, State

HEAD: Final = struct.Struct(">BQQQB")
"""State, epoch, version, horizon, and how many bytes of the user follow; then the user; then the body."""


class Script:
    """A script for one key, and the name by which the server remembers it."""

    def __init__(self, text: str) -> None:
        self.text = f"local DEAD, LIVE, FOREVER = {State.DEAD:d}, {State.LIVE:d}, {FOREVER:d}\n{text}"
        self.sha = sha1(self.text.encode()).hexdigest()  # noqa: S324  # the server's choice


_UNTIL: Final = """
local function live_until(horizon)
  if horizon < FOREVER then redis.call('PEXPIREAT', KEYS[1], string.format('%.0f', horizon))
  else redis.call('PERSIST', KEYS[1]) end
end
"""

# base.wins. Arguments: the row; whom it is already listed for and until when, if it is.
# Answers REFUSED or APPLIED, then the head and the user of what was there, if anything was; or UNLISTED, then a head of
# which only state and horizon count, and the user, of the row that would stand there, when it is not listed for that:
# nothing was changed then.
REFUSED, APPLIED, UNLISTED = range(3)
WRITE: Final = Script(
    _UNTIL
    + """
local value, listed, listed_until = ARGV[1], ARGV[2], tonumber(ARGV[3])
local state, epoch, version, horizon, length = struct.unpack('>BI8I8I8B', value)
local user = string.sub(value, 27, 26 + length)
local held = redis.call('GETRANGE', KEYS[1], 0, 280)
local applied, later = true, true
if held ~= '' then
  local s, e, v, h, n = struct.unpack('>BI8I8I8B', held)
  held = string.sub(held, 1, 26 + n)
  applied = state == DEAD or (s ~= DEAD and (epoch > e or (epoch == e and version > v)))
  later = horizon > h
  if horizon < h then
    value = string.sub(value, 1, 17) .. string.sub(held, 18, 25) .. string.sub(value, 26)
    horizon = h
  end
  if not applied then state, user = s, string.sub(held, 27) end
end
if (applied or later) and state == LIVE and user ~= '' and (user ~= listed or horizon > listed_until) then
  return struct.pack('>BBI8I8I8B', 2, state, epoch, version, horizon, #user) .. user
end
if applied then redis.call('SET', KEYS[1], value)
elseif later then redis.call('SETRANGE', KEYS[1], 17, string.sub(value, 18, 25)) end
if applied or later then live_until(horizon) end
return string.char(applied and 1 or 0) .. held
"""
)

# A row that is not DEAD becomes so, and nobody's. Answers what it was, whose and until when; nothing when it was DEAD.
KILL: Final = Script(
    _UNTIL
    + """
local held = redis.call('GETRANGE', KEYS[1], 0, 25)
if held == '' then return {} end
local s, e, v, h, n = struct.unpack('>BI8I8I8B', held)
if s == DEAD then return {} end
local owner = n > 0 and redis.call('GETRANGE', KEYS[1], 26, 25 + n) or ''
redis.call('SET', KEYS[1], string.char(DEAD) .. string.sub(held, 2, 25) .. string.char(0))
live_until(h)
return {s, owner, h}
"""
)

# Lists a handle until its horizon at least, drops what is past by the clock that rows vanish by, and lets the whole
# set live as long as its longest entry.
LIST: Final = Script(
    _UNTIL
    + """
local held = redis.call('ZSCORE', KEYS[1], ARGV[1])
if held and tonumber(held) >= tonumber(ARGV[2]) then return 0 end
redis.call('ZADD', KEYS[1], ARGV[2], ARGV[1])
local time = redis.call('TIME')
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', string.format('(%.0f', time[1] * 1000 + math.floor(time[2] / 1000)))
local longest = redis.call('ZREVRANGE', KEYS[1], 0, 0, 'WITHSCORES')[2]
if longest then live_until(tonumber(longest)) end
return 1
"""
)

# Forgets the handle of a row that is DEAD until a horizon. Listed for longer, it may stand for a later row.
UNLIST: Final = Script("""
local held = redis.call('ZSCORE', KEYS[1], ARGV[1])
return held and tonumber(held) <= tonumber(ARGV[2]) and redis.call('ZREM', KEYS[1], ARGV[1]) or 0
""")


def packed(row: Row) -> bytes:
    """The row as it is stored."""
    head = HEAD.pack(row.state, row.epoch, row.version, row.horizon, len(row.user))
    return b"".join((head, row.user, row.body))


def unpacked(handle: bytes, value: bytes) -> Row:
    """The row that is stored so. Raises ValueError or struct.error for what is none."""
    state, epoch, version, horizon, length = HEAD.unpack_from(value)
    start = HEAD.size + length
    return Row(handle, State(state), epoch, version, horizon, value[HEAD.size : start], value[start:])
