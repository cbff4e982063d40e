"""One finding of a check that every machine made."""

from collections.abc import Sequence
from dataclasses import replace

from launch.preflight.finding import WORST_FIRST, Answer, Finding
from pipeline.errors import ExitCode

_MOST_NODES = 8
# What several machines see alike is no machine's fault: the same dataset, the same run.
_SHARED = ("shards", "owner")


def merged(name: str, answers: Sequence[Answer]) -> Finding | None:
    """The gravest answer, with those who gave it; None if nobody made the check.

    What only some machines suffer from is those machines' fault, whatever it is: they are named,
    and leaving them out helps.
    """
    found = [(one.node, finding) for one in answers if (finding := one.of(name)) is not None]
    if not found:
        return None
    worst = min((one.state for _, one in found), key=WORST_FIRST.index)
    of_worst = [(node, one) for node, one in found if one.state == worst]
    first = of_worst[0][1]
    seconds = max(one.seconds for _, one in found)
    if worst in ("ok", "skip") or len(found) == 1:
        return replace(first, seconds=seconds)
    nodes = tuple(dict.fromkeys(node for node, _ in of_worst))
    words = [f"{node}: {one.got}" for node, one in of_worst[:_MOST_NODES]]
    more = f" and {len(of_worst) - _MOST_NODES} more" if len(of_worst) > _MOST_NODES else ""
    all_nodes = {node for node, _ in found}
    is_theirs = len(nodes) < len(all_nodes) and name not in _SHARED
    return replace(
        first,
        got="; ".join(words) + more,
        seconds=seconds,
        nodes=nodes if is_theirs or first.exit_code == ExitCode.PEER_LOST else (),
        exit_code=ExitCode.PEER_LOST if is_theirs else first.exit_code,
    )
