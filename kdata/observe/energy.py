"""The devices that work ran on, and the energy that they report: nothing is estimated.

There are two counters, both kept by the device: NVML's total energy of a GPU (Volta and newer), and RAPL's energy of a CPU
package (Linux, /sys/class/powercap; most systems let only root read it). Both include everything that runs on the device,
also the work of others. Where a counter is absent, not readable, or fails midway, the energy is None: neither zero nor a
guess.
"""

from __future__ import annotations

import itertools
import os
import sys
from pathlib import Path
from typing import Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict

POWERCAP = Path("/sys/class/powercap")


class Devices(BaseModel):
    """Devices that work ran on."""

    model_config = ConfigDict(frozen=True, extra="ignore")
    kind: Literal["cpu", "gpu", "remote"]
    count: int
    """Cores that this process may use (cpu) or GPUs; 0 where the number is not known (a remote server)."""
    name: str
    here: bool = True
    """Whether they are in this machine; the energy of others is not metered."""

    def __str__(self) -> str:
        if self.kind == "cpu":
            return f"{self.count} {self.name}{'s' if self.count != 1 else ''}"
        return self.name if self.count < 2 else f"{self.count} x {self.name}"


def local_devices(gpus: int = 1) -> Devices:
    """The first `gpus` GPUs that this process may use, where its torch can use them; otherwise its CPU cores."""
    handles = _visible_gpus()[:gpus]
    if not handles:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return Devices(kind="cpu", count=cores, name="CPU core")
    return Devices(kind="gpu", count=len(handles), name=" + ".join(dict.fromkeys(_name(h) for h in handles)))


class _Counter(Protocol):
    def joules(self) -> float:
        """Joules since the counter was created. Raises OSError or an NVML error where it cannot be read."""
        ...


class RaplDomain:
    """The energy counter of one CPU package, or of its memory. It overflows within minutes at full power."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "energy_uj"
        self._range = int((folder / "max_energy_range_uj").read_text())
        self._last, self._total = int(self._file.read_text()), 0

    def joules(self) -> float:
        """See `_Counter`."""
        now = int(self._file.read_text())
        # It counts 0 ... range, so a wrap from `range` to 0 is one step.
        self._total += now - self._last if now >= self._last else now - self._last + self._range + 1
        self._last = now
        return self._total / 1e6


class _GpuCounter:
    """A GPU's own counter, in millijoules since the driver was loaded."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle
        self._first = self._read()

    def _read(self) -> int:
        import pynvml

        return int(pynvml.nvmlDeviceGetTotalEnergyConsumption(self._handle))

    def joules(self) -> float:
        """See `_Counter`."""
        return (self._read() - self._first) / 1e3


class Meter:
    """Energy of some devices since the meter was created.

    Args:
        devices: the devices to meter.
        powercap: the kernel's folder of RAPL domains.
    """

    def __init__(self, devices: Devices, powercap: Path = POWERCAP) -> None:
        self.devices = devices
        self._failures: tuple[type[Exception], ...] = (OSError, ValueError, *_nvml_errors())
        try:
            self._counters: list[_Counter] = []
            if devices.here and devices.kind == "cpu":
                self._counters = [RaplDomain(folder) for folder in rapl_folders(powercap)]
            elif devices.here and devices.kind == "gpu":
                handles = _visible_gpus()[: devices.count]
                self._counters = [] if None in handles else [_GpuCounter(handle) for handle in handles]
        except self._failures:
            self._counters = []

    def joules(self) -> float | None:
        """Joules so far; call it at least once a minute. None where the device does not report its energy."""
        try:
            return sum(counter.joules() for counter in self._counters) if self._counters else None
        except self._failures:
            self._counters = []  # a part of the energy is worthless: from now on it is not known
            return None


def rapl_folders(powercap: Path = POWERCAP) -> list[Path]:
    """RAPL domains that add up to the CPUs' energy: every package, and the memory that hangs on it and is not in it.

    `psys` (the whole board), `core` and `uncore` overlap with the packages and are left out.
    Source: Linux, Documentation/power/powercap/powercap.rst.
    """
    packages = [f for f in sorted(powercap.glob("intel-rapl:*")) if _domain(f).startswith("package")]
    inner = [d for f in packages for d in sorted(powercap.glob(f"{f.name}:*")) if _domain(d) == "dram"]
    return [*packages, *inner]


def _domain(folder: Path) -> str:
    try:
        return (folder / "name").read_text().strip()
    except OSError:
        return ""


def _nvml_errors() -> tuple[type[Exception], ...]:
    try:
        import pynvml
    except ImportError:
        return ()
    return (pynvml.NVMLError,)


def _visible_gpus() -> list[Any]:
    """GPUs that CUDA shows to this process, in its order: NVML's handle of each, None where it is not sure which one it is.

    None in all where torch cannot use GPUs. CUDA counts the fastest first and NVML by bus: an index means the same to both
    where all GPUs are of one kind, or CUDA_DEVICE_ORDER is PCI_BUS_ID.
    """
    torch = sys.modules.get("torch")
    if torch is None or torch.version.cuda is None or not _nvml_errors():
        return []
    import pynvml

    try:
        pynvml.nvmlInit()
        every = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        same = os.environ.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID" or len({_name(h) for h in every}) <= 1
        uuids = {_text(pynvml.nvmlDeviceGetUUID(h)): h for h in every}
    except pynvml.NVMLError:
        return []
    by_index = {str(i): h if same else None for i, h in enumerate(every)}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return list(by_index.values())
    named = itertools.takewhile(lambda part: part and not part.startswith("-"), map(str.strip, visible.split(",")))
    return [
        by_index.get(n) if n.isdigit() else next((h for u, h in uuids.items() if u.startswith(n)), None) for n in named
    ]


def _name(handle: Any) -> str:
    import pynvml

    return "GPU" if handle is None else _text(pynvml.nvmlDeviceGetName(handle))


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
