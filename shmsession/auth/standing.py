"""A request's user: who it is, and the verbs that change it. For async code, and for code that blocks."""

from contextlib import suppress
from datetime import UTC, datetime, timedelta
from enum import Enum
from typing import Any, Final, Generic, TypeVar

from shmsession.codec import decode, encode
from shmsession.errors import NotCreated, ResponseStarted, SessionGone, StoreError
from shmsession.hooks import LoggedOut, LoginRefused
from shmsession.ids import new_id, tag_of
from shmsession.memory.store import Missing
from shmsession.record import USER_KEY, Record
from shmsession.session import Session
from shmsession.working import KEEP

from . import csrf
from .calling import BLOCKING, WAITING, Way, run
from .rights import Rights
from .users import Users, is_active, stands

UserT = TypeVar("UserT")


class LoginStatus(Enum):
    """How a login stands now. STALE: load the user again. DIFFERENT_ID: somebody else is logged in. LOGGED_OUT: nobody
    is, or the session has ended."""

    LOGGED_IN = "logged in"
    STALE = "stale"
    DIFFERENT_ID = "different id"
    LOGGED_OUT = "logged out"


class Standing(Generic[UserT]):
    """The user of one request, or of one websocket, as loaded."""

    way: Way
    current_user: UserT | None = None
    """Who is logged in, or the anonymous user; None without one. It may serve other requests too: do not change it."""
    is_authenticated = False
    """Whether somebody is logged in whom the application still knows, and who is active."""
    encoded: bytes | None = None
    """The user id that the session has."""

    def __init__(self, users: Users[UserT], session: Session) -> None:
        self.users: Final = users
        self.session: Final = session

    def __repr__(self) -> str:
        return f"<{type(self).__name__}, {'logged in' if self.is_authenticated else 'anonymous'}>"

    # ── who it is ─────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def user_id(self) -> Any:
        """The id of who is logged in; None for nobody, and for one who is inactive or whom the application lost."""
        return decode(self.encoded) if self.is_authenticated and self.encoded is not None else None

    @property
    def is_active(self) -> bool:
        """Whether there is a user, the anonymous one included, that does not say it is inactive."""
        return self.current_user is not None and is_active(self.current_user)

    @property
    def is_anonymous(self) -> bool:
        """Whether nobody is logged in."""
        return not self.is_authenticated

    def fresh(self, max_age: timedelta) -> bool:
        """Whether the user was logged in less than `max_age` ago: ask before what needs the password once more."""
        at = self.session.authenticated_at
        if at is None or not self.is_authenticated:
            return False
        now = datetime.fromtimestamp(self.users.store.clock.now() / 1000, UTC)
        return timedelta(0) <= now - at < max_age

    def stand(self, encoded: bytes | None, user: UserT | None) -> bool:
        """Take `user` for who is logged in, if it may be; whether it may."""
        self.encoded = encoded
        self.is_authenticated = user is not None and encoded != self.users.anonymous and stands(user)
        self.current_user = user if self.is_authenticated else None
        return self.is_authenticated

    async def find(self, encoded: bytes | None) -> None:
        """Take whom the session names, or else the anonymous user."""
        await self._take(encoded, None if encoded is None else await self.users.find(encoded, self.way))

    async def _take(self, encoded: bytes | None, user: UserT | None) -> None:
        if not self.stand(encoded, user) and self.users.anonymous is not None:
            self.current_user = await self.users.find(self.users.anonymous, self.way)

    # ── verbs ─────────────────────────────────────────────────────────────────────────────────────────────────

    def remember_user(self, remember: bool) -> None:
        """Let the login last for `max_lifespan` (True) or `lifespan` (False)."""
        self.session.set_longterm(remember)

    def login_failed(self, user_id: Any = None) -> None:
        """Tell the hooks that somebody was refused: a wrong password, an unknown name. `user_id`: what was tried."""
        self._refused(encode(user_id, "user_id"))

    def _refused(self, encoded: bytes) -> None:
        self.users.store.hooks.emit(LoginRefused(self.session.handle or "", tag_of(encoded).hex()))

    async def _login(self, user_id: Any, *, remember: bool) -> bool:
        session, encoded = self.session, encode(user_id, "user_id")
        if user_id is None:
            raise TypeError("login(None) logs nobody in: logout() ends a login")
        session.edit()
        if session.headers_sent:
            raise ResponseStarted(
                "a login needs a new cookie, but the response has begun: log in before the first byte (before accept() "
                "on a websocket)"
            )
        asked = self.users.store.clock.boot()
        user = await self.users.load(encoded, self.way)
        if user is None or encoded == self.users.anonymous or not stands(user):
            self._refused(encoded)
            return False
        if session.encoded_user not in (None, encoded):
            session.clear()  # what belongs to one user is not shown to the next
        await self._recall(user_id)
        session.renew(user_id=user_id)
        session.edits.asked = asked  # whoever revoked all sessions of the user meanwhile meant this one too
        session.set_longterm(remember)
        return self.stand(encoded, user)

    async def _recall(self, user_id: Any) -> None:
        """Let `max_sessions_per_user` count what only the backend has, too."""
        store = self.users.store
        if store.is_persistent and store.config.max_sessions_per_user is not None:
            with suppress(StoreError):  # a login needs no database: without one, memory is what counts
                await self.way.call(store.sync.recall_user, user_id)

    async def _logout(self) -> None:
        session = self.session
        tag, handle = session.user_tag, session.handle
        session.destroy()
        if tag is not None and handle is not None:
            self.users.store.hooks.emit(LoggedOut(handle, tag.hex()))
        await self.find(None)

    async def _reload_user(self) -> None:
        encoded = self.encoded
        await self._take(encoded, None if encoded is None else await self.users.load(encoded, self.way))

    # ── how it stands now ─────────────────────────────────────────────────────────────────────────────────────

    async def _status(self) -> LoginStatus:
        stored = await self._stored_user()
        if stored is None:
            return LoginStatus.LOGGED_OUT
        if stored != self.encoded:
            return LoginStatus.DIFFERENT_ID
        if not self.is_authenticated:
            return LoginStatus.STALE
        if self.users.remembers and self.users.known(stored) is not self.current_user:
            return LoginStatus.STALE
        return LoginStatus.LOGGED_IN

    async def _stored_user(self) -> bytes | None:
        """Whom the session names now, whichever process changed it; what this request changed counts as done."""
        session, store = self.session, self.users.store
        if not session.exists or session.raw_handle is None or session.edits.user is not KEEP:
            return session.encoded_user
        found = store.memory.load(session.raw_handle, store.clock.now())
        if found is Missing.UNKNOWN and await self.way.call(store.refill, session.raw_handle):
            found = store.memory.load(session.raw_handle, store.clock.now())
        return found.split().get(USER_KEY) if isinstance(found, Record) else None

    # ── forms ─────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def csrf_token(self) -> str:
        """For the field `csrf_token` of a form, or the header X-CSRF-Token: another one each time, good until the
        session gets a new id or ends.

        A visitor without a session gets one, and a login of this request is committed, for tokens belong to the id.
        Raises NotCreated in manual mode before `create`, and in opt-in mode before the visitor has agreed; StoreError.
        """
        session = self.session
        if session.is_emptied:
            session.destroy()
        if session.is_new and session.gone:
            if self._was_renewed():
                return _worthless()  # no cookie of ours may overtake the login's
            session.begin_anew()
        if session.is_new:
            session.edit()
            session.create()
        if session.is_new or session.edits.renew:
            try:
                session.save()
            except SessionGone:  # what the page changed is dropped, as without a form in it
                return _worthless()
        if session.id is None:
            raise NotCreated(
                "there is no session that a CSRF token could belong to, for the visitor has not agreed to be "
                "remembered: ask for it, and call set_store(True), before you show the form"
            )
        return csrf.token_for(session.id)

    def _was_renewed(self) -> bool:
        """Whether the session that has ended goes on under another id, which the browser has or is about to get."""
        store, handle = self.users.store, self.session.raw_handle
        return handle is not None and store.memory.load(handle, store.clock.now()) is Missing.RENEWED

    def check_csrf(self, token: str | None) -> bool:
        """Whether this came from a page of this session (`csrf_token`)."""
        session_id = self.session.id
        return isinstance(token, str) and session_id is not None and csrf.belongs(token, session_id)


class AuthSession(Standing[UserT]):
    """The user of a request in async code (`await auth.load(request)`)."""

    way = WAITING

    async def login(self, user_id: Any, *, remember: bool = False) -> bool:
        """Log a user in, whom the application has recognised; False when there is no such user, or none that is active.

        When the response begins the session gets a new id, and the old one is dead in all processes. What the session
        of a visitor holds stays, that of another user goes. `remember`: see `remember_user`. Raises ResponseStarted,
        NotCreated, ReadOnlySession, UnsupportedValue, and what `load_user` raises.
        """
        return await self._login(user_id, remember=remember)

    async def logout(self) -> None:
        """End the session with all that it holds, in all processes, now."""
        await self._logout()

    async def reload_user(self) -> None:
        """Load the user now, whatever is remembered."""
        await self._reload_user()

    async def has(self, rights: Rights) -> bool:
        """Whether the user, or the anonymous one, has these rights."""
        return await rights.held_by(self.current_user, self.way)

    async def status(self) -> LoginStatus:
        """How the login stands now, whichever process changed it: for websockets, and whatever else lasts."""
        return await self._status()


class SyncAuthSession(Standing[UserT]):
    """The user of a request in code that blocks (`auth.sync.load(request)`): as AuthSession, without await."""

    way = BLOCKING

    def login(self, user_id: Any, *, remember: bool = False) -> bool:
        """See `AuthSession.login`."""
        return run(self._login(user_id, remember=remember))

    def logout(self) -> None:
        """See `AuthSession.logout`."""
        run(self._logout())

    def reload_user(self) -> None:
        """See `AuthSession.reload_user`."""
        run(self._reload_user())

    def has(self, rights: Rights) -> bool:
        """See `AuthSession.has`."""
        return run(rights.held_by(self.current_user, self.way))

    def status(self) -> LoginStatus:
        """See `AuthSession.status`."""
        return run(self._status())


def _worthless() -> str:
    """A CSRF token of no session."""
    return csrf.token_for(new_id())
