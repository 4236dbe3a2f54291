"""Keys: made once, rotated by appending, separated by purpose, and never shown."""

import copy
import logging
import os
import pickle
import pwd
import stat
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.exceptions import InvalidTag
from hypothesis import given
from hypothesis import strategies as st

from shmsession.config import SessionConfig
from shmsession.errors import ConfigError
from shmsession.keyring import KEY_BYTES, Key, Keyring, load_or_create, parse_keys
from tests.properties import child_environment, examples

FIXED = Key(bytes(range(32)))


# ── one Key ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_key_is_random_and_its_text_is_43_characters_that_parse_back() -> None:
    """What `print(Key.generate())` prints is what SHMSESSION_KEY takes."""
    key = Key.generate()
    assert key != Key.generate()
    assert len(str(key)) == 43
    assert Key.parse(str(key)) == key
    assert Key.parse(f"  {key}=\n") == key
    assert hash(Key.parse(str(key))) == hash(key)


def test_ids_and_derived_secrets_are_those_of_the_first_release() -> None:
    """Sessions and cookies sealed by an earlier version must open: these values never change."""
    assert FIXED.id.hex() == "553664fa"
    assert FIXED.derive("cookie").hex() == "87e2d24d08cd187e3740c4ab500271e340cf6ade7c57c43bec92868230e9eb90"
    assert FIXED.derive("record").hex() == "1dca8cab79bbdc74d024a21ca87b63e2dc03d5dcbb2ac66e8bb3483b94925fd4"


def test_purposes_are_separated() -> None:
    """One purpose's secret is neither the Key nor another's; nor is a cookie's cipher text opened as anything else."""
    secrets = {FIXED.derive(purpose) for purpose in ("cookie", "record", "database")}
    assert len(secrets | {bytes(range(32))}) == 4
    ring = Keyring([FIXED])
    sealed = ring.seal(b"id", b"cookie session")
    with pytest.raises(InvalidTag):
        ring.unseal(FIXED.id, sealed, b"cookie other")
    assert ring.unseal(FIXED.id, sealed, b"cookie session") == b"id"


BAD_TEXTS = [
    "",
    "x",
    "hunter2" * 6 + "h",
    "A" * 42,
    "A" * 44,
    "A" * 42 + "B",
    "Ä" * 43,
    "A" * 42 + "+",
    "A" * 40 + "===",
    "A" * 1000,
]


@pytest.mark.parametrize("text", BAD_TEXTS)
def test_what_is_no_key_is_refused_without_being_quoted(text: str) -> None:
    """It may be a secret with a slip in it. That includes spellings with slack bits: one Key, one text."""
    with pytest.raises(ConfigError, match=r"write what `print\(shmsession.Key.generate\(\)\)` prints") as caught:
        Key.parse(text)
    shown = "".join(traceback.format_exception(caught.value))
    assert len(text) < 4 or text not in shown


@examples(20_000, 300)
@given(st.text(max_size=60))
def test_any_text_parses_or_is_a_config_error(text: str) -> None:
    """Nothing else is raised, and the text is not in it."""
    try:
        shown = "".join(map(str, parse_keys(text)))
    except ConfigError as error:
        shown, expected = str(error), "not a Key: write what `print(shmsession.Key.generate())` prints, 43 characters"
    else:
        expected = "".join(text.replace("=", "").replace(",", " ").split())
    assert shown == expected or "#" in text


@pytest.mark.parametrize("length", [0, 31, 33])
def test_a_secret_of_another_length_is_refused(length: int) -> None:
    """The message names the length and no byte of it."""
    with pytest.raises(ConfigError, match=f"32 bytes, not {length}"):
        Key(b"s" * length)


def _shown(key: Key, ring: Keyring, caplog: pytest.LogCaptureFixture) -> str:
    config = SessionConfig(keys=(key,), secure=False)
    with caplog.at_level(logging.DEBUG):
        logging.getLogger("shmsession").warning("%r %r %r", key, ring, config)
    return "\n".join([repr(key), repr(ring), repr([key]), repr(config), str(config), caplog.text, f"{ring}"])


def test_no_secret_is_shown_in_a_repr_or_a_log(caplog: pytest.LogCaptureFixture) -> None:
    """Only the Key's id, by which operators tell Keys apart. `str` alone shows it: that is what it is for."""
    key = Key.generate()
    shown = _shown(key, Keyring([key]), caplog)
    assert key.id.hex() in shown
    for secret in (str(key), key._secret.hex(), repr(key._secret)[2:-1], key.derive("cookie").hex()):
        assert secret not in shown


def test_a_key_survives_pickling_and_copying() -> None:
    """Settings are handed to spawned processes that way; the ring of ciphers is not."""
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        assert pickle.loads(pickle.dumps(FIXED, protocol)) == FIXED
    assert copy.deepcopy(FIXED) == FIXED
    with pytest.raises(TypeError):
        pickle.dumps(Keyring([FIXED]))


def test_a_key_equals_only_itself() -> None:
    """Not its text, nor its secret."""
    assert Key(bytes(range(32))) == FIXED
    assert str(FIXED) != FIXED
    assert bytes(range(32)) != FIXED


# ── rotation ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_newest_seals_and_all_open() -> None:
    """Append a Key, restart: everything sealed before still opens; retire the oldest: its seals do not."""
    old, new = Key.generate(), Key.generate()
    sealed = Keyring([old]).seal(b"id", b"c")
    rotated = Keyring([old, new])
    assert rotated.newest_id == new.id
    assert rotated.unseal(old.id, sealed, b"c") == b"id"
    assert rotated.mac(old.id, b"m") == Keyring([old]).mac(old.id, b"m") != rotated.mac(new.id, b"m")
    assert Keyring([new]).unseal(new.id, rotated.seal(b"id", b"c"), b"c") == b"id"
    assert old.id in rotated
    retired = Keyring([new])
    assert old.id not in retired
    with pytest.raises(KeyError):
        retired.unseal(old.id, sealed, b"c")
    with pytest.raises(KeyError):
        retired.mac(old.id, b"m")


def test_every_seal_is_another_and_any_altered_bit_is_noticed() -> None:
    """A fresh nonce each time; AES-GCM over all of it."""
    ring = Keyring([FIXED])
    assert len({ring.seal(b"id", b"c") for _ in range(100)}) == 100
    sealed = ring.seal(b"id", b"c")
    for position in range(len(sealed)):
        altered = bytearray(sealed)
        altered[position] ^= 1
        with pytest.raises(InvalidTag):
            ring.unseal(FIXED.id, bytes(altered), b"c")


def test_a_keyring_needs_a_key() -> None:
    """The message says how to make one."""
    with pytest.raises(ConfigError, match=r"Key.generate\(\)"):
        Keyring([])


def test_keys_are_parsed_oldest_first_from_commas_or_lines() -> None:
    """As in SHMSESSION_KEY, and as in a key file with comments."""
    one, two = Key.generate(), Key.generate()
    assert parse_keys(f"{one}, {two}") == (one, two)
    assert parse_keys(f"# oldest first\n{one}\n\n  # newer\n{two},\n") == (one, two)
    assert parse_keys("# nothing\n") == ()


# ── the key file ───────────────────────────────────────────────────────────────────────────────────────────────


def test_a_missing_file_is_made_once_with_mode_0600_in_a_directory_of_0700(place: Path) -> None:
    """And it is the same Key from then on."""
    path = place / "state" / "shmsession" / "app.key"
    keys = load_or_create(path)
    assert len(keys) == 1
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert load_or_create(path) == keys
    assert list(path.parent.iterdir()) == [path]


def test_a_loose_umask_makes_no_loose_file(place: Path) -> None:
    """0600 whatever the umask."""
    before = os.umask(0)
    try:
        load_or_create(place / "key")
    finally:
        os.umask(before)
    assert stat.S_IMODE((place / "key").stat().st_mode) == 0o600


_RACER = """
import sys
from pathlib import Path
from shmsession.keyring import load_or_create
sys.stdin.readline()
print(*load_or_create(Path(sys.argv[1])))
"""


def test_eight_processes_that_start_together_end_with_one_key(place: Path) -> None:
    """Whoever comes first makes it; all read the same, and nothing is left beside it."""
    path = place / "new" / "app.key"
    command = [sys.executable, "-c", _RACER, str(path)]
    racers = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=child_environment())
        for _ in range(8)
    ]
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.write("go\n")
        racer.stdin.flush()
    printed = {racer.communicate(timeout=60)[0] for racer in racers}
    assert [racer.returncode for racer in racers] == [0] * 8
    assert printed == {path.read_text()}
    assert list(path.parent.iterdir()) == [path]


def test_whoever_comes_second_takes_the_first_ones_key(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though it looked before the file was there: what the first has sealed already must stay readable."""
    keys = load_or_create(place / "key")
    monkeypatch.setattr(os.path, "lexists", lambda _: False)
    assert load_or_create(place / "key") == keys
    assert list(place.iterdir()) == [place / "key"]


def test_a_file_may_hold_several_keys_for_rotation(place: Path) -> None:
    """Oldest first, with comments, as an operator edits it."""
    one, two = Key.generate(), Key.generate()
    path = place / "key"
    path.write_text(f"# 2025\n{one}\n# 2026\n{two}\n")
    path.chmod(0o400)
    assert load_or_create(path) == (one, two)


def _symlink(path: Path) -> None:
    real = path.with_name("real")
    load_or_create(real)
    path.symlink_to(real)


def _permissive(mode: int) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        load_or_create(path)
        path.chmod(mode)

    return make


REFUSED: dict[str, Callable[[Path], object]] = {
    "symlink": _symlink,
    "dangling symlink": lambda path: path.symlink_to(path.with_name("nowhere")),
    "group may read": _permissive(0o640),
    "others may read": _permissive(0o604),
    "others may write": _permissive(0o602),
    "directory": lambda path: path.mkdir(mode=0o700),
    "fifo": lambda path: os.mkfifo(path, 0o600),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_key_file_that_is_not_ours_alone_is_refused(place: Path, what: str) -> None:
    """The message names the file; reading a FIFO does not hang, and no descriptor is left open."""
    path = place / "app.key"
    REFUSED[what](path)
    before = len(list(Path("/dev/fd").iterdir()))
    with pytest.raises(ConfigError, match=r"the key file .*app\.key"):
        load_or_create(path)
    assert len(list(Path("/dev/fd").iterdir())) == before


def test_a_key_file_of_another_user_is_refused(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever owns it can read it."""
    path = place / "key"
    load_or_create(path)
    other = os.geteuid() + 1
    monkeypatch.setattr(os, "geteuid", lambda: other)
    with pytest.raises(ConfigError, match=f"must be a file of uid {other} with mode 0600"):
        load_or_create(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [("", "holds no Key"), ("# none\n", "holds no Key"), ("hunter2\n", "not a Key"), ("\xff\n", "not a Key")],
)
def test_a_key_file_without_a_key_is_refused_and_left_alone(place: Path, content: str, message: str) -> None:
    """Overwriting it would lose somebody's Key; what it holds is not quoted."""
    path = place / "key"
    path.write_bytes(content.encode("latin-1"))
    path.chmod(0o600)
    with pytest.raises(ConfigError, match=message) as caught:
        load_or_create(path)
    assert "hunter2" not in "".join(traceback.format_exception(caught.value))
    assert path.read_bytes() == content.encode("latin-1")


def test_a_place_that_cannot_be_written_says_what_to_set(place: Path) -> None:
    """A service without a writable home must be told of the two variables."""
    (place / "file").write_text("")
    with pytest.raises(
        ConfigError, match=r"set SHMSESSION_KEY to what Key\.generate\(\) prints, or SHMSESSION_KEY_FILE"
    ):
        load_or_create(place / "file" / "below" / "app.key")
    assert [path.name for path in place.iterdir()] == ["file"]


_UNPRIVILEGED = """
import os, sys
from pathlib import Path
from shmsession.errors import ConfigError
from shmsession.keyring import load_or_create
if os.geteuid() == 0:
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
try:
    load_or_create(Path(sys.argv[1]))
except ConfigError as error:
    print(error)
"""


@pytest.mark.parametrize("mode", [0o500, 0o000])
def test_a_directory_without_permission_says_what_to_set(place: Path, mode: int) -> None:
    """Not even a PermissionError while looking escapes."""
    locked = place / "locked"
    locked.mkdir()
    place.chmod(0o755)
    locked.chmod(mode)
    command = [sys.executable, "-c", _UNPRIVILEGED, str(locked / "app.key")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=child_environment())
    locked.chmod(0o700)
    assert done.returncode == 0, done.stderr
    assert "SHMSESSION_KEY_FILE" in done.stdout


def test_the_key_file_stands_where_it_is_told_or_in_the_users_state_directory(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """key_file, else $XDG_STATE_HOME, else ~/.local/state; a relative XDG_STATE_HOME is to be ignored (XDG)."""
    monkeypatch.delenv("SHMSESSION_KEY", raising=False)
    monkeypatch.delenv("SHMSESSION_KEY_FILE", raising=False)
    monkeypatch.setenv("HOME", str(place / "home"))
    SessionConfig(key_file=place / "mine").keyring("app")
    assert (place / "mine").exists()
    monkeypatch.setenv("XDG_STATE_HOME", str(place / "xdg"))
    SessionConfig().keyring("app")
    assert (place / "xdg" / "shmsession" / "app.key").exists()
    monkeypatch.setenv("XDG_STATE_HOME", "relative")
    SessionConfig().keyring("app")
    assert (place / "home" / ".local" / "state" / "shmsession" / "app.key").exists()


def test_a_user_without_a_home_is_told_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """A container's uid often has no passwd entry."""
    for variable in ("HOME", "XDG_STATE_HOME", "SHMSESSION_KEY", "SHMSESSION_KEY_FILE"):
        monkeypatch.delenv(variable, raising=False)

    def nobody(_: int) -> None:
        raise KeyError("no such uid")

    monkeypatch.setattr(pwd, "getpwuid", nobody)
    with pytest.raises(ConfigError, match="SHMSESSION_KEY_FILE to a path"):
        SessionConfig().keyring("app")


def test_configured_keys_make_no_file(place: Path) -> None:
    """Nothing is written for a Key that was given."""
    config = SessionConfig(keys=(FIXED,), key_file=place / "key")
    assert config.keyring("app").keys == (FIXED,)
    assert not (place / "key").exists()
    assert len(FIXED._secret) == KEY_BYTES
