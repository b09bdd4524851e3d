"""GPUs that a plan can be made for: what their data sheets say, and nothing that was measured here.

Bandwidths are those of one GPU in one direction. Nodes are NVIDIA's HGX/DGX ones of 8 GPUs, with one network adapter
for each GPU.
"""

from dataclasses import dataclass

from megatron_l0moe.errors import L0MoEError, nearest

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One GPU and its connections."""

    name: str
    bf16_flops: float
    """Peak of dense bf16 matrix products, FLOP/s."""
    memory: int
    """Bytes, as `nvidia-smi` counts them."""
    memory_bandwidth: float
    """Bytes/s."""
    nvlink: float
    """Bytes/s to the other GPUs of the node, in one direction."""
    network: float
    """Bytes/s to other nodes, in one direction."""
    source: str

    @property
    def usable(self) -> int:
        """Bytes for what a plan counts, without the reserve."""
        return int((self.memory - RESERVED_BYTES) * (1.0 - FRAGMENTATION))


RESERVED_BYTES = 3 * GIB
"""CUDA context, nccl's and cuBLAS' buffers: an assumption, not measured here."""
FRAGMENTATION = 0.05
"""Share of the rest that the allocator cannot use: an assumption, not measured here."""
GPUS_PER_NODE = 8

GPUS = {
    "h100": Gpu(
        name="H100 SXM 80 GB",
        bf16_flops=989.4e12,
        memory=81559 * 2**20,
        memory_bandwidth=3.35e12,
        nvlink=450e9,
        network=50e9,
        source="NVIDIA H100 Tensor Core GPU data sheet (SXM, without sparsity); DGX H100: 8 x 400 Gb/s",
    ),
    "h200": Gpu(
        name="H200 SXM 141 GB",
        bf16_flops=989.4e12,
        memory=143771 * 2**20,
        memory_bandwidth=4.8e12,
        nvlink=450e9,
        network=50e9,
        source="NVIDIA H200 Tensor Core GPU data sheet (SXM, without sparsity); DGX H200: 8 x 400 Gb/s",
    ),
    "a100": Gpu(
        name="A100 SXM 80 GB",
        bf16_flops=312e12,
        memory=81920 * 2**20,
        memory_bandwidth=2.039e12,
        nvlink=300e9,
        network=25e9,
        source="NVIDIA A100 Tensor Core GPU data sheet (SXM 80 GB); DGX A100: 8 x 200 Gb/s",
    ),
}

DEVICE_NAMES = {
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H200": "h200",
    "NVIDIA A100-SXM4-80GB": "a100",
    "NVIDIA A100-SXM4-40GB": "a100",
    "NVIDIA A100 80GB PCIe": "a100",
    "NVIDIA A100-PCIE-40GB": "a100",
}
"""What the driver calls the GPUs whose peak is that of an entry of `GPUS`; H100 PCIe, for one, is slower."""


def gpu_of_device(name: str) -> Gpu | None:
    """Return the GPU with the peak of the device that the driver calls `name`, None for any other."""
    return GPUS[DEVICE_NAMES[name]] if name in DEVICE_NAMES else None


def find_gpu(name: str) -> Gpu:
    """Return a GPU by its short name."""
    if name.lower() not in GPUS:
        raise L0MoEError(f"There is no GPU {name!r}{nearest(name, GPUS)}; known are {', '.join(GPUS)}.")
    return GPUS[name.lower()]
