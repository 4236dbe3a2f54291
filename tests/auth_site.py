"""A small site with logins, for Starlette and for Flask, on real servers too: `tests.auth_site:asgi_app`, `wsgi_app`.

Its users stand in a JSON file, by name; who knows a name may log in.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import flask
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from shmsession import SessionStore, asgi, wsgi
from shmsession.auth import Auth, AuthConfig, Rights
from shmsession.auth.standing import Standing

VARIABLE: Final = "AUTH_SITE_USERS"


@dataclass(frozen=True)
class User:
    name: str
    permissions: tuple[str, ...] = ()
    is_active: bool = True

    def has(self, permission: str) -> bool:
        return permission in self.permissions


@dataclass
class Users:
    """Who there is. `loads`: who was loaded in this process."""

    path: Path
    loads: list[str]

    def write(self, *users: User) -> None:
        self.path.write_text(json.dumps({user.name: [user.permissions, user.is_active] for user in users}))

    def load(self, name: str) -> User | None:
        self.loads.append(name)
        found = json.loads(self.path.read_text()).get(name)
        return None if found is None else User(name, tuple(found[0]), found[1])

    async def load_async(self, name: str) -> User | None:
        return self.load(name)


def about(me: Standing[User]) -> dict[str, Any]:
    user = me.current_user
    return {
        "user": me.user_id, "name": None if user is None else user.name, "data": me.session.to_dict(),
        "authenticated": me.is_authenticated, "pid": os.getpid(),
    }  # fmt: skip


def starlette_site(auth: Auth[User]) -> asgi.App:
    async def show(request: Request) -> JSONResponse:
        return answer(about(await auth.load(request)))

    async def form(request: Request) -> JSONResponse:
        return answer({"token": (await auth.load(request)).csrf_token})

    @auth.requires(login=False, csrf=True)
    async def login(request: Request) -> JSONResponse:
        return await enter(request)

    async def enter(request: Request) -> JSONResponse:
        me = await auth.load(request)
        entered = await me.login(request.path_params["name"], remember="remember" in request.query_params)
        return answer({"entered": entered, **about(me)}, 200 if entered else 401)

    @auth.requires(login=False, csrf=True)
    async def logout(request: Request) -> JSONResponse:
        me = await auth.load(request)
        await me.logout()
        return answer(about(me))

    @auth.requires(Rights.permission("admin"), methods=["GET"])
    async def admin(request: Request) -> JSONResponse:
        return answer(about(await auth.load(request)))

    async def put(request: Request) -> JSONResponse:
        me = await auth.load(request)
        me.session["value"] = request.path_params["value"]
        return answer(about(me))

    async def renew(request: Request) -> JSONResponse:
        (await auth.load(request)).session.renew()
        return answer({})

    async def clear(request: Request) -> JSONResponse:
        auth.cache_clear_user(request.path_params["name"])
        return answer({})

    def answer(body: dict[str, Any], status: int = 200) -> JSONResponse:
        return JSONResponse(body, status, {"X-Worker-Pid": str(os.getpid())})

    app = Starlette(
        routes=[
            Route("/ping", lambda request: answer({})), Route("/me", show), Route("/form", form),
            Route("/admin", admin, methods=["GET", "POST"]), Route("/login/{name}", login, methods=["POST"]),
            Route("/enter/{name}", enter, methods=["POST"]), Route("/logout", logout, methods=["POST"]),
            Route("/put/{value}", put, methods=["POST"]), Route("/renew", renew, methods=["POST"]),
            Route("/clear/{name}", clear, methods=["POST"]),
        ]
    )  # fmt: skip
    return asgi.SessionMiddleware(app, auth.store)


def flask_site(auth: Auth[User]) -> wsgi.App:
    app = flask.Flask("auth_site")
    load = auth.sync.load

    @app.after_request
    def say_who(response: flask.Response) -> flask.Response:
        response.headers["X-Worker-Pid"] = str(os.getpid())
        return response

    @app.get("/ping")
    def ping() -> dict[str, Any]:
        return {}

    @app.get("/me")
    def show() -> dict[str, Any]:
        return about(load(flask.request))

    @app.get("/form")
    def form() -> dict[str, Any]:
        return {"token": load(flask.request).csrf_token}

    @app.post("/login/<name>")
    @auth.requires(login=False, csrf=True)
    def login(name: str) -> tuple[dict[str, Any], int]:
        return enter(name)

    @app.post("/enter/<name>")
    def enter(name: str) -> tuple[dict[str, Any], int]:
        me = load(flask.request)
        entered = me.login(name, remember="remember" in flask.request.args)
        return {"entered": entered, **about(me)}, 200 if entered else 401

    @app.post("/logout")
    @auth.requires(login=False, csrf=True)
    def logout() -> dict[str, Any]:
        me = load(flask.request)
        me.logout()
        return about(me)

    @app.route("/admin", methods=["GET", "POST"])
    @auth.requires(Rights.permission("admin"), methods=["GET"])
    def admin() -> dict[str, Any]:
        return about(load(flask.request))

    @app.post("/put/<value>")
    def put(value: str) -> dict[str, Any]:
        me = load(flask.request)
        me.session["value"] = value
        return about(me)

    @app.post("/renew")
    def renew() -> dict[str, Any]:
        load(flask.request).session.renew()
        return {}

    @app.post("/clear/<name>")
    def clear(name: str) -> dict[str, Any]:
        auth.cache_clear_user(name)
        return {}

    return wsgi.SessionMiddleware(app, auth.store)


SITES: Final = {"asgi": starlette_site, "wsgi": flask_site}

if VARIABLE in os.environ:
    store = SessionStore()
    users = Users(Path(os.environ[VARIABLE]), [])
    auth = Auth(store, users.load_async, config=AuthConfig())
    asgi_app, wsgi_app = starlette_site(auth), flask_site(auth)
