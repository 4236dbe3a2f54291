"""The page both examples show at ``/``: plain data in, HTML out, every value escaped."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from html import escape
from typing import Any

COLOURS = {"teal": "#0d9488", "violet": "#7c3aed", "amber": "#b45309"}

VERBS = ("create", "renew", "clear", "accept", "decline", "remember")

STYLE = """
:root {
  color-scheme: light dark;
  --ground: #f6f5f2; --card: #fff; --line: #e4e1da; --ink: #1f2328; --soft: #666a71; --press: #f0eeea;
  --accent-ink: var(--accent);
}
@media (prefers-color-scheme: dark) {
  :root {
    --ground: #14161a; --card: #1c1f24; --line: #30353d; --ink: #e8e9eb; --soft: #9aa0a9; --press: #262a31;
    --accent-ink: color-mix(in oklab, var(--accent) 55%, white);
  }
}
* { box-sizing: border-box; margin: 0; }
body {
  background: var(--ground); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; max-width: 68rem;
  margin: auto; padding: clamp(1.25rem, 4vw, 3rem) clamp(1rem, 4vw, 2rem);
}
header { display: flex; flex-wrap: wrap; gap: 1.25rem 2rem; align-items: center; justify-content: space-between; }
h1 { font-size: clamp(1.6rem, 5vw, 2.3rem); line-height: 1.15; letter-spacing: -.02em; text-wrap: balance; }
h1 + p { max-width: 30rem; margin-top: .5rem; }
h2 { font-size: .85rem; font-weight: 600; color: var(--soft); margin-bottom: .8rem; }
p { color: var(--soft); text-wrap: pretty; }
small { color: var(--soft); font-size: .84rem; line-height: 1.45; margin-top: auto; padding-top: .9rem; }
code { font-family: ui-monospace, monospace; font-size: .88em; }
.worker {
  display: flex; align-items: center; gap: 1rem; padding: .8rem 1rem; border-radius: .9rem; line-height: 1.3;
  background: var(--card); border: 1px solid var(--line);
}
.worker i { width: 2.75rem; height: 2.75rem; border-radius: .7rem; background: hsl(var(--hue) 62% 52%); }
.worker b { display: block; font-size: 1.4rem; font-variant-numeric: tabular-nums; color: var(--ink); }
.worker a { margin-left: .75rem; }
main { display: grid; grid-template-columns: repeat(6, 1fr); gap: 1rem; margin-top: clamp(1.25rem, 3vw, 2rem); }
section {
  grid-column: span 2; display: flex; flex-direction: column; min-width: 0; padding: 1.1rem 1.25rem 1.25rem;
  background: var(--card); border: 1px solid var(--line); border-radius: .9rem;
}
section.wide { grid-column: span 3; }
@media (max-width: 58rem) { section { grid-column: span 3; } section:nth-child(3) { grid-column: span 6; } }
@media (max-width: 40rem) { section:nth-child(n) { grid-column: span 6; } .worker { width: 100%; } }
@media (max-width: 40rem) { .worker a { margin-left: auto; } }
.big { font-size: 2rem; font-weight: 650; line-height: 1.2; letter-spacing: -.02em; color: var(--ink); }
.big, li, td { overflow-wrap: anywhere; }
.big.none { color: var(--soft); font-weight: 400; }
.two { display: flex; gap: 2.5rem; }
.row { display: flex; flex-wrap: wrap; gap: .4rem; }
* + .row { margin-top: .9rem; }
h2 + .row { margin-top: 0; }
.row + .row { margin-top: .4rem; }
ul { display: flex; flex-wrap: wrap; gap: .4rem; align-items: center; min-height: 2rem; padding: 0; list-style: none; }
li { padding: .1rem .65rem; border-radius: 1rem; background: var(--press); }
li b { color: var(--accent-ink); }
li.none { padding: 0; background: none; color: var(--soft); }
button, .button {
  font: inherit; font-size: .92rem; line-height: 1.3; padding: .42rem .68rem; border-radius: .55rem; cursor: pointer;
  color: var(--ink); background: var(--card); border: 1px solid var(--line); text-decoration: none;
}
button:hover, .button:hover { background: var(--press); }
button:active, .button:active { transform: translateY(1px); }
button:focus-visible, .button:focus-visible { outline: 2px solid var(--accent-ink); outline-offset: 2px; }
.main, .main:hover { background: var(--accent); border-color: transparent; color: #fff; font-weight: 600; }
.main:hover { filter: brightness(1.1); }
.dot { display: inline-block; width: .7em; height: .7em; border-radius: 50%; margin-right: .45em; }
table { width: 100%; border-collapse: collapse; }
td { padding: .4rem 0; border-top: 1px solid var(--line); vertical-align: top; }
tr:first-child td { border-top: 0; padding-top: 0; }
td:first-child { width: 32%; padding-right: 1rem; color: var(--soft); }
.said {
  margin-top: 1rem; padding: .7rem 1rem; border-radius: .7rem; color: var(--ink);
  background: color-mix(in oklab, var(--accent) 12%, var(--card)); border: 1px solid var(--accent);
}
.banner {
  position: sticky; bottom: 1rem; margin-top: 1rem; flex-flow: row wrap; gap: .8rem 2rem; align-items: center;
  border-color: var(--accent); box-shadow: 0 .6rem 2rem rgb(0 0 0 / .18);
}
.banner > div:first-child { flex: 1 1 20rem; }
.banner h2 { font-size: 1.05rem; color: var(--ink); margin-bottom: .2rem; }
.banner p { font-size: .94rem; }
.banner .row { margin: 0; gap: .6rem; }
.banner button { width: 100%; min-width: 8rem; padding: .6rem; }
@media (max-width: 40rem) { .banner { bottom: .6rem; } .banner .row { flex: 1; } .banner form { flex: 1; } }
iframe {
  flex: 1 0 auto; width: 100%; height: 5rem; margin-top: .9rem;
  border: 1px solid var(--line); border-radius: .55rem;
}
"""

EMPTY_FRAME = """<meta name="color-scheme" content="light dark"><p style="font:14px system-ui;opacity:.6">
The worker's answer appears here.</p>"""


def post(path: str, label: str, *, main: bool = False, colour: str = "") -> str:
    dot = f'<span class="dot" style="background:{COLOURS[colour]}"></span>' if colour else ""
    style = ' class="main"' if main else ""
    return f'<form method="post" action="{escape(path)}"><button{style}>{dot}{escape(label)}</button></form>'


def get(path: str, *, main: bool = False) -> str:
    return f'<a class="button{" main" if main else ""}" target="answer" href="{escape(path)}">{escape(path)}</a>'


def row(*controls: str) -> str:
    return f'<div class="row">{"".join(controls)}</div>'


def number(value: object, label: str) -> str:
    return f'<div><div class="big">{escape(str(value))}</div><p>{escape(label)}</p></div>'


def basket(cart: object) -> str:
    items = Counter(map(str, cart if isinstance(cart, list) else [cart]))
    if not items:
        return '<ul><li class="none">nothing yet</li></ul>'
    lines = (f"<li>{escape(item)}{f' <b>×{n}</b>' if n > 1 else ''}</li>" for item, n in items.items())
    return f"<ul>{''.join(lines)}</ul>"


def contents(data: Mapping[str, Any]) -> str:
    if not data:
        return "<p>Nothing. Looking at this page does not make a session; put something in the cart.</p>"
    cells = ((key, json.dumps(value, default=str, ensure_ascii=False)) for key, value in data.items())
    rows = (f"<tr><td>{escape(key)}</td><td><code>{escape(value)}</code></td></tr>" for key, value in cells)
    return f"<table>{''.join(rows)}</table>"


def card(title: str, *inside: str, kind: str = "") -> str:
    return f'<section class="{kind}"><h2>{escape(title)}</h2>{"".join(inside)}</section>'


def said(messages: Iterable[tuple[Any, str]]) -> str:
    """What the last requests left to be shown, once."""
    lines = (f'<p class="said {escape(category)}">{escape(str(message))}</p>' for message, category in messages)
    return f'<div role="status">{"".join(lines)}</div>'


BANNER = f"""<section class="banner" aria-label="Your consent">
  <div>
    <h2>May this site remember you?</h2>
    <p>If you accept, it keeps your cart, your colour and your login. If you decline, it forgets them after each answer.
    You can change your mind at the end of this page.</p>
  </div>
  {row(post("/accept", "Accept", main=True), post("/decline", "Decline", main=True))}
</section>"""


def page(
    data: Mapping[str, Any], *, pid: int, app: str, ask: bool = False, messages: Iterable[tuple[Any, str]] = ()
) -> str:
    """The whole page, for the session's ``data`` as the worker ``pid`` saw it; ``ask``: with the consent banner."""
    user = data.get("user")
    accent = COLOURS.get(str(data.get("colour")), "#2563eb")
    cards = [
        card(
            "Who is logged in",
            f'<p class="big{"" if user else " none"}">{escape(str(user)) if user else "nobody"}</p>',
            row(
                post("/login/ada", "Log in as Ada", main=not user),
                post("/login/grace", "Grace"),
                post("/logout", "Log out", main=bool(user)),
            ),
            "<small>Logging in gives the session a new id; the old one is dead in every worker at once.</small>",
        ),
        card(
            "Cart",
            basket(data.get("cart", [])),
            row(
                post("/cart/tea", "+ tea", main=True),
                post("/cart/coffee", "+ coffee"),
                post("/append/cake", "+ cake"),
            ),
            "<small>Tea and coffee by a plain list.append(); cake by apply(), which loses nothing to a race.</small>",
        ),
        card(
            "Colour of this page",
            row(*(post(f"/set/colour/{name}", name.title(), colour=name) for name in COLOURS)),
            row(post("/slow/colour/amber?seconds=3", "Amber, in 3 s", colour="amber")),
            "<small>One worker writes it, the next one shows it.</small>",
        ),
        card(
            "Ask a worker",
            f'<div class="two">{number(data.get("hits", 0), "hits")}{number(data.get("visits", 0), "visits")}</div>',
            row(get("/hit", main=True), *map(get, ("/visit", "/session", "/whoami", "/ping"))),
            f'<iframe name="answer" title="The answer" srcdoc="{escape(EMPTY_FRAME)}"></iframe>',
            "<small>Hits are counted by increment(): exact, whoever else is counting.</small>",
            kind="wide",
        ),
        card("What the session holds", contents(data), kind="wide"),
        card(
            "Dead stays dead",
            row(post("/slow-logout-race?seconds=3", "Write something in 3 s")),
            "<small>Press it, and log out in a second tab before it is done: the slow request is answered,"
            " and the session it held does not come back.</small>",
            kind="wide",
        ),
        card(
            "The session itself",
            row(*(post(f"/{verb}", verb.title()) for verb in VERBS)),
            "<small>Accept or decline that it is stored; remember it for longer.</small>",
            kind="wide",
        ),
    ]
    return f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>shmsession · worker {pid}</title>
<link rel="icon" href="data:,">
<style>:root {{ --accent: {accent}; --hue: {pid * 67 % 360}; }}{STYLE}</style>
<header>
  <div>
    <h1>One session, many workers</h1>
    <p>{escape(app)} on shmsession. Each reload may be answered by another worker; it sees the same session.</p>
  </div>
  <p class="worker"><i></i><span>answered by worker <b>{pid}</b></span><a class="button" href="/">Reload</a></p>
</header>
{said(messages)}
<main>
{"".join(cards)}
</main>
{BANNER if ask else ""}
</html>
"""
