"""What the measured network says: who did not answer, which pair is slow, what all reach."""

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from launch.preflight.checks.network import NAME
from launch.preflight.finding import Answer, Finding, Situation
from pipeline.errors import ExitCode

# Pairs of one network differ by what else goes through a switch; half is a bad cable or card.
_SLOW = 0.5
_PROMISED_SHARE = 0.5
_REMEDY = "Leave that machine out and look at its cables, cards and drivers (`ibstat`, `ethtool`)."


def compare_network(situation: Situation, answers: Sequence[Answer]) -> Finding:
    """One finding of all ranks' measurements, with the slow pair named."""
    found = [(one.node, finding) for one in answers if (finding := one.of(NAME)) is not None]
    if not found:
        return Finding(name=NAME, state="skip", got="one process")
    silent = [(node, finding) for node, finding in found if finding.state == "fail"]
    if silent:
        return _on_machines(_unanswered(silent), answers)
    pairs = [(a, b, float(rate)) for _, finding in found for a, b, rate in finding.values["pairs"]]
    return _on_machines(_judged(situation, pairs, found[0][1]), answers)


def _on_machines(finding: Finding, answers: Sequence[Answer]) -> Finding:
    """The machines of the ranks that are to blame: a scheduler knows nothing of ranks."""
    machines = {f"rank {one.rank}": one.node for one in answers}
    return replace(finding, nodes=tuple(dict.fromkeys(machines.get(n, n) for n in finding.nodes)))


def _judged(
    situation: Situation, pairs: Sequence[tuple[str, str, float]], collective: Finding
) -> Finding:
    """Slow pairs, and machines that are slow with everybody."""
    reduced, gathered = collective.values["all_reduce"], collective.values["all_gather"]
    rates = [rate for _, _, rate in pairs]
    middle = statistics.median(rates) if rates else 0.0
    got = f"all-reduce {reduced:.2f}, all-gather {gathered:.2f} GB/s on the bus"
    if pairs:
        a, b, least = min(pairs, key=lambda pair: pair[2])
        got += f"; {len(pairs)} pair(s) {middle:.2f} GB/s, the slowest {a} and {b} {least:.2f}"
    finding = Finding(
        name=NAME,
        state="ok",
        expected=f"every pair at least {_SLOW:.0%} of the median",
        got=got,
        exit_code=ExitCode.PEER_LOST,
        values={
            "all_reduce_gb_per_second": reduced,
            "all_gather_gb_per_second": gathered,
            "pair_gb_per_second": middle,
        },
    )
    slow = [(a, b, rate) for a, b, rate in pairs if rate < _SLOW * middle]
    if slow:
        return _slow_pairs(finding, pairs, slow, middle)
    return _promised(situation, finding, reduced)


def _slow_pairs(
    finding: Finding,
    pairs: Sequence[tuple[str, str, float]],
    slow: Sequence[tuple[str, str, float]],
    middle: float,
) -> Finding:
    words = ", ".join(f"{a} and {b} {rate:.2f}" for a, b, rate in slow[:8])
    got = f"slow: {words} GB/s beside a median of {middle:.2f}"
    of_node: dict[str, list[float]] = {}
    for a, b, rate in pairs:
        for node in (a, b):
            of_node.setdefault(node, []).append(rate)
    # Slow with most of its partners, of which it must have a few.
    bad = [
        node
        for node, rates in of_node.items()
        if len(rates) > 1 and statistics.median(rates) < _SLOW * middle
    ]
    if not bad:
        return finding.worse("warn", got, "Look at the link between them.")
    return replace(finding.worse("fail", got, _REMEDY), nodes=tuple(bad))


def _promised(situation: Situation, finding: Finding, reduced: float) -> Finding:
    """The site's word counts where as many ranks measured as a node has."""
    cluster, launch = situation.cluster, situation.launch
    if cluster is None or launch.local_world_size < cluster.gpus_per_node:
        return finding
    one_node = launch.world_size <= cluster.gpus_per_node
    promised = (
        cluster.intra_node_gb_per_second
        if one_node
        else min(cluster.intra_node_gb_per_second, cluster.inter_node_gb_per_second)
    )
    if reduced >= _PROMISED_SHARE * promised:
        return finding
    return finding.worse(
        "warn",
        f"{finding.got}; the site promises {promised:g} GB/s",
        "Look at NCCL_DEBUG=INFO: is RDMA in use, on the right cards?",
    )


def _unanswered(silent: Sequence[tuple[str, Finding]]) -> Finding:
    """The first exchange that did not end; later ones only waited for it."""
    stuck = [one for _, one in silent if one.values.get("partner")]
    if not stuck:
        if len({(one.got, one.nodes) for _, one in silent}) == 1:
            return silent[0][1]
        words = "; ".join(f"{node}: {one.got}" for node, one in silent[:8])
        return replace(silent[0][1], got=words, nodes=())
    first = min(int(one.values["round"]) for one in stuck)
    pairs = {
        tuple(sorted((str(one.values["self"]), str(one.values["partner"]))))
        for one in stuck
        if int(one.values["round"]) == first
    }
    named = Counter(node for pair in pairs for node in pair)
    words = ", ".join(f"{a} and {b}" for a, b in sorted(pairs))
    return replace(
        silent[0][1],
        expected="every pair exchanges",
        got=f"no answer between {words}",
        remedy=_REMEDY,
        nodes=tuple(named),
    )
