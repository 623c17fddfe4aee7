"""The program whose data shall survive: orders in an SQLite database, one transaction each.

usage: orders.py DATABASE [SYNCHRONOUS [JOURNAL_MODE]]

Takes a number a line, enters it, and answers with the number once it is committed.
"""

import sqlite3
import sys


def connect(
    path: str, synchronous: str = "FULL", journal_mode: str = "PERSIST"
) -> sqlite3.Connection:
    database = sqlite3.connect(path, isolation_level=None)  # transactions are begun and ended here
    # A journal that stays is made invalid by a write and a sync of it. With one that is deleted, as
    # SQLite does by default, or truncated, power cuts on ext2 were seen to undo what was committed.
    database.execute(f"PRAGMA journal_mode = {journal_mode}")
    database.execute(f"PRAGMA synchronous = {synchronous}")
    return database


def create(database: sqlite3.Connection) -> None:
    database.executescript("""
        CREATE TABLE orders (number INTEGER PRIMARY KEY, what BLOB NOT NULL);
        CREATE TABLE total (orders INTEGER NOT NULL);
        INSERT INTO total VALUES (0);
    """)


def enter(database: sqlite3.Connection, number: int) -> None:
    database.execute("BEGIN IMMEDIATE")
    database.execute("INSERT INTO orders VALUES (?, ?)", (number, number.to_bytes(2) * 700))
    database.execute("UPDATE total SET orders = orders + 1")
    database.execute("COMMIT")


if __name__ == "__main__":
    database = connect(*sys.argv[1:])
    create(database)
    for line in sys.stdin:
        enter(database, int(line))
        print(line, end="", flush=True)
