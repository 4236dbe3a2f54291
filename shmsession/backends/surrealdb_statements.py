"""What SurrealDB is asked, in words that its versions 2 and 3 both understand.

Each question is one block, which is one statement, so one transaction and one result. A user without the right to
change a table is told nothing of it: what should have changed simply has not. So each change is looked at, and what
was refused ends the whole transaction. A table that is not there is an empty one to version 2, so each block looks for
the schema's version first. What is asked for by a list of ids has rows of nothing for those that are missing, in
version 3 only.
"""

from typing import Final

from .base import SENTINEL, State

SCHEMA: Final = 1
"""The version of the tables that this module makes and understands."""

WRONG_SCHEMA: Final = "shmsession schema "
"""Begins what a block throws where there are no tables of this version; the version follows, 0 for none."""
REFUSED: Final = "shmsession refused"
"""What a block throws when this user may not change the rows."""

_WRITE: Final = f"""
LET $stood = (SELECT VALUE [id, state, epoch, version] FROM $ids);
FOR $row IN $rows {{
    LET $old = (SELECT state, epoch, version, horizon FROM ONLY $row.id);
    LET $wins = $old = NONE OR $row.state = {State.DEAD:d} OR ($old.state != {State.DEAD:d} AND
        ($row.epoch > $old.epoch OR ($row.epoch = $old.epoch AND $row.version > $old.version)));
    IF $old = NONE {{
        LET $done = (CREATE $row.id CONTENT $row RETURN VALUE horizon);
        IF $done != [$row.horizon] {{ THROW '{REFUSED}' }};
    }} ELSE IF $wins {{
        LET $until = math::max([$row.horizon, $old.horizon]);
        LET $done = (UPDATE $row.id SET state = $row.state, epoch = $row.epoch, version = $row.version,
            horizon = $until, user = $row.user, body = $row.body RETURN VALUE version);
        IF $done != [$row.version] {{ THROW '{REFUSED}' }};
    }} ELSE IF $row.horizon > $old.horizon {{
        LET $done = (UPDATE $row.id SET horizon = $row.horizon RETURN VALUE horizon);
        IF $done != [$row.horizon] {{ THROW '{REFUSED}' }};
    }};
}};
RETURN $stood;
"""


class Statements:
    """The blocks for one table. Users are stored in hex: version 3.0 looks up no bytes by an index."""

    def __init__(self, table: str) -> None:
        table, self._meta, indexed = f"`{table}`", f"`{table}_meta`", f"DEFINE INDEX `{table}"
        self._table = table
        self.version = f"RETURN (SELECT VALUE version FROM ONLY {self._meta}:schema)"
        fields = {
            "state": "int", "epoch": "int", "version": "int", "horizon": "int", "user": "string", "body": "bytes"
        }  # fmt: skip
        define = "".join(f"DEFINE FIELD {name} ON {table} TYPE {type_}; " for name, type_ in fields.items())
        self.create = (
            f"{{ DEFINE TABLE {table} TYPE NORMAL SCHEMAFULL; {define}"
            f"{indexed}_user` ON {table} FIELDS user; {indexed}_horizon` ON {table} FIELDS horizon; "
            f"DEFINE TABLE {self._meta} TYPE NORMAL SCHEMAFULL; DEFINE FIELD version ON {self._meta} TYPE int; "
            f"CREATE {self._meta}:schema SET version = {SCHEMA}; RETURN {SCHEMA} }}"
        )
        columns = "state, epoch, version, horizon, user, body"
        self.load = self._block(f"RETURN (SELECT VALUE [{columns}] FROM ONLY $id);")
        self.write = self._block(_WRITE)
        self.sessions_of = self._block(
            f"RETURN (SELECT VALUE [id, {columns}] FROM {table} WHERE user = $user AND state = {State.LIVE:d});"
        )
        self.sweep = self._block(
            f"LET $past = (SELECT VALUE id FROM {table} WHERE horizon < $now LIMIT $limit); "
            "LET $gone = (DELETE $past RETURN BEFORE); "
            f"IF count($gone) != count($past) {{ THROW '{REFUSED}' }}; RETURN count($past);"
        )

    def handles(self, after: str, limit: int) -> str:
        """The ids of the next LIVE rows, in their order."""
        live = f"WHERE state = {State.LIVE:d} LIMIT {limit}"
        return self._block(f"RETURN (SELECT VALUE record::id(id) FROM {self._after(after)} {live});")

    def count(self, after: str, limit: int) -> str:
        """How many of the next rows are LIVE, and the id of the last of them."""
        return self._block(
            f"LET $page = (SELECT id, state FROM {self._after(after)} LIMIT {limit}); "
            f"RETURN [count($page[WHERE state = {State.LIVE:d}]), array::last($page).id];"
        )

    def clear(self, after: str, limit: int) -> str:
        """The same, and all of them become DEAD."""
        dead = f"state = {State.DEAD:d}"
        return self._block(
            f"LET $page = (SELECT id, state FROM {self._after(after)} LIMIT {limit}); "
            f"LET $doomed = $page[WHERE state != {State.DEAD:d}].id; "
            f"LET $done = (UPDATE $doomed SET {dead}, user = '', body = <bytes>'' RETURN VALUE state); "
            f"IF count($done) != count($doomed) {{ THROW '{REFUSED}' }}; "
            f"RETURN [count($page[WHERE state = {State.LIVE:d}]), array::last($page).id];"
        )

    def _after(self, handle: str) -> str:
        """All records behind this one, in the order of ids. The hex digits of a handle need no quoting."""
        return f"{self._table}:⟨{handle}⟩>.."

    def _block(self, text: str) -> str:
        check = (
            f"LET $schema = (SELECT VALUE version FROM ONLY {self._meta}:schema); "
            f"IF $schema != {SCHEMA} {{ THROW '{WRONG_SCHEMA}' + <string>($schema ?? 0) }};"
        )
        return f"{{ {check} {text} }}"


FIRST: Final = SENTINEL.hex()
"""The id that is before those of all sessions."""
