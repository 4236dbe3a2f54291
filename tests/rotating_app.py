"""The smallest application with sessions, for servers that are reloaded hundreds of times."""

import json
import os

from shmsession import Session, SessionStore
from shmsession.wsgi import Environ, SessionMiddleware, StartResponse

store = SessionStore()


def application(environ: Environ, start_response: StartResponse) -> list[bytes]:
    """/login/ada, /hit, which counts, /whoami, which only looks, /ping, which does not, and /late."""
    session, (_, verb, *words) = Session.of(environ), environ["PATH_INFO"].split("/")
    if verb == "late":
        told = late(session, environ["wsgi.input"].read())
    else:
        if verb == "login":
            session.renew(user_id=words[0])
            session.update(user=words[0], hits=0, late=0)
        elif verb == "hit" and "user" in session:
            session["hits"] += 1
        told = {} if verb == "ping" else session.to_dict()
    body = json.dumps(told).encode()
    start_response("200 OK", [("Content-Length", str(len(body))), ("X-Worker-Pid", str(os.getpid()))])
    return [body]


def late(session: Session, cookies: bytes) -> dict[str, object]:
    """Count, and tell what the session is by the cookies that came as the request's body, long after its own."""
    session["late"] += 1
    return store.request_session(lambda: cookies).to_dict()


app = SessionMiddleware(application, store)
