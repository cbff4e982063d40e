"""Whether the ranks that training will have can share the global batch."""

from collections.abc import Sequence

from launch.preflight.finding import Answer, Finding, Situation
from pipeline.errors import ConfigError
from pipeline.stages import accumulation

NAME = "global batch"
RANKS = "ranks"


def ranks_finding(situation: Situation) -> Finding:
    """How many ranks this node will have."""
    return Finding(name=RANKS, state="ok", values={situation.node: situation.ranks_here})


def compare_batch(situation: Situation, answers: Sequence[Answer]) -> Finding:
    """Every stage's global batch in whole micro-batches on all ranks."""
    config = situation.config
    by_node: dict[str, int] = {}
    for one in answers:
        found = one.of(RANKS)
        by_node.update(found.values if found else {})
    ranks = max(sum(by_node.values()), situation.launch.world_size)
    expected = f"{config.global_batch} clips on {ranks} rank(s) in every stage"
    try:
        counts = [accumulation(stage, config.global_batch, ranks) for stage in config.stages]
    except ConfigError as error:
        return Finding(
            name=NAME, state="fail", expected=expected, got=str(error), remedy=error.remedy
        )
    got = ", ".join(
        f"{stage.name} {count} × {stage.micro_batch}"
        for stage, count in zip(config.stages, counts, strict=True)
    )
    return Finding(name=NAME, state="ok", expected=expected, got=got)
