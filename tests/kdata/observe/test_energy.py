"""What work ran on and the energy it took: counters that wrap, that overlap, that cannot be read, and GPUs by a stand-in.

No GPU and no RAPL are at hand where tests run: the kernel's files are written by the test, and `StandInNvml` speaks NVML.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pynvml
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdata.observe.energy import Devices, Meter, RaplDomain, local_devices, rapl_folders

RANGE_UJ = 262_143_328_850
CPU = Devices(kind="cpu", count=2, name="CPU core")


def domain(powercap: Path, name: str, label: str, energy_uj: int = 0) -> Path:
    """One RAPL domain as the kernel shows it."""
    folder = powercap / name
    folder.mkdir(parents=True)
    (folder / "name").write_text(f"{label}\n")
    (folder / "max_energy_range_uj").write_text(f"{RANGE_UJ}\n")
    (folder / "energy_uj").write_text(f"{energy_uj}\n")
    return folder


def use(folder: Path, joules: float) -> None:
    """Let a domain use energy; its counter wraps."""
    path = folder / "energy_uj"
    path.write_text(f"{(int(path.read_text()) + round(joules * 1e6)) % (RANGE_UJ + 1)}\n")


def test_packages_and_their_memory_are_added_and_overlapping_domains_left_out(tmp_path: Path) -> None:
    first, second = domain(tmp_path, "intel-rapl:0", "package-0"), domain(tmp_path, "intel-rapl:1", "package-1", 5)
    memory = domain(tmp_path, "intel-rapl:0:1", "dram")
    core, board = domain(tmp_path, "intel-rapl:0:0", "core"), domain(tmp_path, "intel-rapl:2", "psys")
    assert rapl_folders(tmp_path) == [first, second, memory]
    meter = Meter(CPU, tmp_path)
    assert meter.joules() == 0.0
    for folder, joules in ((first, 100.0), (second, 50.0), (memory, 7.0), (core, 80.0), (board, 300.0)):
        use(folder, joules)
    assert meter.joules() == 157.0


@given(steps=st.lists(st.integers(0, RANGE_UJ), max_size=20), start=st.integers(0, RANGE_UJ))
def test_a_counter_that_wraps_loses_nothing(
    tmp_path_factory: pytest.TempPathFactory, steps: list[int], start: int
) -> None:
    """Any use of up to a whole range between two readings is seen exactly."""
    folder = domain(tmp_path_factory.mktemp("rapl"), "intel-rapl:0", "package-0", start)
    counter = RaplDomain(folder)
    for number, step in enumerate(steps, 1):
        use(folder, step / 1e6)
        assert counter.joules() == pytest.approx(sum(steps[:number]) / 1e6, rel=1e-12)


def test_energy_without_a_counter_is_unknown_not_zero(tmp_path: Path) -> None:
    assert Meter(CPU, tmp_path / "none").joules() is None
    domain(tmp_path, "intel-rapl:2", "psys")
    assert Meter(CPU, tmp_path).joules() is None


def test_energy_of_some_packages_only_is_unknown(tmp_path: Path) -> None:
    """As where only root may read one of them."""
    domain(tmp_path, "intel-rapl:0", "package-0")
    second = domain(tmp_path, "intel-rapl:1", "package-1")
    (second / "energy_uj").unlink()
    assert Meter(CPU, tmp_path).joules() is None


def test_a_counter_that_fails_midway_makes_the_energy_unknown(tmp_path: Path) -> None:
    folder = domain(tmp_path, "intel-rapl:0", "package-0")
    meter = Meter(CPU, tmp_path)
    use(folder, 3.0)
    assert meter.joules() == 3.0
    (folder / "energy_uj").write_text("")
    assert meter.joules() is None
    (folder / "energy_uj").write_text("9000000")
    assert meter.joules() is None, "what went by unseen is not made up"


def test_devices_of_another_machine_are_not_metered(tmp_path: Path) -> None:
    domain(tmp_path, "intel-rapl:0", "package-0")
    assert Meter(CPU.model_copy(update={"here": False}), tmp_path).joules() is None


# ---------------------------------------------------------------------------------------------------- GPUs


class StandInNvml(ModuleType):
    """Stands in for the module `pynvml` on a machine with these GPUs; `millijoules` are their counters."""

    NVMLError = pynvml.NVMLError

    def __init__(self, names: list[str]) -> None:
        super().__init__("pynvml")
        self.names, self.millijoules = names, [1000 * i for i in range(len(names))]
        self.refuses = False

    def nvmlInit(self) -> None:
        if not self.names:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    def nvmlDeviceGetCount(self) -> int:
        return len(self.names)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetName(self, handle: int) -> str:
        return self.names[handle]

    def nvmlDeviceGetUUID(self, handle: int) -> bytes:
        return f"GPU-{handle}{handle}-x".encode()

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: int) -> int:
        if self.refuses:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return self.millijoules[handle]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> StandInNvml:
    """A machine with four GPUs of one kind, and a torch that can use them."""
    nvml = StandInNvml(["H200"] * 4)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(version=SimpleNamespace(cuda="12.8")))
    for name in ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"):
        monkeypatch.delenv(name, raising=False)
    return nvml


def test_the_energy_of_the_gpus_in_use(machine: StandInNvml) -> None:
    devices = local_devices(2)
    assert devices == Devices(kind="gpu", count=2, name="H200") and str(devices) == "2 x H200"
    meter = Meter(devices)
    machine.millijoules = [5_000, 3_500, 10**9, 10**9]
    assert meter.joules() == 7.5
    machine.refuses = True
    assert meter.joules() is None
    assert Meter(devices).joules() is None


@pytest.mark.parametrize(
    ("visible", "count", "joules"),
    [("2", 1, 2.0), ("3,1", 2, 4.0), ("GPU-22,GPU-11-x", 2, 3.0), ("1,-1,2", 1, 1.0), ("9", 1, None),
     ("MIG-1", 1, None)],
)  # fmt: skip
def test_visible_gpus_are_those_that_cuda_shows(
    machine: StandInNvml, monkeypatch: pytest.MonkeyPatch, visible: str, count: int, joules: float | None
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    devices = local_devices(8)
    assert (devices.kind, devices.count) == ("gpu", count)
    meter = Meter(devices)
    machine.millijoules = [2000 * i for i in range(4)]
    assert meter.joules() == joules


def test_gpus_that_cannot_be_identified_are_counted_but_not_metered(
    machine: StandInNvml, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.names[0] = "A10"
    assert local_devices(2) == Devices(kind="gpu", count=2, name="GPU")
    assert Meter(local_devices(1)).joules() is None
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    assert local_devices(2) == Devices(kind="gpu", count=2, name="A10 + H200")
    assert Meter(local_devices(1)).joules() == 0.0


@pytest.mark.parametrize("why", ["asked for none", "hidden", "none there", "a torch for CPUs", "no torch"])
def test_without_a_gpu_it_is_the_cores(machine: StandInNvml, monkeypatch: pytest.MonkeyPatch, why: str) -> None:
    gpus = 0 if why == "asked for none" else 1
    if why == "hidden":
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    elif why == "none there":
        machine.names = []
    elif why == "a torch for CPUs":
        sys.modules["torch"].version.cuda = None  # type: ignore[attr-defined]
    elif why == "no torch":
        monkeypatch.delitem(sys.modules, "torch")
    devices = local_devices(gpus)
    assert devices.kind == "cpu" and devices.count >= 1 and "CPU core" in str(devices)
