"""Something done before each statement that goes to PostgreSQL: a death, or a count."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

WAYS = ("execute", "fetch", "fetchval", "fetchrow", "copy_to_table")


def before_statements(do: Callable[[str], None], patch: Callable[[Any, str, Any], None] = setattr) -> None:
    """`do` is called with the statement, or the table that is copied into; begin and commit are such too. `patch`: of a
    test that wants it undone."""
    import asyncpg

    for name in WAYS:
        real = getattr(asyncpg.Connection, name)

        def instead(connection: Any, what: str, *values: Any, _real: Any = real, **more: Any) -> Any:
            do(what)
            return _real(connection, what, *values, **more)

        patch(asyncpg.Connection, name, instead)
