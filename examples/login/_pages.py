"""What both applications show: the templates, and the headers that go with every answer."""

import os
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from shmsession.auth import AuthSession, SyncAuthSession

HERE = Path(__file__).parent
STATIC = HERE / "static"

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Referrer-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
}
NOT_KEPT = {"Cache-Control": "no-store"}  # else the browser's "back" shows pages of who has logged out

WRONG = "The name or the password is wrong."  # which of them, nobody is told
REASONS = {
    403: "This page is not for you. If you sent a form, its page was open for too long: load it again.",
    404: "There is no such page.",
    503: "This cannot be told at the moment. Try again in a minute.",
}
PLACES = ("/", "/live", "/sessions", "/password", "/people")

BROWSERS = {"Edg": "Edge", "OPR": "Opera", "Firefox": "Firefox", "Chrome": "Chrome", "Safari": "Safari"}
SYSTEMS = {name: name for name in ("Android", "iPhone", "iPad", "Windows")} | {"Mac OS": "Mac", "Linux": "Linux"}


def page(template: str, me: AuthSession[Any] | SyncAuthSession[Any], **values: Any) -> str:
    return _templates.get_template(template).render(me=me, pid=os.getpid(), **values)


def reason(status: int) -> str:
    return REASONS.get(status, "Your browser sent something that this site does not understand.")


def place(wanted: str) -> str:
    """Where to go after a login: only to pages of our own, whatever the address says."""
    return wanted if wanted in PLACES else "/"


def device(user_agent: str) -> str:
    """What its owner would call it."""
    browser = next((name for word, name in BROWSERS.items() if re.search(rf"\b(?:Headless)?{word}", user_agent)), "")
    system = next((name for word, name in SYSTEMS.items() if word in user_agent), "")
    return " on ".join(filter(None, (browser, system))) or user_agent[:40] or "unknown device"


def ago(moment: datetime) -> str:
    minutes = int((datetime.now(UTC) - moment).total_seconds() // 60)
    for unit, size in (("day", 24 * 60), ("hour", 60), ("minute", 1)):
        count = minutes // size
        if count > 0:
            return f"{count} {unit}{'s' if count > 1 else ''} ago"
    return "just now"


_templates = Environment(
    loader=FileSystemLoader(HERE / "templates"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
    lstrip_blocks=True,
)  # fmt: skip
_templates.filters |= {"ago": ago, "device": device}
