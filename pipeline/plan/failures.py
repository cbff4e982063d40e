"""What saving, failures and restarts take of a run's time."""

from dataclasses import dataclass

from pipeline.checkpoint.interval import derive_interval
from pipeline.plan.cluster import Cluster
from pipeline.plan.saving import checkpoint_bytes, planned_interval_seconds
from pipeline.plan.steptime import StepTime
from pipeline.run import RunConfig

_GIGA = 1e9
_HOUR = 3600.0
# Agreeing and the copy's last piece: training stood still for 7 ms where it was measured.
_LEAST_STALL_SECONDS = 0.01


@dataclass(frozen=True, kw_only=True, slots=True)
class Losses:
    """Shares of the time, of a run of so many GPUs."""

    hours_between_failures: float
    checkpoint_seconds: float
    """From the beginning of a save to its publication."""
    stall_seconds: float
    """Of it what training stands still for."""
    interval_seconds: float
    stalled_share: float
    repeated_share: float
    """Steps that are taken again after a failure."""
    restart_share: float

    @property
    def goodput(self) -> float:
        """Share of the time that goes into steps that count."""
        return 1.0 / (1.0 + self.stalled_share + self.repeated_share + self.restart_share)


def losses(config: RunConfig, step: StepTime, cluster: Cluster, num_gpus: int) -> Losses:
    """What is lost beside the steps of a stage, for each second of them.

    A failure comes every M = hours between failures of one GPU / GPUs. It loses half an interval T
    and the save in flight, and costs a restart; each save costs its stall s: s/T + (T/2 + save)/M
    + restart/M. T is the configuration's, or the one that the run derives itself.
    """
    between = cluster.gpu_hours_between_failures / num_gpus
    nodes = -(-num_gpus // cluster.gpus_per_node)
    rate = min(cluster.storage_write_gb_per_second, nodes * cluster.node_write_gb_per_second)
    # A copy holds all the fp32 state of a rank.
    copy = checkpoint_bytes(config) / num_gpus / (cluster.host_copy_gb_per_second * _GIGA)
    save = copy + checkpoint_bytes(config) / (rate * _GIGA)
    stall = save
    if config.checkpoint.background:
        stall = max(_LEAST_STALL_SECONDS, copy - step.gradient_seconds)
    interval = planned_interval_seconds(config.checkpoint, step.seconds)
    if interval is None:
        interval = derive_interval(stall, save, between).seconds
    # A save that is still being written makes the next one wait.
    stall += max(0.0, save - interval)
    failure = between * _HOUR
    return Losses(
        hours_between_failures=between,
        checkpoint_seconds=save,
        stall_seconds=stall,
        interval_seconds=interval,
        stalled_share=stall / interval,
        repeated_share=(interval / 2.0 + save) / failure,
        restart_share=cluster.restart_seconds / failure,
    )
