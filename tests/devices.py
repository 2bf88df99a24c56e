"""Devices that this machine does not have, as far as the choice of an implementation looks at them."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class FakeDevice:
    platform: str
    device_kind: str
    compute_capability: str | None = None


H100 = FakeDevice("gpu", "NVIDIA H100 80GB HBM3", "9.0")
B200 = FakeDevice("gpu", "NVIDIA B200", "10.0")
A100 = FakeDevice("gpu", "NVIDIA A100-SXM4-80GB", "8.0")
TPU = FakeDevice("tpu", "TPU v5 lite")
