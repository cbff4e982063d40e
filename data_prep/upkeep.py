"""What a preparation finds when it begins, and what it leaves when it is done."""

import shutil

from data_prep.ledger import Ledger
from data_prep.pack import packed


def clear_leftovers(ledger: Ledger) -> None:
    """Removes what processes that were killed had begun; nobody else is at work in this folder."""
    shutil.rmtree(ledger.folder / "running", ignore_errors=True)
    for folder in ("items", "shards"):
        for leftover in (ledger.folder / folder).rglob("*.partial"):
            leftover.unlink(missing_ok=True)


def reopen_lost(ledger: Ledger) -> None:
    """Notes published shards that are gone or cut off, and items that they need, as not done."""
    numbers = ledger.database.execute("SELECT number FROM shard WHERE done = 1").fetchall()
    lost = [
        (number,)
        for (number,) in numbers
        if packed(ledger.shard_path(number), ledger.shard_rows(number)) is None
    ]
    with ledger.database as database:
        database.executemany("UPDATE shard SET done = 0 WHERE number = ?", lost)
        needed = database.execute(
            "SELECT DISTINCT name, item FROM source JOIN segment ON source = name "
            "LEFT JOIN shard ON shard.number = segment.shard "
            "WHERE source.done = 1 AND original IS NULL AND shard.done IS NOT 1"
        )
        gone = [(name,) for name, item in needed if not ledger.item_path(item).exists()]
        database.executemany("UPDATE source SET done = 0 WHERE name = ?", gone)


def remove_packed(ledger: Ledger, number: int) -> None:
    """Removes the items of a published shard whose other segments are published as well."""
    rows = ledger.database.execute(
        "SELECT DISTINCT name, item FROM source JOIN segment ON source = name WHERE shard = ? "
        "AND NOT EXISTS (SELECT 1 FROM segment AS other JOIN shard ON shard.number = other.shard "
        "WHERE other.source = name AND shard.done = 0)",
        (number,),
    )
    for _, item in rows.fetchall():
        ledger.item_path(item).unlink(missing_ok=True)


def remove_all_items(ledger: Ledger) -> None:
    """Removes what is left when everything is published: items that no shard took anything of."""
    for folder in ("items", "running"):
        shutil.rmtree(ledger.folder / folder, ignore_errors=True)
