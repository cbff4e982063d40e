"""The attention calls of a stage, as its masks make them."""

from pipeline.masks.sample import sample_masks
from pipeline.models.attention_choice import AttentionShape
from pipeline.plan.work import networks_of
from pipeline.run import RunConfig
from pipeline.stages import total_steps


def attention_shapes(config: RunConfig, stage_index: int) -> dict[str, AttentionShape]:
    """What the networks ask of attention in a stage's first micro-batch, by the network's name.

    Raises:
        ConfigError: The objective has other networks than these.
    """
    networks, stage = networks_of(config), config.stages[stage_index]
    grid = config.grid(stage.frames, stage.resolution)
    first = total_steps(config.stages[:stage_index]) * config.global_batch
    positions = range(first, first + stage.micro_batch)
    kept = [
        clip
        for mask in sample_masks(config.masks_of(stage), grid, config.seed, positions)
        for clip in mask.kept()
    ]
    encoder, predictor = networks.encoder.dims, networks.predictor.dims
    lengths = {
        "encoder": tuple(context for context, _ in kept),
        "predictor": tuple(context + target for context, target in kept),
        "teacher": (grid.num_tokens,) * stage.micro_batch,
    }
    return {
        name: AttentionShape(
            name=f"{stage.name}, {name}",
            lengths=found,
            heads=predictor.heads if name == "predictor" else encoder.heads,
            head_dim=predictor.head_dim if name == "predictor" else encoder.head_dim,
            packed=name != "teacher",
            backward=name != "teacher",
        )
        for name, found in lengths.items()
    }
