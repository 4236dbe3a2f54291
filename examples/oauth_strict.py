"""Logging in at another site (OAuth 2.0, OpenID Connect) with a SameSite=Strict cookie.

    SHMSESSION_SECURE=0 uvicorn examples.oauth_strict:app

Open http://localhost:8000. The provider is a stand-in at http://127.0.0.1:8000, which for a browser is another site.
"""

import secrets
from html import escape
from urllib.parse import urlencode

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.routing import Mount, Route

from examples._start import store_or_exit
from shmsession import Session
from shmsession.asgi import SessionMiddleware

store = store_or_exit(same_site="Strict")


def shown(body: str, head: str = "") -> HTMLResponse:
    return HTMLResponse(f'<!doctype html>\n<meta name="color-scheme" content="light dark">{head}\n{body}\n')


# --- the site ---


async def index(request: Request) -> Response:
    user = Session.of(request).user_id
    if user is None:
        return shown('<form method="post" action="/login"><button>Log in</button></form>')
    return shown(f"<p>Welcome, {escape(user)}.</p>")


async def login(request: Request) -> Response:
    """Remember in the session what was asked, and send the visitor to the provider."""
    state = Session.of(request)["oauth_state"] = secrets.token_urlsafe(32)
    query = urlencode({"redirect_uri": str(request.url_for("callback")), "state": state, "response_type": "code"})
    provider = request.url.replace(hostname="127.0.0.1", path="/provider/authorize", query=query)
    return RedirectResponse(str(provider), 303)


async def callback(request: Request) -> Response:
    """The provider sends the visitor here, and the browser no Strict cookie with them: go on from a page of our own."""
    finish = escape(f"/finish?{request.url.query}")
    page = shown(f'<a href="{finish}">Go on</a>', f'<meta http-equiv="refresh" content="0;url={finish}">')
    page.headers.update({"Cache-Control": "no-store", "Referrer-Policy": "no-referrer"})
    return page


async def finish(request: Request) -> Response:
    """Here the cookie is back. Whoever sent the visitor, only an answer to what this session asked is taken."""
    session = Session.of(request)
    asked, told = session.pop("oauth_state", ""), request.query_params.get("state", "")
    if not asked or not secrets.compare_digest(asked.encode(), told.encode()):
        raise HTTPException(400, "This is no answer to a login that began here. Begin again.")
    user = await who_is(request.query_params.get("code", ""))
    session.renew(user_id=user)
    return RedirectResponse("/", 303)


async def who_is(code: str) -> str:
    """A real site now asks the provider, server to server, whom the code stands for; the stand-in's says so itself."""
    if not code:
        raise HTTPException(403, "The provider did not say who you are.")
    return code


# --- the stand-in for the provider ---


async def authorize(request: Request) -> Response:
    """Ask the visitor, then send them back. A real one logs them in, and knows the redirect_uri."""
    if request.method == "GET":
        return shown('<form method="post"><button name="user" value="ada">Go on as Ada</button></form>')
    back = urlencode({"code": "ada", "state": request.query_params["state"]})
    return RedirectResponse(f"{request.query_params['redirect_uri']}?{back}", 303)


app = Starlette(
    routes=[
        Route("/", index),
        Route("/login", login, methods=["POST"]),
        Route("/callback", callback),
        Route("/finish", finish),
        Mount("/provider", routes=[Route("/authorize", authorize, methods=["GET", "POST"])]),
    ],
    middleware=[Middleware(SessionMiddleware, store=store, skip=("/callback", "/provider"))],
)
