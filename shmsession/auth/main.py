"""The logins of one application."""

from collections.abc import Awaitable, Callable, Collection, Coroutine
from typing import Any, Final, Generic, TypeVar, overload

from shmsession.codec import encode
from shmsession.errors import NoSessionError
from shmsession.session import Port, find_session
from shmsession.store import SessionStore

from .calling import run
from .config import AuthConfig
from .requiring import Requirement
from .rights import Rights
from .standing import AuthSession, Standing, SyncAuthSession
from .users import Users

UserT = TypeVar("UserT")

KEY: Final = "shmsession.auth"
"""Where a scope or environ keeps its user."""

StandingT = TypeVar("StandingT", bound=Standing[Any])


class Auth(Generic[UserT]):
    """The logins of one application: make one, beside its `SessionStore`.

    `load_user` gives the application's user by id, or None when there is none any more; sync or async. A sync one runs
    in a thread when async code asks, an async one on an event loop of the process when code that blocks does. What it
    raises goes on to the application: an error is never taken for nobody.

    Of a user are asked, if it has them, `is_active`, `is_authenticated`, `is_anonymous` (attributes or methods; who
    says no to one of the first two, or yes to the last, is not logged in) and `has(permission)` (see Rights).
    """

    @overload
    def __init__(
        self, store: SessionStore, load_user: Callable[[Any], Awaitable[UserT | None]], *,
        config: AuthConfig | None = None,
    ) -> None: ...  # fmt: skip
    @overload
    def __init__(
        self, store: SessionStore, load_user: Callable[[Any], UserT | None], *, config: AuthConfig | None = None
    ) -> None: ...
    def __init__(
        self, store: SessionStore, load_user: Callable[[Any], Any], *, config: AuthConfig | None = None
    ) -> None:
        self.store: Final = store
        self.config: Final = config or AuthConfig()
        self._users: Final[Users[UserT]] = Users(store, load_user, self.config)
        self.sync: Final = SyncAuth(self._users)

    def __repr__(self) -> str:
        return f"<Auth of {self.store!r}>"

    def load(self, request: Any) -> Coroutine[Any, Any, AuthSession[UserT]]:
        """The user of a request or websocket: what `Session.of` takes. Within one request it is loaded once.

        To be awaited. Raises NoSessionError, StoreError, and what `load_user` raises.
        """
        return _load(AuthSession, self._users, request)

    def requires(
        self, rights: Rights | None = None, *, methods: Collection[str] | None = None, login: bool = True,
        csrf: bool = False,
    ) -> Requirement[UserT]:  # fmt: skip
        """What a request must bring: a login, unless `login` is False, `rights`, and one of the `methods`, if given.

        `csrf`: what changes something must carry a token of its session (`csrf_token`) in the header X-CSRF-Token or
        the field `csrf_token` of its form, and a websocket must come from a page of this site.
        """
        return Requirement(self.load, self.sync.load, rights, methods, login=login, csrf=csrf)

    def cache_clear_user(self, user_id: Any) -> None:
        """Let every process load this user anew for its next request. Raises StoreError."""
        self._users.clear(encode(user_id, "user_id"))

    def cache_clear_all(self) -> None:
        """Let every process load every user anew for its next request. Raises StoreError."""
        self._users.clear()


class SyncAuth(Generic[UserT]):
    """`Auth.load` for code that blocks."""

    def __init__(self, users: Users[UserT]) -> None:
        self._users = users

    def load(self, request: Any) -> SyncAuthSession[UserT]:
        """See `Auth.load`."""
        return run(_load(SyncAuthSession, self._users, request))


async def _load(kind: type[StandingT], users: Users[Any], request: Any) -> StandingT:
    """Kept in the scope or environ, not in the session: each would keep the other alive until the garbage collector
    finds them."""
    holder, session = find_session(request)
    if session.port is not users.store and not _are_one(session.port, users.store):
        raise NoSessionError(
            f"this session is none of {users.store!r}, which this Auth was made with: give both the same store, and "
            "where there are two load each user below the SessionMiddleware of its own"
        )
    encoded = session.encoded_user
    if session.gone:  # others have ended it, and what it holds can still be read
        encoded = None
    me = holder.get(KEY)
    if type(me) is kind and me.users is users and me.encoded == encoded:
        return me
    me = kind(users, session)
    user = users.known(encoded)
    if user is None or not me.stand(encoded, user):
        await me.find(encoded)
    holder[KEY] = me
    return me


def _are_one(port: Port, store: SessionStore) -> bool:
    """Whether they are the same sessions: else users of one application would be taken for those of another."""
    return isinstance(port, SessionStore) and port.memory.environment is store.memory.environment
