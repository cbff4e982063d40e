"""What a stage decides before its first step: recomputed blocks, kernels, compiled code."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, cast

import psutil
import torch
import torch.distributed as dist

from pipeline.engine.zero import ZeroEngine
from pipeline.environment import Launch
from pipeline.models.attention_choice import choose_attention
from pipeline.models.attention_kernels import Kernel
from pipeline.models.network import Network
from pipeline.plan.attention import attention_shapes
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
        recorded: What `chosen` was in each stage of an earlier attempt: kernels round differently,
            so a resumed run goes on with those it had, if it is on the same device.

    Attributes:
        recomputed: Blocks that are recomputed in the stage at hand.
        chosen: All that has been set for it, for the run's record.
        peak: What utilisation is a share of; None if nobody knows.
    """

    def __init__(
        self,
        config: RunConfig,
        launch: Launch,
        device: torch.device,
        engine: ZeroEngine,
        tracker: Tracker,
        recorded: Mapping[str, Any] | None = None,
    ) -> None:
        self._config, self._launch, self._device = config, launch, device
        self._engine, self._tracker = engine, tracker
        self._stage: int | None = None
        self._dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
        self.peak = find_peak(config.track.peak_tflops, device, self._dtype)
        self.recomputed = Recomputed()
        self.chosen: dict[str, Any] = {}
        self._recorded = recorded or {}

    def begin(self, place: StagePlace, step: int) -> bool:
        """Sets the networks for the step's stage, if it is not the last one's; all ranks call it.

        Recomputed activations are the same bit by bit; compiled code rounds in other places.

        Returns:
            Whether anything was set, which `chosen` then tells.
        """
        if self._stage == place.index:
            return False
        if self._stage is None and self.peak is not None:
            self._tracker.event("peak", tflops=self.peak.tflops, source=self.peak.source)
        self._stage = place.index
        if self._device.type == "cuda":
            # The peak of a stage, not of the largest one so far.
            torch.cuda.reset_peak_memory_stats(self._device)
        self._set_recomputed(place, step)
        if self._config.attention.backend == "fastest":
            self._set_kernels(place, step)
        if self._config.compile:
            self._compile(place)
        self.chosen = {
            "recomputed_blocks": asdict(self.recomputed),
            "attention": {name: one.backend for name, one in self._networks().items()},
            "compiled": self._config.compile,
            "device": self._device_name(),
        }
        return True

    def _networks(self) -> dict[str, Network]:
        modules = self._engine.objective.modules().items()
        return {name: one for name, one in modules if isinstance(one, Network)}

    def _set_kernels(self, place: StagePlace, step: int) -> None:
        """The kernels that are fastest on rank 0: with others of their own, ranks would wait."""
        chosen: list[dict[str, str] | None] = [None]
        if self._launch.rank == 0:
            chosen[0] = self._earlier_kernels(place) or self._time_kernels(place, step)
        dist.broadcast_object_list(chosen, src=0)
        for name, network in self._networks().items():
            network.backend = cast(Kernel, (chosen[0] or {}).get(name, "sdpa"))

    def _earlier_kernels(self, place: StagePlace) -> dict[str, str] | None:
        earlier = self._recorded.get(place.stage.name, {})
        return earlier.get("attention") if earlier.get("device") == self._device_name() else None

    def _device_name(self) -> str:
        is_gpu = self._device.type == "cuda"
        return torch.cuda.get_device_name(self._device) if is_gpu else self._device.type

    def _time_kernels(self, place: StagePlace, step: int) -> dict[str, str]:
        shapes = attention_shapes(self._config, place.index)
        choices = choose_attention(list(shapes.values()), self._device, self._dtype)
        for choice in choices:
            took = {one.kernel: one.milliseconds for one in choice.timings if one.milliseconds}
            self._tracker.event(
                "attention",
                step=step,
                calls=choice.shape.name,
                kernel=choice.kernel,
                milliseconds={name: round(ms, 3) for name, ms in took.items()},
            )
        return {name: one.kernel for name, one in zip(shapes, choices, strict=True)}

    def _compile(self, place: StagePlace) -> None:
        """Code for the stage's sizes: one for all steps where they cannot change."""
        is_constant = self._config.masks_of(place.stage).truncate == "fixed"
        for name, network in self._networks().items():
            # A teacher always sees whole clips.
            constant = is_constant or name == "teacher"
            network.compile_blocks(dynamic=False if constant else None)

    def _set_recomputed(self, place: StagePlace, step: int) -> None:
        wanted = self._config.recompute(place.stage)
        self.recomputed = self._choose(place)
        chosen = asdict(self.recomputed)
        for name, network in self._networks().items():
            network.num_recomputed_blocks = chosen.get(name, 0)
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
