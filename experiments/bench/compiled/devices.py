"""The devices that are compiled for: what XLA needs to know of them, and what they can do.

Bandwidths and rates are those that the makers state: NVIDIA's data sheet of the H100 SXM, and
https://cloud.google.com/tpu/docs for v5e, v5p and v6e. A rate is of matrix products of bfloat16 and
dense, a link's bandwidth of all links of a device in one direction.
"""

from pathlib import Path
from typing import Any, NamedTuple

H100_TEXT = Path(__file__).with_name("h100.txtpb")
"""A description of the H100 as XLA's `gpu_target_config` takes it."""

GPU_FLAGS = "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"
"""XLA_FLAGS without which products are tuned by running them, which needs a device."""


class Device(NamedTuple):
    """A kind of device.

    Attributes:
      title: what tables call it.
      platform: "cuda" or "tpu".
      one: topology of a single one; a TPU's has as many as a host.
      bytes_per_s: of main memory.
      operations_per_s: of matrix products.
      link_bytes_per_s: to other devices.
      memory_bytes: that it has.
      cache_bytes: of the second-level cache, one core's part; 0 where there is none.
    """

    title: str
    platform: str
    one: str
    bytes_per_s: float
    operations_per_s: float
    link_bytes_per_s: float
    memory_bytes: float
    cache_bytes: float = 0


DEVICES = {
    "h100": Device("H100", "cuda", "1x1x1", 3.35e12, 989e12, 450e9, 85e9, 52_428_800 / 132),
    "v5e": Device("TPU v5e", "tpu", "2x2", 0.819e12, 197e12, 100e9, 16e9),
    "v5p": Device("TPU v5p", "tpu", "2x2x1", 2.765e12, 459e12, 300e9, 95e9),
    "v6e": Device("TPU v6e", "tpu", "2x2", 1.64e12, 918e12, 224e9, 32e9),
}


def topology(kind: str, shape: str = "") -> list[Any]:
    """Devices of a kind that are not there, to compile for.

    Args:
      kind: a key of `DEVICES`.
      shape: of the slice, such as "4x4" or "1x1x8"; "" = one device.

    Raises:
      ValueError: for an unknown kind.
    """
    from jax.experimental import topologies

    if kind not in DEVICES:
        raise ValueError(f"device: found {kind!r}, expected one of {', '.join(DEVICES)}.")
    device = DEVICES[kind]
    if device.platform == "cuda":
        found = topologies.get_topology_desc(
            "described",
            "cuda",
            target_config=H100_TEXT.read_text("utf-8"),
            topology=shape or device.one,
        )
    else:
        found = topologies.get_topology_desc(
            platform="tpu", topology_name=f"{kind}:{shape or device.one}"
        )
    return list(found.devices) if shape else [found.devices[0]]
