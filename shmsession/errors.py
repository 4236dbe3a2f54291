"""Every error the library raises, under one root.

ShmSessionError
├── ConfigError (ValueError)         a setting or a combination of settings that cannot work
├── NoSessionError (LookupError)     `Session.of` found no session: no middleware, or a skipped path
├── NotCreated                       a session is needed that nobody has created, or agreed to
├── NotLoggedIn                      `shmsession.auth`: nobody is logged in
├── Forbidden                        `shmsession.auth`: the user may not do this, or the request was not theirs
├── SessionGone                      the session was destroyed or renewed by somebody else meanwhile
├── ReadOnlySession (TypeError)      a write on a read-only session
├── SessionTooLarge (ValueError)     the session's data would exceed `max_size`
├── ResponseStarted                  a new cookie is needed, but the headers have left
├── TooManySessions                  a login, and its user has as many sessions as one may have
├── ContentionError                  `apply` lost the race for one key too often
├── CodecError (ValueError)
│   ├── UnsupportedValue (TypeError) a value that cannot be stored, named by its key
│   └── UndecodableValue             stored bytes that this process cannot decode
└── StoreError                       sessions cannot be served now: middleware answers 503
    ├── StoreFull                    no room left that may be used for this
    ├── Unreadable                   written under an unknown Key, or by a newer version
    ├── UnsafeStore                  the directory, a file in it or its other users are not to be trusted
    └── BackendError                 the database behind the memory store answered with an error
        └── BackendUnavailable       it could not be reached, or did not answer in time
"""


class ShmSessionError(Exception):
    """Root of all errors of this library."""


class ConfigError(ShmSessionError, ValueError):
    """A setting that cannot work; the message says what to write instead."""


class NoSessionError(ShmSessionError, LookupError):
    """`Session.of` was given a request that no SessionMiddleware has seen."""


class NotCreated(ShmSessionError):
    """A session is needed that is not there: in manual mode nobody has created it, in opt-in mode nobody has agreed to
    it. Nothing was written."""


class NotLoggedIn(ShmSessionError):
    """Nobody is logged in where somebody must be: answer 401, or show the login page."""


class Forbidden(ShmSessionError):
    """The user lacks a right, or another site may have sent the request: answer 403."""


class SessionGone(ShmSessionError):
    """The session was destroyed, renewed or expired: what this request changes is dropped."""


class ReadOnlySession(ShmSessionError, TypeError):
    """A write on a session that was opened read-only."""


class SessionTooLarge(ShmSessionError, ValueError):
    """The session's encoded data would exceed the configured `max_size`; nothing was written."""


class ResponseStarted(ShmSessionError):
    """The change needs a new cookie, but the response's headers have already been sent."""


class TooManySessions(ShmSessionError):
    """A login whose user has as many sessions as `max_sessions_per_user` says; it is dropped, with all that its request
    changed. The message says how to end one."""


class ContentionError(ShmSessionError):
    """`apply` or `increment` met a changed value at every one of its attempts; nothing was written."""


class CodecError(ShmSessionError, ValueError):
    """A value cannot be turned into bytes, or bytes into a value."""


class UnsupportedValue(CodecError, TypeError):
    """A value of a type that sessions do not store; the message names its key."""


class UndecodableValue(CodecError):
    """Stored bytes that this process cannot decode, such as a type it has not registered."""


class StoreError(ShmSessionError):
    """The memory store cannot serve this request now. It says nothing about whether a session exists."""


class StoreFull(StoreError):
    """No room left in the memory store for this kind of write; nothing was written."""


class Unreadable(StoreError):
    """A record sealed under a Key this process does not have, or in a newer format. It is left untouched."""


class UnsafeStore(StoreError):
    """The store's directory or a file in it is not private to this user and PID namespace: refused."""


class BackendError(StoreError):
    """The database answered with an error; the message says what to do. Sessions in memory go on working."""


class BackendUnavailable(BackendError):
    """The database could not be reached in time. Nothing is known of what it holds."""
