"""What a stage decides for itself before its first step: recomputed blocks."""

from dataclasses import asdict

import psutil
import torch
import torch.distributed as dist

from pipeline.engine.zero import ZeroEngine
from pipeline.environment import Launch
from pipeline.models.network import Network
from pipeline.plan.recompute import Recomputed, recomputed_for
from pipeline.plan.work import sample_kept_tokens, summarise
from pipeline.run import RunConfig
from pipeline.stages import StagePlace
from pipeline.track.peaks import find_peak
from pipeline.track.sinks import Tracker


class StageTuner:
    """Sets the networks for a stage and records what it has set.

    Every rank has one and all come to the same, since they decide on the least memory of all.

    Args:
        config: The run.
        launch: This process's place among the ranks.
        device: This rank's device.
        engine: Whose networks are set.
        tracker: Where the choice is recorded.

    Attributes:
        recomputed: Blocks that are recomputed in the stage at hand.
        peak: What utilisation is a share of; None if nobody knows.
    """

    def __init__(
        self,
        config: RunConfig,
        launch: Launch,
        device: torch.device,
        engine: ZeroEngine,
        tracker: Tracker,
    ) -> None:
        self._config, self._launch, self._device = config, launch, device
        self._engine, self._tracker = engine, tracker
        self._stage: int | None = None
        dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
        self.peak = find_peak(config.track.peak_tflops, device, dtype)
        self.recomputed = Recomputed()

    def begin(self, place: StagePlace, step: int) -> None:
        """Sets the networks for the step's stage, if it is not the last one's; all ranks call it.

        Neither choice changes what is computed: recomputed activations are the same bit by bit.
        """
        if self._stage == place.index:
            return
        if self._stage is None and self.peak is not None:
            self._tracker.event("peak", tflops=self.peak.tflops, source=self.peak.source)
        self._stage = place.index
        if self._device.type == "cuda":
            # The peak of a stage, not of the largest one so far.
            torch.cuda.reset_peak_memory_stats(self._device)
        self._set_recomputed(place, step)

    def _set_recomputed(self, place: StagePlace, step: int) -> None:
        wanted = self._config.recompute(place.stage)
        self.recomputed = self._choose(place)
        chosen = asdict(self.recomputed)
        for name, network in self._engine.objective.modules().items():
            if name in chosen and isinstance(network, Network):
                network.num_recomputed_blocks = chosen[name]
        if wanted == "auto":
            self._tracker.event(
                "recompute", step=step, stage=place.stage.name, **asdict(self.recomputed)
            )

    def _choose(self, place: StagePlace) -> Recomputed:
        config, stage = self._config, place.stage
        if config.recompute(stage) is False:
            return Recomputed()
        masks, memory = (), 0.0
        if config.recompute(stage) == "auto":
            masks = summarise(sample_kept_tokens(config, place.index))
            memory = self._least_memory()
        return recomputed_for(config, stage, masks, memory, self._launch.world_size)

    def _least_memory(self) -> float:
        """Bytes that this process can have, all in all, on the rank that can have least."""
        least = torch.tensor(self._own_memory(), dtype=torch.float64, device=self._device)
        dist.all_reduce(least, op=dist.ReduceOp.MIN)
        return float(least)

    def _own_memory(self) -> float:
        if self._device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self._device)
            return float(free + torch.cuda.memory_reserved(self._device))
        available = psutil.virtual_memory().available / self._launch.local_world_size
        return available + psutil.Process().memory_info().rss
