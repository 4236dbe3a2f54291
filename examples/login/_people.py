"""Who may log in: a small SQLite file, with passwords as argon2 hashes. It knows nothing of sessions.

LOGIN_USERS names the file; without it that is ``.login-users.db`` beside the directory of the examples.
"""

import os
import re
import sqlite3
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from argon2 import PasswordHasher
from argon2.exceptions import VerifyMismatchError

FILE = Path(os.environ.get("LOGIN_USERS") or Path(__file__).parents[2] / ".login-users.db")
NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{1,29}")
SHORTEST, LONGEST = 8, 200

_TABLE = """CREATE TABLE IF NOT EXISTS people (
    id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL UNIQUE, rights TEXT NOT NULL, password TEXT NOT NULL
)"""
_hasher = PasswordHasher(time_cost=2, memory_cost=19 * 1024, parallelism=1)  # OWASP's: many may log in at once
_NOBODYS = _hasher.hash("")  # checked for names that nobody has, which thereby take as long as others


@dataclass(frozen=True)
class Person:
    id: int
    name: str
    rights: str
    password: str = field(repr=False)

    def has(self, permission: str) -> bool:
        return permission in self.rights.split()


def load(user_id: int) -> Person | None:
    return _one("SELECT id, name, rights, password FROM people WHERE id = ?", user_id)


def everybody() -> list[Person]:
    with closing(_connect()) as file:
        return [Person(*row) for row in file.execute("SELECT id, name, rights, password FROM people ORDER BY name")]


def check(name: str, password: str) -> Person | None:
    """Who has this name and this password. It takes the same time whether the name exists or not."""
    person = _one("SELECT id, name, rights, password FROM people WHERE name = ?", spelled(name))
    try:
        _hasher.verify(_NOBODYS if person is None else person.password, password)
    except VerifyMismatchError:
        return None
    return person


def sign_up(name: str, password: str) -> Person | str:
    """The new one, or what is wrong with the name or password. Who comes first may see the page of all people."""
    name = spelled(name)
    if not NAME.fullmatch(name):
        return "A name has 2 to 30 letters from a to z, digits, dots, dashes and underscores."
    wrong = wrong_with(password)
    if wrong:
        return wrong
    with closing(_connect()) as file, file:
        made = file.execute(
            "INSERT INTO people (name, rights, password) SELECT ?, iif(EXISTS (SELECT 1 FROM people), '', 'people'), ? "
            "ON CONFLICT DO NOTHING RETURNING id, name, rights, password",
            (name, _hasher.hash(password)),
        ).fetchone()
    return Person(*made) if made else "Somebody has this name already."


def set_password(user_id: int, password: str) -> None:
    with closing(_connect()) as file, file:
        file.execute("UPDATE people SET password = ? WHERE id = ?", (_hasher.hash(password), user_id))


def wrong_with(password: str) -> str | None:
    if SHORTEST <= len(password) <= LONGEST:
        return None
    return f"A password has {SHORTEST} characters or more, up to {LONGEST}."


def spelled(name: str) -> str:
    return name.strip().lower()


def _one(query: str, *values: object) -> Person | None:
    with closing(_connect()) as file:
        row = file.execute(query, values).fetchone()
    return Person(*row) if row else None


def _connect() -> sqlite3.Connection:
    FILE.touch(mode=0o600)  # hashes of passwords are for nobody else to try
    file = sqlite3.connect(FILE)
    file.execute(_TABLE)
    return file
