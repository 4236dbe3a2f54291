"""What a request must bring to go on, as a decorator of views, as a dependency, and as a question."""

import sys
from collections.abc import Awaitable, Callable, Collection, Coroutine
from functools import wraps
from inspect import iscoroutinefunction
from typing import Any, Final, Generic, ParamSpec, TypeVar, cast, overload

from shmsession.errors import Forbidden, NotLoggedIn

from . import requests
from .calling import run
from .rights import Rights
from .standing import AuthSession, Standing, SyncAuthSession

UserT = TypeVar("UserT")
P = ParamSpec("P")
R = TypeVar("R")

Load = Callable[[Any], Coroutine[Any, Any, AuthSession[UserT]]]
SyncLoad = Callable[[Any], SyncAuthSession[UserT]]


class Requirement(Generic[UserT]):
    """See `Auth.requires`. Whoever does not meet it is answered 401 without a login, and 403 with one."""

    def __init__(
        self, load: Load[UserT], load_sync: SyncLoad[UserT], rights: Rights | None, methods: Collection[str] | None,
        *, login: bool, csrf: bool,
    ) -> None:  # fmt: skip
        self._load, self._load_sync = load, load_sync
        self._rights: Final = rights
        self._methods: Final = None if methods is None else frozenset(method.upper() for method in methods)
        self._login, self._csrf = login, csrf

    def __call__(self, view: Callable[P, R]) -> Callable[P, R]:
        """Decorate a view, sync or async, that takes its request as an argument, or is Flask's."""
        if iscoroutinefunction(view):

            @wraps(view)
            async def check_and_await(*args: P.args, **kwargs: P.kwargs) -> Any:
                await self.check(requests.find(args, kwargs))
                return await view(*args, **kwargs)

            return cast("Callable[P, R]", check_and_await)

        @wraps(view)
        def check_and_call(*args: P.args, **kwargs: P.kwargs) -> R:
            self._check_sync(requests.find(args, kwargs))
            return view(*args, **kwargs)

        return check_and_call

    @property
    def dependency(self) -> Callable[[Any], Awaitable[AuthSession[UserT]]]:
        """For FastAPI: `Depends(auth.requires(…).dependency)` gives the `AuthSession`."""

        async def check(request: Any) -> AuthSession[UserT]:
            return await self.check(request)

        check.__annotations__ = {"request": sys.modules["starlette.requests"].HTTPConnection}
        return check

    async def check(self, request: Any) -> AuthSession[UserT]:
        """The request's user, if the request may go on; else it is refused by its framework's own means.

        Raises Forbidden or NotLoggedIn for one of no framework that is known here.
        """
        me = await self._load(request)
        if self._needs_token(me, request) and not me.check_csrf(await requests.token_awaited(request)):
            requests.refuse(request, Forbidden(_NOT_OWN))
        if not await self._meets(me, requests.method_of(request)):
            requests.refuse(request, self._refusal(me))
        return me

    def _check_sync(self, request: Any) -> None:
        me = self._load_sync(request)
        if self._needs_token(me, request) and not me.check_csrf(requests.token_in(request)):
            requests.refuse(request, Forbidden(_NOT_OWN))
        if not run(self._meets(me, requests.method_of(request))):
            requests.refuse(request, self._refusal(me))

    @overload
    def validate(self, me: AuthSession[UserT], method: str = "GET") -> Awaitable[bool]: ...
    @overload
    def validate(self, me: SyncAuthSession[UserT], method: str = "GET") -> bool: ...
    def validate(self, me: Standing[UserT], method: str = "GET") -> Awaitable[bool] | bool:
        """Whether a user who asks by this method meets it, the CSRF token aside; of an AuthSession to be awaited."""
        work = self._meets(me, method)
        return run(work) if isinstance(me, SyncAuthSession) else work

    async def _meets(self, me: Standing[UserT], method: str) -> bool:
        if self._login and not me.is_authenticated:
            return False
        if self._methods is not None and method.upper() not in self._methods:
            return False
        return self._rights is None or await self._rights.held_by(me.current_user, me.way)

    def _needs_token(self, me: Standing[UserT], request: Any) -> bool:
        """Whether the request must carry a token; one that can have no good one is refused before its body is read."""
        is_websocket = requests.is_websocket(request)
        if not self._csrf or (requests.method_of(request) in requests.SAFE and not is_websocket):
            return False
        if requests.is_cross_site(request) or not (is_websocket or me.session.exists):
            requests.refuse(request, Forbidden(_NOT_OWN))
        return not is_websocket

    def _refusal(self, me: Standing[UserT]) -> Forbidden | NotLoggedIn:
        would_help = self._login or self._rights is not None
        return NotLoggedIn("log in first") if would_help and not me.is_authenticated else Forbidden(_FORBIDDEN)


_FORBIDDEN: Final = "you may not do this"
_NOT_OWN: Final = (
    "this form was not sent by its own page, or is too old: load the page again (its field csrf_token, or the header "
    "X-CSRF-Token, must carry a token of this session)"
)
