"""Flask: a small site with logins, on every worker process.

    SHMSESSION_SECURE=0 gunicorn -c gunicorn.conf.py -k gthread --threads 8 examples.login.wsgi_app:app

``asgi_app.py`` is the same site for Starlette: the same names in the same order. It has a live page too, which here
would hold a thread for as long as it is open.
"""

from datetime import timedelta
from functools import partial
from urllib.parse import urlencode

from flask import Flask, Response, redirect, request
from werkzeug.exceptions import HTTPException
from werkzeug.wrappers import Response as AnyResponse

from examples._start import store_or_exit
from examples.login import _pages, _people
from shmsession import SessionMode
from shmsession.auth import Auth, Rights, SyncAuthSession
from shmsession.errors import BackendError
from shmsession.wsgi import SessionMiddleware

Me = SyncAuthSession[_people.Person]

FRESH = timedelta(minutes=10)

store = store_or_exit(
    mode=SessionMode.PERSISTENT, browser_session=True, max_sessions_per_user=10, too_many_sessions="end_oldest"
)
auth = Auth(store, _people.load)
render = partial(_pages.page, framework="Flask", has_live_page=False)

app = Flask(__name__, static_folder=str(_pages.STATIC))
app.config["PROPAGATE_EXCEPTIONS"] = True  # so that a full store reaches the middleware, which answers 503
app.wsgi_app = SessionMiddleware(app.wsgi_app, store=store)  # type: ignore[method-assign]


# --- answers ---


def show(template: str, status: int = 200, **values: object) -> Response:
    return Response(render(template, auth.sync.load(request), **values), status, _pages.NOT_KEPT)


def go(to: str) -> AnyResponse:
    return redirect(to, 303)


@app.errorhandler(HTTPException)
def failed(error: HTTPException) -> AnyResponse:
    """Not logged in, not allowed, no such page."""
    if error.code == 401:
        return go("/login?" + urlencode({"next": request.path}))
    status = error.code or 500
    return show("error.html", status, reason=_pages.reason(status))


@app.errorhandler(BackendError)
def unavailable(error: BackendError) -> Response:
    """The database is down, and only it knows the rest of a list."""
    return show("error.html", 503, reason=_pages.reason(503))


@app.after_request
def add_headers(response: Response) -> Response:
    response.headers.update(_pages.HEADERS)
    return response


# --- logging in and out ---


@app.get("/")
def index() -> Response:
    return show("index.html")


@app.get("/sign-up")
def sign_up_form() -> Response:
    return show("sign_up.html")


@app.post("/sign-up")
@auth.requires(login=False, csrf=True)
def sign_up() -> AnyResponse:
    me, name, password = auth.sync.load(request), request.form.get("name", ""), request.form.get("password", "")
    person = _people.sign_up(name, password)
    if isinstance(person, str):
        return show("sign_up.html", 422, name=name, wrong=person)
    me.login(person.id)
    return go("/")


@app.get("/login")
def login_form() -> Response:
    return show("login.html", next=_pages.place(request.args.get("next", "")))


@app.post("/login")
@auth.requires(login=False, csrf=True)
def login() -> AnyResponse:
    me, sent = auth.sync.load(request), request.form
    name, password, to = (sent.get(field, "") for field in ("name", "password", "next"))
    person = _people.check(name, password)
    if person is None:
        me.login_failed(_people.spelled(name))
    elif enter(me, person, remember="remember" in sent):
        return go(_pages.place(to))
    return show("login.html", 401, name=name, next=_pages.place(to), wrong=_pages.WRONG)


def enter(me: Me, person: _people.Person, *, remember: bool) -> bool:
    """Log somebody in whose password was right, unless it was changed while it was checked.

    A change after this look ends the login with all others; one before it would not have known of it.
    """
    entered = me.login(person.id, remember=remember)
    if entered and _people.load(person.id) != person:
        me.logout()
        return False
    return entered


@app.post("/logout")
@auth.requires(csrf=True)
def logout() -> AnyResponse:
    auth.sync.load(request).logout()
    return go("/")


# --- the password ---


@app.get("/password")
@auth.requires()
def password_form() -> AnyResponse:
    me = auth.sync.load(request)
    return show("password.html") if me.fresh(FRESH) else ask_again(me)


@app.post("/password")
@auth.requires(csrf=True)
def password() -> AnyResponse:
    """Changed only by who has just given the old one; all other sessions end, for one may be a thief's."""
    me, new = auth.sync.load(request), request.form.get("password", "")
    if not me.fresh(FRESH):
        return ask_again(me)
    wrong = _people.wrong_with(new)
    if wrong:
        return show("password.html", 422, wrong=wrong)
    _people.set_password(me.user_id, new)
    auth.cache_clear_user(me.user_id)
    me.session.renew()
    store.sync.revoke_user(me.user_id, keep=me.session)
    me.session.flash("Your password is changed, and you are logged out everywhere else.")
    return go("/sessions")


def ask_again(me: Me) -> AnyResponse:
    me.session.flash("You logged in a while ago: enter your password once more.")
    return go("/login?next=/password")


# --- where one is logged in ---


@app.get("/sessions")
@auth.requires()
def sessions() -> Response:
    return show("sessions.html", sessions=store.sync.sessions(auth.sync.load(request).user_id))


@app.post("/sessions/end")
@auth.requires(csrf=True)
def end_session() -> AnyResponse:
    """End one of one's own: anybody can send any handle."""
    me, handle = auth.sync.load(request), request.form.get("handle", "")
    if handle in {session.handle for session in store.sync.sessions(me.user_id)}:
        store.sync.revoke(handle)
    return go("/sessions")


@app.post("/sessions/end-others")
@auth.requires(csrf=True)
def end_others() -> AnyResponse:
    me = auth.sync.load(request)
    store.sync.revoke_user(me.user_id, keep=me.session)
    return go("/sessions")


# --- what the session holds, and a page for some ---


@app.post("/note")
@auth.requires(csrf=True)
def note() -> AnyResponse:
    me = auth.sync.load(request)
    me.session["note"] = request.form.get("note", "")[:1000]
    return go("/")


@app.get("/people")
@auth.requires(Rights.permission("people"))
def people() -> Response:
    return show("people.html", people=_people.everybody())


@app.get("/ping")
def ping() -> str:
    return "pong"
