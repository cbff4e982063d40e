"""A cluster in numbers, for `jepa plan --cluster FILE` and `jepa check --cluster FILE`.

Every number can be replaced by one that was measured; `jepa check` prints the measured bandwidths
in the same units.
"""

from typing import ClassVar, Literal

from pydantic import Field

from pipeline.config.section import Section


class Cluster(Section):
    """One kind of nodes, their network, storage and price."""

    keys_are_in: ClassVar[str] = "`jepa config schema --of cluster` lists every key"
    has_shipped_files: ClassVar[bool] = False

    name: str = "H100 SXM, 8 a node, 8 × 400 Gb/s InfiniBand"
    """What tables call it."""
    gpus_per_node: int = Field(default=8, ge=1)
    """GPUs of a node; on a CPU cluster, ranks of a node."""
    peak_tflops: float = Field(default=989.0, gt=0.0)
    """Dense peak of one GPU in the run's precision, in TFLOP/s."""
    memory_gib: float = Field(default=80.0, gt=0.0)
    """Memory of one GPU."""
    best_efficiency: float = Field(default=0.33, gt=0.0, le=1.0)
    """Share of the peak that very large micro-batches compute at, communication aside and
    recomputed activations included: 0.29 was reached by another trainer's ViT-g on H100s, 0.33 to
    0.39 by language models of 8 billion parameters. `jepa bench step` measures yours."""
    half_tokens: float = Field(default=4000.0, ge=0.0)
    """Encoder tokens of a micro-batch at which half of `best_efficiency` is reached: smaller
    kernels leave a GPU idle between and within them."""
    update_ns_per_parameter: float = Field(default=0.05, ge=0.0)
    """Nanoseconds that optimiser and teacher take for each parameter that a rank updates."""
    step_overhead_ms: float = Field(default=15.0, ge=0.0)
    """Milliseconds of every step that neither compute nor communicate: agreement, launches."""
    micro_batch_overhead_ms: float = Field(default=5.0, ge=0.0)
    """Milliseconds that every micro-batch takes however small it is."""
    intra_node_gb_per_second: float = Field(default=350.0, gt=0.0)
    """Bus bandwidth of an all-gather or reduce-scatter of large tensors within a node, in GB/s for
    each GPU, as nccl-tests and `jepa check` print it."""
    inter_node_gb_per_second: float = Field(default=320.0, gt=0.0)
    """What a node sends and receives in a collective over all its network cards, in GB/s."""
    intra_node_latency_us: float = Field(default=6.0, ge=0.0)
    """Microseconds that every GPU of a node adds to a collective."""
    inter_node_latency_us: float = Field(default=10.0, ge=0.0)
    """Microseconds that a step of a collective between nodes takes."""
    collective_growth: Literal["ring", "tree"] = "tree"
    """How steps between nodes grow: `ring` with their number, `tree` with its logarithm, which
    NCCL's tree and PAT algorithms reach."""
    collective_overhead_us: float = Field(default=60.0, ge=0.0)
    """Microseconds of the host for each collective that ZeRO-3 starts, hidden like its transfer."""
    overlap: float = Field(default=0.85, ge=0.0, le=1.0)
    """Share of the communication that can run beside the computation of the same pass."""
    storage_write_gb_per_second: float = Field(default=40.0, gt=0.0)
    """What all nodes together write to the run's storage, in GB/s."""
    node_write_gb_per_second: float = Field(default=4.0, gt=0.0)
    """What one node writes to it, in GB/s."""
    host_copy_gb_per_second: float = Field(default=20.0, gt=0.0)
    """Copy from one GPU to host memory, in GB/s, which a background save begins with."""
    cores_per_gpu: float = Field(default=12.0, gt=0.0)
    """Processor cores for each GPU that loader workers can have."""
    decoded_frames_per_core_second: float = Field(default=500.0, gt=0.0)
    """Frames that one core reads, decodes and crops in a second: `jepa bench loader` measures it;
    videos of a short side of 256 to 340 pixels in H.264 give 400 to 900."""
    price_per_gpu_hour: float = Field(default=2.5, ge=0.0)
    """Price of a GPU for an hour, in the currency of your contract."""
    gpu_hours_between_failures: float = Field(default=50_700.0, gt=0.0)
    """GPU-hours between two failures that end a job: 419 in 54 days on 16,384 GPUs were seen
    (The Llama 3 Herd of Models, 2024, section 3.3.4)."""
    restart_seconds: float = Field(default=300.0, ge=0.0)
    """From a failure to the first resumed step: noticing it, queue, start, loading."""
