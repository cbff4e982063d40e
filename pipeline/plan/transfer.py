"""What collectives take on a cluster: bandwidth within and between nodes, and latency."""

import math

from pipeline.plan.cluster import Cluster

_MICRO, _GIGA = 1e-6, 1e9


def gather_seconds(cluster: Cluster, num_gpus: int, num_bytes: float, num_calls: int = 1) -> float:
    """An all-gather, or a reduce-scatter, which moves the same bytes the other way.

    With n GPUs on N nodes of g, a GPU receives (n − 1)/n of the whole over its node's links while
    its node receives (N − 1)/N of it over the network; the slower of the two counts. Each call adds
    its latency: one step for every further GPU of a node, and between nodes N − 1 steps in a ring
    or ⌈log2 N⌉ in a tree.

    Args:
        cluster: Whose links.
        num_gpus: GPUs that take part.
        num_bytes: What every GPU has at the end of it, all calls together.
        num_calls: Collectives that it is cut into.
    """
    if num_gpus == 1:
        return num_calls * cluster.collective_overhead_us * _MICRO
    local = min(num_gpus, cluster.gpus_per_node)
    nodes = math.ceil(num_gpus / cluster.gpus_per_node)
    inside = num_bytes * (num_gpus - 1) / num_gpus / (cluster.intra_node_gb_per_second * _GIGA)
    between = num_bytes * (nodes - 1) / nodes / (cluster.inter_node_gb_per_second * _GIGA)
    if local == 1:
        inside = 0.0
    steps = math.ceil(math.log2(nodes)) if cluster.collective_growth == "tree" else nodes - 1
    latency = (
        cluster.intra_node_latency_us * (local - 1) + cluster.inter_node_latency_us * steps
    ) * _MICRO
    return max(inside, between) + num_calls * (latency + cluster.collective_overhead_us * _MICRO)


def reduce_seconds(cluster: Cluster, num_gpus: int, num_bytes: float, num_calls: int = 1) -> float:
    """An all-reduce: a reduce-scatter and an all-gather."""
    return 2.0 * gather_seconds(cluster, num_gpus, num_bytes, num_calls)
