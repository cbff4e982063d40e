"""What DeepSpeed is told: its own configuration for a run."""

from typing import Any

import torch

from pipeline.run import RunConfig


def deepspeed_settings(config: RunConfig, device: torch.device) -> dict[str, Any]:
    """DeepSpeed's own configuration for a run."""
    on_gpu = device.type == "cuda"
    settings: dict[str, Any] = {
        # Stages change micro-batch and accumulation inside one run, so the loop counts both and
        # scales the loss; DeepSpeed sees steps of one micro-batch.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "zero_optimization": {
            "stage": config.zero.stage,
            # Gradients are reduced on a stream of their own while the backward pass goes on; a CPU
            # has no streams.
            "overlap_comm": on_gpu,
            "contiguous_gradients": True,
            "reduce_bucket_size": config.zero.reduce_bucket_size,
            "stage3_param_persistence_threshold": config.zero.persistence_threshold,
            "stage3_prefetch_bucket_size": config.zero.prefetch_bucket_size,
        },
        "bf16": {"enabled": config.precision == "bf16"},
        # Without ZeRO, DeepSpeed sums gradients in the numbers that it computes in.
        **({"data_types": {"grad_accum_dtype": "fp32"}} if config.zero.stage else {}),
        "gradient_clipping": config.optimizer.clip_gradient_norm or 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
        "checkpoint": {"tag_validation": "Fail"},
    }
    return settings
