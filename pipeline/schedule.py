"""Learning rate, weight decay and teacher momentum as functions of the step, nothing stored.

Formulas of the V-JEPA 2 trainer (arXiv 2506.09985, released code). A step is 1-based: the
reference's counter is incremented before it is used.
"""

import math
from typing import Literal, Self

from pydantic import Field, model_validator

from pipeline.config.section import Section


class LearningRate(Section):
    """The learning rate of one stage: a linear warm-up, then one of three shapes."""

    shape: Literal["constant", "linear", "cosine"]
    """After the warm-up: stay at the peak, or fall to the end on a line or a cosine."""
    peak: float = Field(gt=0.0)
    """Learning rate after the warm-up, or of the start if there is none."""
    start: float | None = Field(default=None, ge=0.0)
    """Learning rate that the warm-up begins from; needed if warmup_steps is above 0."""
    end: float | None = Field(default=None, ge=0.0)
    """Learning rate at the horizon; needed for the shapes linear and cosine."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps of linear warm-up at the start of the stage."""
    horizon_steps: int | None = Field(default=None, ge=1)
    """Step of the stage at which `end` is reached; the stage's last step if left out.

    Larger than the stage to stop early on the curve: the released V-JEPA 2 cooldown files run
    12,000 steps of a 15,000-step line and so end at 1.058e-4.
    """

    @model_validator(mode="after")
    def _nothing_missing_nothing_unread(self) -> Self:
        if self.warmup_steps and self.start is None:
            raise ValueError("start is missing: warmup_steps is above 0")
        if self.shape != "constant" and self.end is None:
            raise ValueError(f"end is missing: shape is {self.shape}")
        if not self.warmup_steps and self.start not in (None, self.peak):
            raise ValueError("start has no effect without warmup_steps: leave it out")
        if self.shape == "constant" and self.end not in (None, self.peak):
            raise ValueError("end has no effect with shape constant: leave it out")
        if self.shape == "constant" and self.horizon_steps is not None:
            raise ValueError("horizon_steps has no effect with shape constant: leave it out")
        return self

    def check(self, num_steps: int) -> None:
        """Raise ValueError if this does not fit a stage of `num_steps` steps."""
        if self.warmup_steps > num_steps:
            raise ValueError(
                f"warmup_steps is {self.warmup_steps}, more than the stage's {num_steps} steps"
            )
        if self.shape == "constant":
            return
        horizon = _horizon(self, num_steps)
        if horizon < num_steps:
            raise ValueError(
                f"horizon_steps is {horizon}, less than the stage's {num_steps} steps: "
                "the last steps would have no learning rate"
            )
        if self.warmup_steps >= horizon:
            raise ValueError(
                f"warmup_steps is {self.warmup_steps}: the shape {self.shape} has no step left; "
                "use the shape constant, a shorter warm-up or a longer horizon_steps"
            )


class Ramp(Section):
    """A value that changes over the whole run; constant if both ends are equal."""

    start: float = Field(ge=0.0)
    """Value at the beginning of the run."""
    end: float = Field(ge=0.0)
    """Value towards which it goes until the last step of the run."""
    stretch: float = Field(default=1.0, ge=1.0)
    """How many times longer than the run the way to `end` is; above 1 the run stops early on it.
    1.25 in V-JEPA's released files, whose weight decay of 0.04 to 0.4 so ends at 0.366."""


def learning_rate(config: LearningRate, step_in_stage: int, num_steps: int) -> float:
    """Learning rate of a step.

    With s the step, W the warm-up, H the horizon: start + s/W (peak − start) for s < W; then
    constant: peak; linear: peak + (s−W)/(H−W) (end − peak); cosine:
    end + ½ (peak − end) (1 + cos(π (s−W)/(H−W))).

    Args:
        config: The stage's learning rate.
        step_in_stage: 1-based step of the stage.
        num_steps: Steps of the stage.

    Raises:
        ValueError: The step is not one of the stage's.
    """
    _check_step(step_in_stage, num_steps)
    warmup = config.warmup_steps
    if step_in_stage < warmup:
        start = config.peak if config.start is None else config.start
        return start + step_in_stage / warmup * (config.peak - start)
    if config.shape == "constant":
        return config.peak
    end = config.peak if config.end is None else config.end
    progress = (step_in_stage - warmup) / (_horizon(config, num_steps) - warmup)
    if config.shape == "linear":
        return config.peak + progress * (end - config.peak)
    return end + 0.5 * (config.peak - end) * (1.0 + math.cos(math.pi * progress))


def cosine(ramp: Ramp, step: int, total: int) -> float:
    """Half a cosine that ends at step `total` · stretch; weight decay goes this way.

    end + ½ (start − end) (1 + cos(π · step/(total · stretch))), step 1-based.
    """
    _check_step(step, total)
    progress = step / (total * ramp.stretch)
    return ramp.end + 0.5 * (ramp.start - ramp.end) * (1.0 + math.cos(math.pi * progress))


def linear(ramp: Ramp, step: int, total: int) -> float:
    """A straight line; the teacher's momentum goes this way.

    start + (step − 1)/(total · stretch) · (end − start), step 1-based: the reference takes the
    first value before it counts, so step 1 is exactly `start`.
    """
    _check_step(step, total)
    return ramp.start + (step - 1) / (total * ramp.stretch) * (ramp.end - ramp.start)


def _horizon(config: LearningRate, num_steps: int) -> int:
    return num_steps if config.horizon_steps is None else config.horizon_steps


def _check_step(step: int, total: int) -> None:
    if not 1 <= step <= total:
        raise ValueError(f"step {step} is not one of 1 … {total}")
