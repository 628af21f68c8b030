"""Refuses SQL that is not one reading of the tables at hand, before DuckDB runs any of it.

Why DuckDB's own lock is not enough: a file that it may read, it may also write, and since version 2.0 a SELECT may
carry `WITH x AS (COPY ... TO 'part-000000.parquet')`. So the statement's tree, as DuckDB itself parses it, may hold
nothing but queries, and no function that reads or does anything outside of them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from carray.core.errors import SettingsError

__all__ = ["check_sql"]

_QUERY_NODES = {"SELECT_NODE", "SET_OPERATION_NODE", "RECURSIVE_CTE_NODE", "CTE_NODE"}
_TABLE_FUNCTIONS = {"unnest", "range", "generate_series", "json_each", "json_tree"}
"""Those that make rows of their arguments alone."""


def check_sql(connection: Any, sql: str) -> None:
    """Let one SELECT pass, in any of DuckDB's spellings (FROM first, WITH, DESCRIBE, SUMMARIZE, PIVOT ... IN).

    Raises:
        SettingsError: it is no SQL, more than one statement or none, changes something, or reaches beyond its tables.
    """
    import duckdb

    if any("\ud800" <= char <= "\udfff" for char in sql):  # a shell's argument that is not UTF-8
        raise SettingsError(f"the SQL is refused ({ascii(sql)[:80]} is not Unicode); write it in UTF-8.")
    try:
        statements = connection.extract_statements(sql)
    except duckdb.Error as err:
        raise SettingsError(f"the SQL is refused ({_one_line(err)}); the one table is predictions.") from None
    if len(statements) != 1 or statements[0].type != duckdb.StatementType.SELECT:
        kinds = " and ".join(str(statement.type).rpartition(".")[2] for statement in statements) or "nothing"
        raise SettingsError(f"the SQL is refused (it is {kinds}); write one SELECT over the table predictions.")
    for node in _nodes(_parsed(connection, sql)):
        kind, name = str(node.get("type", "")), _function_name(node)
        if kind.endswith("_NODE") and kind not in _QUERY_NODES:
            what = kind.split("_")[0]
            raise SettingsError(f"the SQL is refused (it holds {what}); it may read the table predictions, not write.")
        if kind == "TABLE_FUNCTION" and name not in _TABLE_FUNCTIONS:
            raise SettingsError(
                f"the SQL is refused (it calls {name}, which reaches beyond its tables); the one table is predictions."
            )


def _parsed(connection: Any, sql: str) -> Any:
    """Give the tree of a statement as DuckDB's parser made it."""
    text = connection.execute("SELECT json_serialize_sql(?::VARCHAR)", [sql]).fetchall()[0][0]
    try:
        tree = json.loads(text)
    except RecursionError:
        raise SettingsError(
            "the SQL is refused (it is nested too deep to be looked through); write it flatter."
        ) from None
    if tree.get("error", True):
        reason = " ".join(str(tree.get("error_message", "not understood")).split())
        raise SettingsError(f"the SQL is refused ({reason}); write one SELECT over the table predictions.")
    return tree


def _nodes(tree: Any) -> Iterator[dict[str, Any]]:
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, dict):
            yield node
            waiting += node.values()
        elif isinstance(node, list):
            waiting += node


def _function_name(node: dict[str, Any]) -> str:
    function = node.get("function")
    return str(function.get("function_name", "")).lower() if isinstance(function, dict) else ""


def _one_line(err: Exception) -> str:
    return " ".join(str(err).split("\n\n")[0].split())
