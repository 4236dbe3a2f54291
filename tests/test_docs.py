"""The documentation does what it says: its code runs, its tables agree with the code."""

import ast
import contextlib
import doctest
import importlib
import inspect
import logging
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from datetime import timedelta
from enum import Enum
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, Final

import flask
import pytest
import redis
from starlette.routing import Route
from starlette.testclient import TestClient
from uvicorn.main import main as uvicorn_command
from werkzeug.test import Client

import shmsession
from shmsession import (
    SessionConfig,
    SessionMode,
    SessionStore,
    asgi,
    auth,
    cli,
    codec,
    config,
    errors,
    hooks,
    testing,
    wsgi,
)
from shmsession import store as store_module
from shmsession.contrib import gunicorn as gunicorn_hooks
from shmsession.memory import counters, room
from shmsession.testing import ManualClock, login_cookie, make_store
from tests.databases import PostgresServer, RedisServer
from tests.documents import PAGES, README, ROOT, Block, all_blocks, blocks, code, marked, names, rows
from tests.servers import wait_for

pytest_plugins = ["tests.database_hosts"]

DOCS: Final = ROOT / "docs"
GunicornConfig: Final[Any] = importlib.import_module("gunicorn.config").Config  # it has no types
PACKAGE: Final = Path(shmsession.__file__).parent

# Public for the sake of the middleware and of the session; no application has a use for them.
STORE_INTERNALS: Final = {
    "behind", "changes", "clock", "commit", "commit_failed", "fetch", "hooks", "issued", "keyring", "kill", "live",
    "look_ahead", "max_size", "mode", "new_id", "note_scheme", "refill", "request_session", "resolve", "save", "swap",
    "withdrawn", "writes_through", "wrote",
}  # fmt: skip
SESSION_INTERNALS: Final = {
    "assign", "assigned", "begin_anew", "carried", "catch_up", "choice", "committed", "discard", "drops_cookie",
    "edit", "edits", "encoded_user", "end", "follow", "headers_sent", "is_emptied", "is_pending", "is_settled",
    "kept_choice", "loaded", "max_size", "moved_to", "origin", "owes_cookie", "pending", "port", "put", "raw_handle",
    "rebase", "record", "replaced", "secret", "settle", "start", "stored", "stored_auth_time", "take", "tells_choice",
    "through", "told", "unavailable", "wait_for",
}  # fmt: skip
AUTH_INTERNALS: Final = {"encoded", "find", "stand", "users", "way"}
MAPPING: Final = {"get", "items", "keys", "pop", "popitem", "setdefault", "update", "values"}


@pytest.fixture
def environment(tmp_path: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory to work in, from which modules are imported, with stores and Keys of its own."""
    for variable in [name for name in os.environ if name.startswith("SHMSESSION_")]:
        monkeypatch.delenv(variable)
    monkeypatch.setenv("SHMSESSION_DIR", str(place / "sessions"))
    monkeypatch.setenv("SHMSESSION_KEY_FILE", str(place / "key"))
    monkeypatch.setenv("SHMSESSION_MAP_SIZE", "4MiB")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    modules, before = set(sys.modules), set(store_module.stores())
    yield tmp_path
    for store in set(store_module.stores()) - before:
        store.close()
    for name in set(sys.modules) - modules:
        if str(tmp_path) in (getattr(sys.modules[name], "__file__", None) or ""):
            del sys.modules[name]


# ── the code in it runs ───────────────────────────────────────────────────────────────────────────────────────


def load(block: Block, directory: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Import a block that is a whole file, as its reader would who develops over plain http."""
    monkeypatch.setenv("SHMSESSION_SECURE", "0")
    assert block.file is not None
    (directory / block.file).write_text(block.text)
    importlib.invalidate_caches()
    return importlib.import_module(block.file.removesuffix(".py"))


def asgi_texts(app: Any, *requests: str) -> list[str]:
    with TestClient(app) as client:
        return [client.request(*request.split()).text for request in requests]


def bare_asgi_texts(app: Any, *requests: str) -> list[str]:
    """For an application without a lifespan of its own."""
    client = TestClient(app)
    return [client.request(*request.split()).text for request in requests]


def wsgi_texts(app: Any, *requests: str) -> list[str]:
    client = Client(app)
    return [client.open(path, method=method).text for method, path in map(str.split, requests)]


def visit(texts: Callable[..., list[str]]) -> Callable[[Any], None]:
    """Two visitors, of whom one comes again."""

    def drive(app: Any) -> None:
        assert texts(app, "GET /", "GET /") == ["visits: 1", "visits: 2"]
        assert texts(app, "GET /") == ["visits: 1"]

    return drive


def drive_hello(app: Any) -> None:
    one, two = asgi_texts(app, "GET /hit", "GET /hit")
    assert '"hits":1,' in one
    assert '"hits":2,' in two


def drive_login(app: Any) -> None:
    requests = ["GET /whoami", "POST /login", "GET /whoami", "POST /logout", "GET /whoami"]
    assert asgi_texts(app, *requests) == ["None", "welcome", "ada", "goodbye", "None"]


def drive_auth(app: Any) -> None:
    with TestClient(app) as client:
        assert client.get("/reports").status_code == 401
        for name, password, status in (("ada", "guess", 401), ("eve", "secret", 401), ("bob", "secret", 200)):
            token = {"X-CSRF-Token": client.get("/token").json()["csrf_token"]}
            sent = {"name": name, "password": password}
            assert client.post("/login", json=sent).status_code == 403
            assert client.post("/login", json=sent, headers=token).status_code == status
        assert (client.get("/").text, client.get("/reports").status_code) == ("hello, Bob", 403)
        token = {"X-CSRF-Token": client.get("/token").json()["csrf_token"]}
        assert client.post("/login", json={"name": "ada", "password": "secret"}, headers=token).text == "welcome, Ada"
        assert client.get("/reports").text == "all is well"
        token = {"X-CSRF-Token": client.get("/token").json()["csrf_token"]}
        assert client.post("/logout", headers=token).text == "goodbye"
        assert client.get("/").text == "hello, stranger"


def drive_auth_flask(app: Any) -> None:
    client = Client(app)
    assert client.get("/").status_code == 401
    found = re.search(r'value="([^"]+)"', client.get("/login").text)
    assert found is not None
    for password, status in (("guess", 401), ("secret", 200)):
        sent = {"csrf_token": found[1], "name": "ada", "password": password}
        assert client.post("/login", data=sent).status_code == status
    assert client.get("/").text == "hello, Ada"


def drive_auth_fastapi(app: Any) -> None:
    client = TestClient(app)
    assert client.get("/").status_code == 401
    assert [client.post(f"/login/{name}").json() for name in ("eve", "ada")] == [False, True]
    assert client.get("/").json() == "hello, Ada"


def headers_of(connection: Any) -> dict[bytes, bytes]:
    return dict(connection.extra_headers)


def drive_websocket(app: Any) -> None:
    with TestClient(app) as client:
        with client.websocket_connect("/ws") as connection:
            connection.send_text("hello")
            assert connection.receive_text() == "1"
            cookie = headers_of(connection)[b"set-cookie"].decode()
        header = {"cookie": cookie.partition(";")[0]}
        with client.websocket_connect("/ws", headers=header) as connection:
            connection.send_text("hello again")
            assert connection.receive_text() == "2"
            assert b"set-cookie" not in headers_of(connection)


def drive_live(app: Any) -> None:
    """A websocket and a stream of one visitor hear of what other requests do, and end with the logout."""
    with TestClient(app) as client, ThreadPoolExecutor() as pool:
        client.post("/cart/tea")
        with client.websocket_connect("/live") as connection:
            assert connection.receive_json() == {"cart": ["tea"]}
            stream = pool.submit(client.get, "/events")
            client.post("/cart/milk")
            assert connection.receive_json() == {"cart": ["tea", "milk"]}
            client.post("/logout")
            closed = connection.receive()
            assert (closed["type"], closed["code"], closed["reason"]) == ("websocket.close", 1008, "destroyed")
            assert stream.result().text.endswith("event: ended\ndata: destroyed\n\n")
        with client.websocket_connect("/live") as connection:
            assert connection.receive_json() == {}
            assert connection.receive()["code"] == 1008, "nothing to follow"
        client.post("/cart/tea")
        with client.websocket_connect("/live"):
            pass


def drive_readonly(app: Any) -> None:
    assert bare_asgi_texts(app, "POST /cart/tea", "GET /cart") == ['["tea"]', '["tea"]']
    with pytest.raises(errors.ReadOnlySession):
        bare_asgi_texts(app, "POST /cart/tea", "GET /steal")


def drive_api(app: Any) -> None:
    """A client with its token, from another origin; a 503 has the headers that let it be read."""

    async def full(request: Any) -> None:
        raise errors.StoreFull("full")

    app.router.routes.append(Route("/full", full))
    client = TestClient(app, headers={"Origin": "https://shop.example"})
    token = client.post("/cart/tea").headers["X-Session"]
    assert client.post("/cart/milk", headers={"X-Session": token}).json() == ["tea", "milk"]
    assert client.get("/cart").json() == []
    refused = client.get("/full")
    assert refused.status_code == 503
    assert refused.headers["Access-Control-Allow-Origin"] == "https://shop.example"


def drive_consent(app: Any) -> None:
    """The banner is shown until it is answered; nothing is kept before, nor after somebody has declined."""
    browser = TestClient(app)
    for path, banner, cart in (
        ("/cart/tea", True, "empty"), ("/accept", False, "empty"), ("/cart/tea", False, "tea"),
        ("/cart/milk", False, "tea, milk"), ("/decline", False, "empty"), ("/cart/tea", False, "empty"),
        ("/accept", False, "empty"), ("/cart/milk", False, "milk"),
    ):  # fmt: skip
        shown = browser.post(path).text
        assert ("Cookies" in shown, f"Your cart: {cart}<" in shown) == (banner, True), path


def drive_greet(app: Any) -> None:
    assert bare_asgi_texts(app, "GET /greet", "GET /greet") == ["1", "2"]
    assert bare_asgi_texts(app, "GET /greet") == ["1"]


APPLICATIONS: Final[dict[str, Callable[[Any], None]]] = {
    "hello.py": drive_hello,
    "with_api.py": drive_api,
    "with_asgi.py": visit(bare_asgi_texts),
    "with_auth.py": drive_auth,
    "with_auth_fastapi.py": drive_auth_fastapi,
    "with_auth_flask.py": drive_auth_flask,
    "with_consent.py": drive_consent,
    "with_consent_login.py": drive_login,
    "with_django.py": visit(wsgi_texts),
    "with_fastapi.py": visit(asgi_texts),
    "with_flask.py": visit(wsgi_texts),
    "with_flask_handler.py": visit(wsgi_texts),
    "with_greet.py": drive_greet,
    "with_live.py": drive_live,
    "with_login.py": drive_login,
    "with_readonly.py": drive_readonly,
    "with_starlette.py": visit(asgi_texts),
    "with_websocket.py": drive_websocket,
    "with_wsgi.py": visit(wsgi_texts),
}
TESTED_BY_THEIR_READERS: Final = (DOCS / "testing.md", DOCS / "backends.md")


def file_blocks() -> list[Block]:
    return [block for block in all_blocks("python") if block.file and block.page not in TESTED_BY_THEIR_READERS]


def is_configuration(block: Block) -> bool:
    return block.file == "gunicorn.conf.py"


@pytest.mark.parametrize("block", [block for block in file_blocks() if not is_configuration(block)], ids=str)
def test_every_application_in_the_documentation_keeps_a_session(
    block: Block, environment: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert block.file is not None
    drive = APPLICATIONS.get(block.file)
    assert drive is not None, f"{block}: say in APPLICATIONS how to drive it"
    drive(load(block, environment, monkeypatch).app)


@pytest.mark.parametrize("block", [block for block in file_blocks() if is_configuration(block)], ids=str)
def test_every_gunicorn_configuration_in_the_documentation_has_all_hooks(block: Block, environment: Path) -> None:
    settings: dict[str, Any] = {}
    exec(compile(block.text, str(block), "exec"), settings)
    assert set(gunicorn_hooks.__all__) <= set(settings)
    gunicorn = GunicornConfig()
    for name, value in settings.items():
        if name in gunicorn.settings:
            gunicorn.set(name, value)
    logged: list[tuple[object, ...]] = []
    worker = SimpleNamespace(pid=1, log=SimpleNamespace(info=lambda *args: logged.append(args)))
    gunicorn.post_fork(SimpleNamespace(), worker)
    assert logged == ([("worker %s is here", 1)] if "announce" in settings else [])


def test_a_full_store_is_a_503_in_both_ways_that_flask_is_shown(
    environment: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for block in file_blocks():
        if block.file in ("with_flask.py", "with_flask_handler.py"):
            app: flask.Flask = load(block, environment, monkeypatch).app

            @app.get("/full")
            def full() -> str:
                raise errors.StoreFull("full")

            answer = Client(app).get("/full")
            assert (answer.status_code, answer.headers["Retry-After"]) == (503, "5")
            assert answer.text.strip() == "Sessions are unavailable. Try again shortly."


@pytest.mark.parametrize("page", TESTED_BY_THEIR_READERS, ids=lambda page: page.name)
def test_the_tests_that_the_documentation_shows_pass(page: Path, environment: Path) -> None:
    shown = [block for block in blocks(page, "python") if block.file]
    for block in shown:
        assert block.file is not None
        (environment / block.file).write_text(block.text)
    pytest_options = ["-q", "-p", "no:cacheprovider", "-W", "error", "--rootdir", str(environment)]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *pytest_options, str(environment)],
        cwd=environment, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(PACKAGE.parent)},
    )  # fmt: skip
    promised = sum(len(re.findall(r"^def test_", block.text, re.MULTILINE)) for block in shown)
    for contract in re.findall(r"^class \w+\((\w+)\):", "".join(block.text for block in shown), re.MULTILINE):
        promised += sum(name.startswith("test_") for name in dir(getattr(testing, contract)))
    assert promised >= 5
    assert f"{promised} passed" in done.stdout, done.stdout + done.stderr


def snippets(page: Path) -> list[Block]:
    return [block for block in blocks(page, "python", "pycon") if not block.file]


@pytest.mark.parametrize("page", [page for page in PAGES if snippets(page)], ids=lambda page: page.name)
def test_every_snippet_of_a_page_runs_and_prints_what_it_says(page: Path, environment: Path) -> None:
    """From the top to the bottom of a page in one namespace. Each page has a store and a new session of its own, and it
    can import the whole files that it shows."""
    clock, app = ManualClock(), flask.Flask("documented")
    store = make_store(environment / "documented", clock)
    session = store.session()
    request = SimpleNamespace(scope={"session": session})
    known: dict[str, Any] = {
        "app": app, "clock": clock, "directory": environment / "others", "login_cookie": login_cookie,
        "make_store": make_store, "request": request, "session": session, "store": store,
        "Session": shmsession.Session, "SessionConfig": SessionConfig, "__name__": "documented",
    }  # fmt: skip
    module = sys.modules["documented"] = ModuleType("documented")
    for whole in blocks(page, "python"):
        if whole.file:
            (environment / whole.file).write_text(whole.text)
    importlib.invalidate_caches()
    try:
        module.__dict__.update(known)
        for block in snippets(page):
            run_snippet(block, module.__dict__)
        if page == README:
            assert isinstance(app.wsgi_app, wsgi.SessionMiddleware)
    finally:
        del sys.modules["documented"]


def run_snippet(block: Block, namespace: dict[str, Any]) -> None:
    if block.language == "python":
        exec(compile(block.text, str(block), "exec"), namespace)
        return
    runner = doctest.DocTestRunner(verbose=False, optionflags=doctest.REPORT_NDIFF)
    example = doctest.DocTestParser().get_doctest(block.text, {}, str(block), str(block.page), block.line)
    example.globs = namespace
    said: list[str] = []
    runner.run(example, out=said.append, clear_globs=False)
    assert example.examples, f"{block} holds no example"
    assert not runner.summarize(verbose=False).failed, "".join(said)


def test_no_code_block_escapes_for_lack_of_a_language() -> None:
    """Every fence names a language that some test here runs, or one that shows a file or output."""
    run_here = {"python", "pycon", "bash", "console"}
    only_shown = {"text", "ini", "dockerfile", "apache"}
    for page in PAGES:
        fences = re.findall(r"^ *```(.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
        opened = [fence for fence in fences if fence and not fence.startswith("{")]
        assert set(opened) <= run_here | only_shown, page.name
        assert len(opened) == len(blocks(page, *run_here, *only_shown)), page.name


# ── what it says to those who come from axum_session ──────────────────────────────────────────────────────────

AXUM_SESSION: Final = {
    "axum configuration": """
        SessionConfig::new default with_mode with_id_generator IdGenerator with_lifetime with_max_lifetime
        with_memory_lifetime with_max_age with_session_name with_store_name with_cookie_domain with_cookie_path
        with_cookie_same_site SameSite with_http_only with_secure with_prefix_with_host with_key Key Key::generate
        with_database_key with_ip_and_user_agent with_hashed_ip with_hashed_user_agent with_hashed_xforward
        with_hashed_forward with_hashed_real_ip with_table_name with_always_save with_db_update_interval
        with_purge_update with_purge_database_update with_thread_sleep_duration with_bloom_filter
        with_filter_expected_elements with_filter_false_positive_probability with_clear_check_on_load get_session_name
        get_store_name SessionMode::Persistent SessionMode::OptIn SessionMode::Manual is_opt_in is_manual""",
    "axum session": """
        Session get set remove get_remove clear renew update destroy set_longterm set_store create_data data_exists
        count get_session_id get_store get_mut_store verify update_database_expires update_memory_expires
        force_database_update memory_remove_session database_remove_session ReadOnlySession""",
    "axum store": """
        SessionStore::new SessionNullPool SessionAnyPool is_persistent cleanup count clear clear_store client config
        SessionLayer SessionLayer::new SessionError DatabaseError rest_mode key-store advanced
        SecurityMode::PerSession""",
    "axum pool": """
        DatabasePool initiate count store load exists delete_one_by_id delete_by_expiry delete_all get_ids
        auto_handles_expiry""",
    "axum auth configuration": """
        AuthConfig::new default set_cache with_max_age with_anonymous_user_id with_session_id AuthSessionLayer
        AuthSessionLayer::new with_config Authentication load_user HasPermission has AuthCache AuthSessionService""",
    "axum auth session": """
        AuthSession id current_user session is_authenticated is_active is_anonymous login_user logout_user
        remember_user cache_clear_user cache_clear_all is_logged_in AuthStatus::LoggedIn AuthStatus::StaleUser
        AuthStatus::DifferentID AuthStatus::LoggedOut reload_user update_user_expiration sync_user_id""",
    "axum auth rights": """
        Rights::all Rights::any Rights::none Rights::permission Rights::None Auth::build requires validate
        evaluate""",
}
"""What axum_session 0.20 and axum_session_auth 0.20 have for their users."""


@pytest.mark.parametrize("part", AXUM_SESSION)
def test_every_item_of_axum_session_has_its_counterpart_and_an_example_that_runs(part: str) -> None:
    """The example names it in a comment; that it runs, another test shows."""
    page, items = DOCS / "coming-from-axum-session.md", set(AXUM_SESSION[part].split())
    table = rows(marked(page, part))
    assert {item for row in table for item in code(row[0])} == items
    assert all(row[1] for row in table)
    section = page.read_text(encoding="utf-8").partition(f"<!-- end of {part} -->")[2].partition("\n## ")[0]
    fences = re.findall(r"^```(?:python|pycon)\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    comments = " ".join(re.findall(r"# (.*)$", "".join(fences), re.MULTILINE))
    shown = {word.strip(",;:()") for word in re.sub(r"[(]None[)]", "", comments).split()}
    assert items <= shown, items - shown


# ── what it says of erasing ───────────────────────────────────────────────────────────────────────────────────

WORDS: Final = "the visitor's own words"


def agree_and_withdraw(url: str, place: Path, lies: Callable[[], bool]) -> None:
    """A session comes to the database, whose files `lies` looks through, and is erased there."""
    config = SessionConfig(directory=place, name="asked", map_size=4 << 20, keys=(shmsession.Key.generate(),))
    with SessionStore(url, config=replace(config, mode=SessionMode.OPT_IN)) as store:
        visit = store.session()
        visit["words"] = WORDS
        visit.save()
        assert store.sync.flush()
        assert lies()
        store.session(visit.id).set_store(False)
        assert store.sync.flush()


def lies_in(directory: Path) -> bool:
    for file in directory.rglob("*"):
        with contextlib.suppress(FileNotFoundError, IsADirectoryError):  # a server replaces its files
            if WORDS.encode() in file.read_bytes():
                return True
    return False


def test_what_was_erased_lies_in_the_log_of_redis_until_that_is_rewritten(
    durable_redis: RedisServer, place: Path
) -> None:
    """No command shows it meanwhile."""
    agree_and_withdraw(durable_redis.url, place, lambda: lies_in(durable_redis.data))
    with redis.Redis.from_url(durable_redis.url) as client:
        held = [client.get(key) for key in client.scan_iter() if client.type(key) == b"string"]
        assert held
        assert not any(WORDS.encode() in value for value in held)
        assert lies_in(durable_redis.data)
        client.bgrewriteaof()
        wait_for(lambda: not lies_in(durable_redis.data), "the log is rewritten")


def test_what_was_erased_lies_in_the_table_of_postgres_until_that_is_written_anew(
    postgres: PostgresServer, postgres_database: str, place: Path
) -> None:
    """No query shows it meanwhile. VACUUM gives its room away, VACUUM FULL leaves it behind."""

    def lies() -> bool:
        postgres.run("CHECKPOINT")
        return lies_in(postgres.data / "base")

    agree_and_withdraw(postgres.url(postgres_database), place, lies)
    found = "SELECT count(*), sum(position('own words'::bytea IN body)) FROM shmsession WHERE body IS NOT NULL"
    rows, traces = postgres.run(found, postgres_database)[0]
    assert (rows > 0, traces) == (True, 0)
    assert lies()
    postgres.run("VACUUM FULL shmsession", postgres_database)
    assert not lies()


# ── the commands in it exist ──────────────────────────────────────────────────────────────────────────────────


def commands() -> list[tuple[str, list[str]]]:
    """The page and the words of every command in the documentation, without the variables before it."""
    found = []
    for block in all_blocks("bash"):
        for line in block.text.splitlines():
            words = shlex.split(line, comments=True)
            while words and re.match(r"[A-Z_]+=", words[0]):
                words.pop(0)
            if words:
                found.append((str(block), words))
    return found


def uses_of(program: str) -> list[list[str]]:
    return [words[1:] for _, words in commands() if Path(words[0]).name == program]


def test_every_flag_of_gunicorn_in_the_documentation_exists() -> None:
    assert len(uses_of("gunicorn")) > 5
    for arguments in uses_of("gunicorn"):
        parsed = GunicornConfig().parser().parse_args(arguments)
        assert len(parsed.args) == 1
        GunicornConfig().set("worker_class", parsed.worker_class)
        assert parsed.worker_class in ("asgi", "sync", "gthread", "uvicorn_worker.UvicornWorker")


def test_every_flag_of_uvicorn_in_the_documentation_exists() -> None:
    assert len(uses_of("uvicorn")) > 1
    for arguments in uses_of("uvicorn"):
        assert uvicorn_command.make_context("uvicorn", list(arguments)).params["app"]


def test_every_command_of_shmsession_in_the_documentation_exists_and_every_one_is_documented() -> None:
    table = [code(row[0])[0] for row in rows(marked(DOCS / "operations.md", "commands"))]
    units = re.findall(r"/shmsession (.*)$", "".join(block.text for block in all_blocks("ini")), re.MULTILINE)
    shown = [*uses_of("shmsession"), *(unit.split() for unit in units)]
    assert len(units) == 1
    assert set(table) == set(cli._COMMANDS)
    assert {"flusher", "initdb"} <= {command for command, _ in shown} <= set(table)
    for command in table:
        with pytest.raises(SystemExit) as ended:
            cli.main([command, "--help"])
        assert ended.value.code == 0


def test_every_command_of_dev_in_the_documentation_exists() -> None:
    usage = subprocess.run([sys.executable, str(ROOT / "dev")], capture_output=True, text=True, check=True).stdout
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    used = set(re.findall(r"\./dev (\w+)", text))
    assert {"run", "test", "bench"} <= used
    assert used <= set(re.findall(r"^  (\w+)", usage, re.MULTILINE))


def test_every_extra_and_group_in_the_documentation_exists() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    text = "\n".join(" ".join(words) for _, words in commands())
    extras = {extra for found in re.findall(r"\.\[([\w,]+)\]", text) for extra in found.split(",")}
    assert {"gunicorn", "postgres", "redis"} <= extras <= set(settings["project"]["optional-dependencies"])
    assert set(re.findall(r"--group (\w+)", text)) <= set(settings["dependency-groups"])


def test_every_command_in_the_documentation_is_one_that_is_checked_here() -> None:
    """A new program needs a check of its own, or a place in this list."""
    unchecked = {"docker", "export", "pip", "uv", "python3"}
    checked = {"gunicorn", "uvicorn", "dev", "python", "shmsession"}
    for where, words in commands():
        assert Path(words[0]).name in checked | unchecked, where


def test_the_command_that_prints_a_key_prints_one() -> None:
    (arguments,) = [words for words in uses_of("python") if words[0] == "-c"]
    done = subprocess.run([sys.executable, *arguments], cwd=PACKAGE.parent, capture_output=True, text=True, check=True)
    assert len(shmsession.Key.parse(done.stdout).id) == 4


def test_every_file_that_the_documentation_links_to_exists() -> None:
    """Sphinx checks the links between pages; this, those of README.md."""
    links = re.findall(r"\]\((?!https?:)([^)#]+)", README.read_text(encoding="utf-8"))
    assert len(links) > 3
    for link in links:
        assert (ROOT / link).exists(), link


# ── the tables in it agree with the code ──────────────────────────────────────────────────────────────────────


def shown(value: object) -> str:
    """A default as the table of settings shows it."""
    if isinstance(value, Enum):
        return str(value.value)
    if isinstance(value, timedelta):
        units = {
            "d": timedelta(days=1),
            "h": timedelta(hours=1),
            "s": timedelta(seconds=1),
            "ms": timedelta.resolution * 1000,
        }
        unit, length = next((u, n) for u, n in units.items() if value % n == timedelta(0) and value >= n)
        return f"{value // length} {unit}"
    if type(value) is int and value >= 1024:
        return f"{value // 1024} KiB"
    return str(value)


def test_the_table_of_settings_has_every_field_and_variable_with_its_default(
    environment: Path, monkeypatch: Any
) -> None:
    for variable in ("DIR", "KEY_FILE", "MAP_SIZE"):
        monkeypatch.delenv(f"SHMSESSION_{variable}")
    defaults = SessionConfig()
    expected = [
        (item.name, item.metadata.get("variable", ""), shown(getattr(defaults, item.name)))
        for item in fields(SessionConfig)
    ]
    expected += [("", "SHMSESSION_BACKEND", ""), ("", "SHMSESSION_STORE", "")]
    table = [tuple("".join(code(cell)) for cell in row[:3]) for row in rows(marked(README, "settings"))]
    assert sorted(table) == sorted(expected)


def test_every_variable_that_the_code_names_is_in_the_table_of_settings() -> None:
    table = {name for row in rows(marked(README, "settings")) for name in code(row[1])}
    source = "".join(path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py"))
    named = set(re.findall(r"SHMSESSION_[A-Z_]+[A-Z]", source))
    named |= {"SHMSESSION_" + name for name in re.findall(r"PREFIX(?: \+ \"|\})([A-Z_]+)", source)}
    assert {"SHMSESSION_BACKEND", "SHMSESSION_STORE", "SHMSESSION_LIFESPAN"} <= named
    assert named <= table


def test_no_documented_variable_is_unknown_to_the_code(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for page in PAGES:
        for variable in re.findall(r"SHMSESSION_[A-Z_]+[A-Z]", page.read_text(encoding="utf-8")):
            monkeypatch.setenv(variable, "")
    with caplog.at_level(logging.WARNING, "shmsession"):
        config.warn_of_unknown_variables()
        assert not caplog.messages
        monkeypatch.setenv("SHMSESSION_LIFESPAM", "")
        config.warn_of_unknown_variables()
        assert caplog.messages


def of_applications() -> set[str]:
    """The public names of a session."""
    session = make_throwaway_store().session()
    assert (session.accessed, session.readonly) == (False, False)
    assert not session.exists  # loads it
    everything = {name for name in set(vars(session)) | set(dir(session)) if not name.startswith("_")}
    assert everything >= SESSION_INTERNALS
    return everything - MAPPING - SESSION_INTERNALS


def test_the_reference_of_the_session_has_every_name_that_applications_use() -> None:
    assert names(marked(DOCS / "session.md", "methods")) == of_applications()


def test_the_reference_of_the_session_gives_the_signatures_of_its_methods() -> None:
    for row in rows(marked(DOCS / "session.md", "methods")):
        for item in code(row[0]):
            name, _, arguments = item.removeprefix("await ").rstrip(")").rpartition(".")[2].partition("(")
            if "(" not in item:
                assert not callable(getattr(shmsession.Session, name, None)), item
                continue
            member = inspect.getattr_static(shmsession.Session, name)
            written = [re.split("=", argument.strip())[0] for argument in arguments.split(",") if argument]
            function = member.__func__ if isinstance(member, classmethod) else member
            assert inspect.iscoroutinefunction(function) == item.startswith("await "), item
            assert written == list(inspect.signature(function).parameters)[1:], item


def test_the_reference_of_the_store_has_every_public_name() -> None:
    attributes = set(vars(make_throwaway_store()))
    everything = {name for name in attributes | set(dir(SessionStore)) if not name.startswith("_")}
    assert names(marked(DOCS / "store.md", "store")) == everything - STORE_INTERNALS


def test_the_reference_of_the_store_gives_the_signatures_of_what_may_wait_for_the_backend() -> None:
    """All of it is to be awaited; `sync` has the same by the same names, for one session."""
    documented = {}
    for row in rows(marked(DOCS / "store.md", "store")):
        for item in code(row[0]):
            name, _, arguments = item.removeprefix("await ").rstrip(")").partition("(")
            if item.startswith("await "):
                documented[name] = [argument.split("=")[0].strip() for argument in arguments.split(",") if argument]
    awaited = {
        name: list(inspect.signature(function).parameters)[1:]
        for name, function in inspect.getmembers(SessionStore, inspect.iscoroutinefunction)
        if name not in STORE_INTERNALS
    }
    assert documented == awaited
    (row,) = [row for row in rows(marked(DOCS / "store.md", "store")) if code(row[0]) == ["sync"]]
    mentioned = {re.sub(r"\(.*", "", item).removeprefix("store.sync.") for item in code(row[1])}
    blocking = {name for name, _ in inspect.getmembers(store_module.Sync, inspect.isfunction) if name[0] != "_"}
    assert mentioned == set(awaited) == blocking - {"wait"}


def test_the_reference_of_logins_has_every_name_that_applications_use() -> None:
    everything = {name for name in dir(auth.AuthSession) if not name.startswith("_")} | {"session", "users"}
    assert everything >= AUTH_INTERNALS
    documented = marked(DOCS / "auth.md", "auth session")
    assert names(documented) == everything - AUTH_INTERNALS
    assert {name for name in dir(auth.SyncAuthSession) if not name.startswith("_")} <= everything
    for row in rows(documented):
        name, _, arguments = code(row[0])[0].removeprefix("await ").rstrip(")").partition("(")
        member = inspect.getattr_static(auth.AuthSession, name, None)
        assert inspect.iscoroutinefunction(member) == code(row[0])[0].startswith("await "), name
        if callable(member):
            written = [argument.split("=")[0].strip() for argument in arguments.split(",") if argument]
            assert written == list(inspect.signature(member).parameters)[1:], name


def test_the_reference_of_auth_has_every_public_name_and_setting() -> None:
    text = (DOCS / "auth.md").read_text()
    assert [name for name in auth.__all__ if f"`{name}" not in text] == []
    of_applications = {name for name in dir(auth.Auth) if not name.startswith("_")} | {"store", "config", "sync"}
    assert names(marked(DOCS / "auth.md", "auth")) - {"Auth"} == of_applications
    defaults = auth.AuthConfig()
    expected = [(item.name, shown(getattr(defaults, item.name))) for item in fields(auth.AuthConfig)]
    table = rows(marked(DOCS / "auth.md", "auth settings"))
    assert [(code(row[0])[0], code(row[1])[0]) for row in table] == expected


def make_throwaway_store() -> SessionStore:
    return SessionStore(config=SessionConfig(name="throwaway", keys=(shmsession.Key.generate(),)))


def test_the_reference_of_the_middleware_has_its_arguments() -> None:
    text = (DOCS / "store.md").read_text(encoding="utf-8")
    for middleware in (asgi.SessionMiddleware, wsgi.SessionMiddleware):
        parameters = list(inspect.signature(middleware).parameters)
        assert parameters == ["app", "store", "skip", "readonly"]
    assert "SessionMiddleware(app, store=None, *, skip=(), readonly=())" in text


def test_every_name_of_the_package_is_documented() -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    for name in shmsession.__all__:
        assert f"{name}" in re.findall(r"\w+", text), name


def test_the_table_of_events_has_every_event_with_its_fields() -> None:
    expected = {event.__name__: [field.name for field in fields(event)] for event in hooks.Event.__args__}
    assert {code(row[0])[0]: code(row[1]) for row in rows(marked(DOCS / "operations.md", "events"))} == expected


def test_the_reasons_for_which_cookies_are_refused_are_documented() -> None:
    reasons = set()
    for module in ("cookies.py", "tokens.py", "transport.py"):
        for node in ast.walk(ast.parse((PACKAGE / module).read_text(encoding="utf-8"))):
            if isinstance(node, ast.Return):
                reasons |= {text for text in ends(node.value) if text}
    (row,) = [row for row in rows(marked(DOCS / "operations.md", "events")) if code(row[0]) == ["CookieRefused"]]
    assert set(code(row[2])) == reasons


def ends(value: ast.expr | None) -> list[str]:
    """The texts that an expression may come to, as they stand there."""
    if isinstance(value, ast.IfExp):
        return ends(value.body) + ends(value.orelse)
    return [value.value] if isinstance(value, ast.Constant) and isinstance(value.value, str) else []


def test_the_table_of_numbers_has_every_field_of_stats() -> None:
    documented = [code(row[0])[0] for row in rows(marked(DOCS / "operations.md", "stats"))]
    assert documented == list(store_module.Stats._fields)


def test_the_table_of_counters_has_every_counter() -> None:
    documented = [code(row[0])[0] for row in rows(marked(DOCS / "operations.md", "counters"))]
    assert documented == list(counters.NAMES)


def test_every_number_that_operators_are_told_to_watch_exists() -> None:
    text = (DOCS / "operations.md").read_text(encoding="utf-8")
    section = text.partition("### What to watch\n")[2].partition("\n(")[0]
    watched = {name for row in rows(section) for item in code(row[0]) for name in re.findall(r"\w+", item)}
    assert len(watched) > 5
    assert watched <= set(store_module.Stats._fields) | set(counters.NAMES)


def test_the_marks_of_a_full_store_are_those_of_the_code() -> None:
    cells = [row[1] for row in rows(marked(DOCS / "operations.md", "room"))]
    numbers = [int(found[0]) for cell in cells if (found := re.findall(r"\d+", cell))]
    assert numbers == [room.NEW_ANONYMOUS, room.NEW_LOGGED_IN, room.UPDATE]
    assert room.RESERVED == 5
    assert "Five points below such a mark" in (DOCS / "operations.md").read_text(encoding="utf-8")


def test_the_table_of_errors_has_every_error_and_its_tree_is_that_of_the_code() -> None:
    public_errors = {
        name for name, value in vars(errors).items() if isinstance(value, type) and value.__module__ == errors.__name__
    }
    assert names(marked(DOCS / "errors.md", "errors")) == public_errors
    (tree,) = blocks(DOCS / "errors.md", "text")
    drawn = [parse_branch(line) for line in tree.text.splitlines()]
    assert {name for _, name, _ in drawn} == public_errors
    ancestors: dict[int, type] = {}
    for depth, name, builtin in drawn:
        error = getattr(errors, name)
        ancestors[depth] = error
        assert [base.__name__ for base in error.__bases__] == [
            ancestors[depth - 1].__name__ if depth else "Exception", *([builtin] if builtin else [])
        ]  # fmt: skip


def parse_branch(line: str) -> tuple[int, str, str]:
    """(depth, error, builtin base or "") in a line of the tree."""
    found = re.fullmatch(r"([│├└─ ]*)(\w+)(?: \((\w+)\))?(?: +.*)?", line)
    assert found is not None, line
    return len(found[1]) // 4, found[2], found[3] or ""


def test_the_table_of_gunicorn_hooks_has_every_hook() -> None:
    assert names(marked(DOCS / "deployment.md", "hooks")) == set(gunicorn_hooks.__all__)


def test_the_table_of_types_has_every_stored_type() -> None:
    documented = {item for row in rows(marked(DOCS / "values.md", "types")) for item in code(row[0])}
    stored = {kind.__name__ for kind in codec.IMMUTABLE | codec._CONTAINERS}
    assert documented == {name if name != "NoneType" else "None" for name in stored}
    levels = re.search(r"up to (\d+) levels and ([\d,]+) items", marked(DOCS / "values.md", "types"))
    assert levels is not None
    assert (int(levels[1]), int(levels[2].replace(",", ""))) == (codec.MAX_DEPTH, codec.MAX_ITEMS)


def test_the_table_of_test_helpers_has_every_one() -> None:
    own = {
        name for name, value in vars(testing).items()
        if getattr(value, "__module__", None) == testing.__name__ and not name.startswith("_")
    }  # fmt: skip
    assert names(marked(DOCS / "testing.md", "testing")) == own | {"shm_store"}
