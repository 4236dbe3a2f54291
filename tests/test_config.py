"""Settings: in code or by one variable each; what cannot work is refused with what to write instead."""

import dataclasses
import logging
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from shmsession.config import (
    CookieMode,
    OldCookie,
    SessionConfig,
    SessionMode,
    backend_url,
    default_name,
    milliseconds,
    warn_of_unknown_variables,
)
from shmsession.errors import ConfigError
from shmsession.keyring import Key
from shmsession.store import SessionStore

ONE, TWO = Key(b"1" * 32), Key(b"2" * 32)
VARIABLES = {
    field.metadata["variable"]: field.name for field in dataclasses.fields(SessionConfig) if field.metadata
}  # every setting that has a variable


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """The variables of whoever runs the tests do not reach them."""
    for variable in (*VARIABLES, "SHMSESSION_BACKEND", "SHMSESSION_STORE"):
        monkeypatch.delenv(variable, raising=False)


# ── variables ──────────────────────────────────────────────────────────────────────────────────────────────────

GOOD: list[tuple[str, str, Any]] = [
    ("MODE", "persistent", SessionMode.PERSISTENT),
    ("COOKIE_MODE", "private", CookieMode.PRIVATE),
    ("MODE", "opt_in", SessionMode.OPT_IN),
    ("MODE", "manual", SessionMode.MANUAL),
    ("COOKIE_MODE", "signed", CookieMode.SIGNED),
    ("COOKIE_MODE", "plain", CookieMode.PLAIN),
    ("TRANSPORT", "both", "both"),
    ("TRUSTED_PROXIES", "2", 2),
    ("MAX_SESSIONS_PER_USER", "5", 5),
    ("TOO_MANY_SESSIONS", "refuse", "refuse"),
    ("RECORD_DEVICE", "0", False),
    ("SECURE", "0", False),
    ("SECURE", " 1 ", True),
    ("LIFESPAN", "3600", timedelta(hours=1)),
    ("LIFESPAN", "0.5", timedelta(milliseconds=500)),
    ("MAX_LIFESPAN", "86400", timedelta(days=1)),
    ("ABSOLUTE_LIFESPAN", "43200", timedelta(hours=12)),
    ("MEMORY_LIFESPAN", "60", timedelta(minutes=1)),
    ("MAP_SIZE", "1048576", 1 << 20),
    ("MAP_SIZE", "64MiB", 64 << 20),
    ("MAP_SIZE", "64 MiB", 64 << 20),
    ("MAP_SIZE", "2048KiB", 2 << 20),
    ("MAP_SIZE", "1GiB", 1 << 30),
    ("DIR", "/run/sessions", Path("/run/sessions")),
    ("NAME", "shop", "shop"),
    ("KEY", str(ONE), (ONE,)),
    ("KEY", f"{ONE}, {TWO}", (ONE, TWO)),
    ("KEY_FILE", "/etc/app.key", Path("/etc/app.key")),
]


@pytest.mark.parametrize(("variable", "text", "value"), GOOD, ids=[f"{it[0]}-{at}" for at, it in enumerate(GOOD)])
def test_a_variable_fills_its_setting(monkeypatch: pytest.MonkeyPatch, variable: str, text: str, value: Any) -> None:
    """One SHMSESSION_ variable a setting, in the units of the documentation."""
    monkeypatch.setenv("SHMSESSION_" + variable, text)
    assert getattr(SessionConfig(), VARIABLES["SHMSESSION_" + variable]) == value


def test_every_documented_variable_exists_and_is_tested() -> None:
    """The list of the documentation, no more and no less."""
    documented = {
        "MODE", "COOKIE_MODE", "SECURE", "LIFESPAN", "MAX_LIFESPAN", "ABSOLUTE_LIFESPAN", "MEMORY_LIFESPAN",
        "MAP_SIZE", "KEY", "KEY_FILE", "DIR", "NAME", "TRANSPORT", "TRUSTED_PROXIES",
        "MAX_SESSIONS_PER_USER", "TOO_MANY_SESSIONS", "RECORD_DEVICE",
    }  # fmt: skip
    assert set(VARIABLES) == {"SHMSESSION_" + name for name in documented}
    assert {name for name, *_ in GOOD} == documented == {name for name, *_ in BAD}


BAD: list[tuple[str, str, str]] = [
    ("MODE", "", "write persistent or opt_in or manual"),
    ("MODE", "PERSISTENT", "write persistent"),
    ("COOKIE_MODE", "secret", "write private or signed or plain"),
    ("TRANSPORT", "", "write cookie or header or both"),
    ("TRANSPORT", "pigeon", "write cookie or header or both"),
    ("TRUSTED_PROXIES", "", "write a number"),
    ("TRUSTED_PROXIES", "-1", "write a number"),
    ("TRUSTED_PROXIES", "17", "write 0 to 16"),
    ("MAX_SESSIONS_PER_USER", "0", "write 1 or more, or None"),
    ("MAX_SESSIONS_PER_USER", "few", "write a number"),
    ("TOO_MANY_SESSIONS", "raise", "write end_oldest or refuse"),
    ("RECORD_DEVICE", "no", "write 0 or 1"),
    ("SECURE", "", "write 0 or 1"),
    ("SECURE", "yes", "write 0 or 1"),
    ("SECURE", "true", "write 0 or 1"),
    ("LIFESPAN", "", "write a number of seconds"),
    ("LIFESPAN", "6h", "write a number of seconds"),
    ("LIFESPAN", "-1", "write a number of seconds"),
    ("LIFESPAN", "1e3", "write a number of seconds"),
    ("LIFESPAN", "٣", "write a number of seconds"),
    ("LIFESPAN", "nan", "write a number of seconds"),
    ("LIFESPAN", "0", "write more than 0 seconds"),
    ("LIFESPAN", "999999999999", "at most 100 years"),
    ("MAX_LIFESPAN", "0", "write more than 0 seconds"),
    ("ABSOLUTE_LIFESPAN", "0", "write more than 0 seconds"),
    ("ABSOLUTE_LIFESPAN", "never", "write a number of seconds"),
    ("MEMORY_LIFESPAN", "0", "write more than 0 seconds"),
    ("MAP_SIZE", "", "write a number of bytes"),
    ("MAP_SIZE", "64MB", "64MiB"),
    ("MAP_SIZE", "-1", "64MiB"),
    ("MAP_SIZE", "1.5GiB", "64MiB"),
    ("MAP_SIZE", "4096", "at least 1MiB"),
    ("MAP_SIZE", "999999999999999GiB", "at most"),
    ("DIR", "", "unset it, or give it a value"),
    ("NAME", " ", "unset it, or give it a value"),
    ("NAME", "../other", "up to 64 letters"),
    ("NAME", "a/b", "up to 64 letters"),
    ("NAME", ".hidden", "up to 64 letters"),
    ("NAME", "x" * 65, "up to 64 letters"),
    ("KEY", "", "unset it, or give it a value"),
    ("KEY", ",", "holds no Key"),
    ("KEY", "# none", "holds no Key"),
    ("KEY", "hunter2", r"write what `print\(shmsession.Key.generate\(\)\)` prints"),
    ("KEY", f"{ONE},hunter2", "not a Key"),
    ("KEY_FILE", "", "unset it, or give it a value"),
]


@pytest.mark.parametrize(("variable", "text", "message"), BAD, ids=[f"{it[0]}-{at}" for at, it in enumerate(BAD)])
def test_a_bad_variable_is_an_error_that_names_it_and_says_what_to_write(
    monkeypatch: pytest.MonkeyPatch, variable: str, text: str, message: str
) -> None:
    """At construction. A Key's text is not repeated."""
    monkeypatch.setenv("SHMSESSION_" + variable, text)
    with pytest.raises(ConfigError, match=rf"SHMSESSION_{variable}\b.*{message}") as caught:
        SessionConfig()
    assert "hunter2" not in str(caught.value)
    assert str(ONE) not in str(caught.value)


def test_code_wins_over_a_variable_even_over_a_bad_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the code says is not read from the environment."""
    given: dict[str, Any] = {
        "mode": SessionMode.PERSISTENT, "cookie_mode": CookieMode.PRIVATE, "secure": False,
        "lifespan": timedelta(hours=1), "max_lifespan": timedelta(days=2), "absolute_lifespan": None,
        "memory_lifespan": timedelta(minutes=1), "map_size": None, "directory": None, "name": None, "keys": (ONE,),
        "key_file": None, "transport": "cookie", "trusted_proxies": 0,
        "max_sessions_per_user": None, "too_many_sessions": "end_oldest", "record_device": True,
    }  # fmt: skip
    for variable in VARIABLES:
        monkeypatch.setenv(variable, "?")
    config = SessionConfig(**given)
    assert {name: getattr(config, name) for name in given} == given


def test_variables_are_read_when_the_settings_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not when the module is imported."""
    assert SessionConfig().lifespan == timedelta(hours=6)
    monkeypatch.setenv("SHMSESSION_LIFESPAN", "60")
    assert SessionConfig().lifespan == timedelta(minutes=1)


def test_the_defaults_are_those_of_the_documentation() -> None:
    """Secure, Lax, HttpOnly, six hours, sixty days."""
    config = SessionConfig()
    assert config.effective_cookie_name == "__Host-session"
    assert (config.secure, config.same_site, config.http_only, config.path) == (True, "Lax", True, "/")
    assert (config.domain, config.partitioned) == (None, False)
    assert (config.lifespan, config.max_lifespan) == (timedelta(hours=6), timedelta(days=60))
    assert (config.absolute_lifespan, config.effective_touch_interval) == (None, timedelta(seconds=60))
    assert SessionConfig(secure=False).effective_cookie_name == "session"


def test_unknown_variables_are_logged_with_the_nearest_known_one(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A slip in a name must not pass unseen; known ones and those of others are not mentioned."""
    for variable in ("SHMSESSION_LIFSPAN", "SHMSESSION_ZZZ", "SHMSESSIONS", "SHMSESSION_NAME", "SHMSESSION_STORE"):
        monkeypatch.setenv(variable, "secret value")
    with caplog.at_level(logging.WARNING, "shmsession"):
        warn_of_unknown_variables()
    assert caplog.messages == [
        "SHMSESSION_LIFSPAN is not a setting: did you mean SHMSESSION_LIFESPAN?",
        "SHMSESSION_ZZZ is not a setting",
    ]


def test_a_store_warns_of_unknown_variables_when_it_is_made(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Once, at start."""
    monkeypatch.setenv("SHMSESSION_SECRET", "x")
    with caplog.at_level(logging.WARNING, "shmsession"):
        SessionStore(config=SessionConfig(name="x", keys=(ONE,)))
    assert any("SHMSESSION_SECRET is not a setting" in message for message in caplog.messages)


def a_store(backend: str | None = None, **settings: Any) -> SessionStore:
    return SessionStore(backend, config=SessionConfig(**{"name": "x", "keys": (ONE,), **settings}))


def test_the_backend_is_a_variable_too_and_none_means_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the code says wins; nothing is opened."""
    assert backend_url() is None
    assert not a_store().is_persistent
    monkeypatch.setenv("SHMSESSION_BACKEND", "none")
    assert not a_store().is_persistent
    for url in ("redis://127.0.0.1:1", "sqlite:////nowhere/sessions.db", "postgresql://127.0.0.1:1/app"):
        monkeypatch.setenv("SHMSESSION_BACKEND", url)
        assert backend_url() == url
        assert a_store().is_persistent
    monkeypatch.setenv("SHMSESSION_BACKEND", "?")
    assert a_store("sqlite:////nowhere/sessions.db").is_persistent
    assert not a_store("none").is_persistent


@pytest.mark.parametrize("url", ["", "?", "redis:/hunter2@localhost", "mongodb://ada:hunter2@localhost"])
def test_a_backend_that_does_not_exist_is_an_error_that_says_what_to_write(
    monkeypatch: pytest.MonkeyPatch, url: str
) -> None:
    """By the name of the variable when it stood there; a password is not repeated."""
    said = []
    for backend in (url, None):
        with pytest.raises(ConfigError, match=r"write sqlite:///file, postgresql://") as caught:
            a_store(backend)
        said.append(str(caught.value))
        monkeypatch.setenv("SHMSESSION_BACKEND", url)
    assert "SHMSESSION_BACKEND" not in said[0]
    assert "SHMSESSION_BACKEND" in said[1]
    assert "hunter2" not in "".join(said)


@pytest.mark.parametrize("url", ["redis://127.0.0.1:1", "postgresql://127.0.0.1:1/app"])
def test_a_backend_that_outlives_the_machine_needs_a_key_that_does(place: Path, url: str) -> None:
    """Otherwise nobody could open the cookies any more; one on this machine needs none."""
    with pytest.raises(ConfigError, match=r"SHMSESSION_KEY.*Key\.generate\(\).*SHMSESSION_KEY_FILE"):
        a_store(url, keys=())
    assert a_store(url, keys=(), key_file=place / "key").is_persistent
    assert a_store("sqlite:////nowhere/sessions.db", keys=()).is_persistent


# ── cookies that browsers refuse ───────────────────────────────────────────────────────────────────────────────

REFUSED_COOKIES: list[tuple[dict[str, Any], str]] = [
    ({"domain": "example.com"}, "__Host-session.*domain"),
    ({"path": "/app"}, "__Host-session.*path"),
    ({"cookie_name": "__HOST-x", "domain": "example.com"}, "domain"),
    ({"secure": False, "same_site": "None"}, "same_site='None' without Secure"),
    ({"secure": False, "partitioned": True}, "partitioned=True without Secure"),
    ({"secure": False, "cookie_name": "__Host-x"}, "__Host-x.*without Secure"),
    ({"secure": False, "cookie_name": "__Secure-x"}, "__Secure-x.*without Secure"),
    ({"secure": False, "cookie_name": "__sEcUrE-x"}, "without Secure"),
    ({"secure": False, "cookie_name": "__Http-x"}, "without Secure"),
    ({"cookie_name": "__Http-x", "http_only": False}, "without HttpOnly"),
    ({"cookie_name": "__Host-Http-x", "http_only": False}, "without HttpOnly"),
    ({"cookie_name": "__Host-Http-x", "path": "/app"}, "path"),
    ({"cookie_name": ""}, "cookie_name ''"),
    ({"cookie_name": "a b"}, "cookie_name"),
    ({"cookie_name": "a=b"}, "cookie_name"),
    ({"cookie_name": "a;b"}, "cookie_name"),
    ({"cookie_name": "a\r\nSet-Cookie: x"}, "cookie_name"),
    ({"cookie_name": "ä"}, "cookie_name"),
    ({"cookie_name": "x" * 4090}, "up to 64"),
    ({"same_site": "lax"}, "write Lax, Strict or None"),
    ({"same_site": None}, "write Lax, Strict or None"),
    ({"cookie_name": "x", "path": "app"}, "begin it with /"),
    ({"cookie_name": "x", "path": ""}, "path"),
    ({"cookie_name": "x", "path": "/a;b"}, "path"),
    ({"cookie_name": "x", "path": "/a\n"}, "path"),
    ({"cookie_name": "x", "path": "/" + "x" * 1024}, "path"),
    ({"cookie_name": "x", "domain": "a; Secure"}, "domain"),
    ({"cookie_name": "x", "domain": ""}, "domain"),
    ({"storable_cookie_name": "__Http-x"}, "without HttpOnly"),
    ({"secure": False, "storable_cookie_name": "__Host-x"}, "without Secure"),
    ({"storable_cookie_name": "a b"}, "storable_cookie_name"),
    ({"secure": False, "cookie_name": "x", "storable_cookie_name": "__Secure-y"}, "another storable_cookie_name"),
    (
        {"cookie_name": "x", "domain": "example.com", "storable_cookie_name": "__Host-y"},
        "storable_cookie_name='__Secure-y'",
    ),
    ({"storable_cookie_name": "__Host-session"}, "another name"),
    ({"cookie_name": "x", "domain": "é.example"}, "domain"),
    *[({"cookie_name": "x", "domain": domain}, "write a host's name") for domain in (
        "example.com:80", "https://example.com", "example.com/", "example.com.", "*.example.com", "..example.com", ".",
        "x" * 64 + ".example", ".".join(["x" * 63] * 4),
    )],
    *[({"cookie_name": "x", "path": path}, "never send its cookie back") for path in (
        '/"x"', "/a?b", "/a#b", "/<x>", "/a\\b", "/{x}", "/a^b", "/a|b", "/a`b", "/.", "/a/../b", "/a/./b", "/a/..",
    )],
]  # fmt: skip


@pytest.mark.parametrize(("settings", "message"), REFUSED_COOKIES, ids=[str(at) for at in range(len(REFUSED_COOKIES))])
def test_a_cookie_that_browsers_refuse_is_refused_at_construction(settings: dict[str, Any], message: str) -> None:
    """It would be dropped silently, and every request would begin a new session."""
    with pytest.raises(ConfigError, match=message):
        SessionConfig(**settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"partitioned": True, "same_site": "None"},
        {"cookie_name": "__Secure-session", "domain": "example.com", "path": "/app"},
        {"cookie_name": "__Http-session"},
        {"secure": False, "domain": "example.com", "path": "/app", "same_site": "Strict"},
        {"http_only": False},
        {"cookie_name": "a.b~c!"},
        {"cookie_name": "x" * 64},
        {"cookie_name": "x", "domain": "." + ".".join(["x" * 63] * 3 + ["x" * 61])},
        {"cookie_name": "x", "domain": ".example.com", "path": "/a%22/.b/..c/d.//"},
        {"cookie_name": "x", "domain": "x_y.xn--e1afmkfd", "path": "/app/'$&()*+,=:@!~[1]"},
    ],
)
def test_a_cookie_that_browsers_keep_is_accepted(settings: dict[str, Any]) -> None:
    """The checks refuse no more than browsers do."""
    SessionConfig(**settings)


def test_the_cookie_lives_no_longer_than_browsers_let_it() -> None:
    """400 days, or the absolute lifespan if that is shorter."""
    assert SessionConfig().max_age == timedelta(days=400)
    assert SessionConfig(absolute_lifespan=timedelta(days=2)).max_age == timedelta(days=2)
    assert SessionConfig(absolute_lifespan=timedelta(days=900)).max_age == timedelta(days=400)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "plain"}, "a CookieMode"),
        ({"name": 5}, "name that the cookie had"),
        ({"name": "a b"}, "name that the cookie had"),
        ({"name": ""}, "name that the cookie had"),
        ({"bind_to": "ip"}, "a sequence"),
        ({"bind_to": ("host",)}, "a sequence"),
        ({"bind_to": ([],)}, "a sequence"),
        ({"bind_to": ("ip",), "mode": CookieMode.PLAIN}, "bound to nothing"),
    ],
)
def test_an_old_cookie_that_cannot_have_been_is_an_error_where_it_is_written(
    settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=f"OldCookie.*{message}"):
        OldCookie(**settings)
    assert OldCookie(bind_to=["ip"]).bind_to == ("ip",)  # type: ignore[arg-type]


# ── times and sizes ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("seconds", [-1, 60, 61])
def test_a_touch_interval_that_would_end_busy_sessions_is_refused(seconds: int) -> None:
    """It must be shorter than the lifespan; 0 is allowed: every look counts."""
    with pytest.raises(ConfigError, match=r"touch_interval.*SHMSESSION_LIFESPAN"):
        SessionConfig(lifespan=timedelta(seconds=60), touch_interval=timedelta(seconds=seconds))
    assert SessionConfig(touch_interval=timedelta(0)).touch_interval == timedelta(0)


def test_a_short_lifespan_shortens_the_touch_interval_that_nobody_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """SHMSESSION_LIFESPAN=2 must work alone, and a busy session must live."""
    monkeypatch.setenv("SHMSESSION_LIFESPAN", "2")
    assert SessionConfig().effective_touch_interval == timedelta(milliseconds=200)
    assert SessionConfig(lifespan=timedelta(minutes=10)).effective_touch_interval == timedelta(seconds=60)


@pytest.mark.parametrize("settings", [{"max_size": 255}, {"max_size": (16 << 20) + 1}, {"map_size": (1 << 20) - 1}])
def test_sizes_have_bounds(settings: dict[str, int]) -> None:
    """And the message names them."""
    with pytest.raises(ConfigError, match="write"):
        SessionConfig(**settings)  # type: ignore[arg-type]


def test_lifetimes_are_whole_milliseconds() -> None:
    """Rounded down, never below 0."""
    config = SessionConfig(lifespan=timedelta(seconds=1.0005), absolute_lifespan=timedelta(days=1))
    assert (config.lifetimes.idle, config.lifetimes.absolute) == (1000, 86_400_000)
    assert SessionConfig().lifetimes.absolute is None
    assert milliseconds(timedelta(microseconds=999)) == 0
    assert milliseconds(timedelta(seconds=-5)) == 0


# ── the backend ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("setting", ["through_timeout", "flush_interval", "load_timeout", "drain_timeout"])
def test_a_wait_is_a_time_that_passes(setting: str) -> None:
    """More than none and less than a hundred years. The message names the setting, and no variable that is none."""
    wrong: list[object] = [timedelta(0), timedelta(seconds=-1), timedelta(days=36_501), 1, 0.25, None, "1"]
    for value in wrong:
        with pytest.raises(ConfigError, match=rf"{setting} is .*: write ") as caught:
            SessionConfig(**{setting: value})  # type: ignore[arg-type]
        assert "SHMSESSION_" not in str(caught.value)
    assert getattr(SessionConfig(**{setting: timedelta(milliseconds=1)}), setting) == timedelta(milliseconds=1)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("setting", "good"), [("write", ["behind", "through"]), ("on_backend_error", ["unavailable", "anonymous"])]
)
def test_a_choice_is_one_of_its_words(setting: str, good: list[str]) -> None:
    """A slip would else decide silently how safe a commit is, or who is logged out."""
    assert getattr(SessionConfig(), setting) == good[0]
    for word in good:
        assert getattr(SessionConfig(**{setting: word}), setting) == word  # type: ignore[arg-type]
    wrong: list[object] = ["", good[1].upper(), good[1] + " ", "sideways", None, True, ["through"]]
    for value in wrong:
        with pytest.raises(ConfigError, match=rf"{setting} .*write {good[0]} or {good[1]}"):
            SessionConfig(**{setting: value})  # type: ignore[arg-type]


def test_whether_tables_are_shared_is_true_or_false() -> None:
    """Nothing that merely counts as true."""
    assert not SessionConfig().allow_shared
    for value in (1, "1", None):
        with pytest.raises(ConfigError, match=r"allow_shared is .*: write True or False"):
            SessionConfig(allow_shared=value)  # type: ignore[arg-type]


@pytest.mark.parametrize("setting", ["keys", "database_keys"])
def test_keys_are_a_sequence_of_keys(setting: str) -> None:
    """Their text is none; it is not repeated either."""
    assert getattr(SessionConfig(**{setting: [ONE, TWO]}), setting) == (ONE, TWO)  # type: ignore[arg-type]
    assert SessionConfig().database_keys == ()
    wrong: list[object] = [(str(ONE),), str(ONE), ONE, (ONE, None), None]
    for value in wrong:
        with pytest.raises(ConfigError, match=f"{setting}: write a sequence of Keys") as caught:
            SessionConfig(**{setting: value})  # type: ignore[arg-type]
        assert str(ONE) not in str(caught.value)


def test_settings_are_frozen_and_show_no_secret() -> None:
    """They may be logged."""
    config = SessionConfig(keys=(ONE,), database_keys=(TWO,))
    assert str(ONE) not in repr(config)
    assert str(TWO) not in repr(config)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.lifespan = timedelta(1)  # type: ignore[misc]
    assert dataclasses.replace(config, name="x").keys == (ONE,)


# ── the default name ───────────────────────────────────────────────────────────────────────────────────────────


def test_two_working_directories_have_two_names_and_each_always_the_same(place: Path) -> None:
    """Two applications of one user do not share by accident; also when their directories are called alike."""
    for parent in ("a", "b"):
        (place / parent / "my shop!").mkdir(parents=True)
    one, other = default_name(place / "a" / "my shop!"), default_name(place / "b" / "my shop!")
    assert one != other
    assert one == default_name(place / "b" / ".." / "a" / "my shop!")
    assert one.startswith("my-shop-")
    SessionConfig(name=one)


def test_a_link_to_the_directory_has_its_name(place: Path) -> None:
    """Deployments switch a link named `current`: what matters is where it leads."""
    (place / "release").mkdir()
    (place / "current").symlink_to(place / "release")
    assert default_name(place / "current") == default_name(place / "release")


@pytest.mark.parametrize("name", ["x" * 200, "日本", "-", "..."])
def test_any_directory_gives_a_name_that_is_valid(place: Path, name: str) -> None:
    """However it is called."""
    (place / name).mkdir()
    SessionConfig(name=default_name(place / name))


def test_the_root_directory_gives_no_name() -> None:
    """Service managers start everybody there."""
    with pytest.raises(ConfigError, match="set SHMSESSION_NAME"):
        default_name(Path("/"))


def test_a_store_is_named_after_the_working_directory(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless it has a name; name= wins."""
    monkeypatch.chdir(place)
    config = SessionConfig(keys=(ONE,))
    assert SessionStore(config=config).name == default_name(place)
    monkeypatch.setenv("SHMSESSION_NAME", "shop")
    assert SessionStore(config=SessionConfig(keys=(ONE,))).name == "shop"
    assert SessionStore(config=SessionConfig(keys=(ONE,)), name="other").name == "other"
