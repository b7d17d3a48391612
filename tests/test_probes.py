"""Probes on recorded output: what a host's tools say, and nothing where they say nothing."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from hpcmlx.probes.commands import read_command
from hpcmlx.probes.hardware import (
    Hardware,
    linux_hardware,
    mac_hardware,
    neural_accelerators,
    parse_hardware,
    parse_sysctl,
    probe_hardware,
)
from hpcmlx.probes.interfaces import (
    linux_kind,
    mac_kind,
    parse_bridge_members,
    parse_hardware_ports,
    probe_interfaces,
)
from hpcmlx.probes.thunderbolt import (
    Port,
    parse_ibv_devices,
    parse_rdma_status,
    parse_thunderbolt,
)
from hpcmlx.probes.wheel import has_accelerator_kernels, has_jaccl, parse_wheel_tags

RECORDED = Path(__file__).parent / "recorded"


def recorded(name: str) -> str:
    return (RECORDED / name).read_text()


def ports_of(host: str) -> tuple[Port, ...]:
    interfaces = parse_hardware_ports(recorded(f"hardware_ports_{host}.txt"))
    return parse_thunderbolt(recorded(f"thunderbolt_{host}.json"), interfaces)


# -- chip, memory, system --


def test_a_mac():
    profile = parse_hardware(recorded("hardware_studio.json"))
    sysctls = parse_sysctl(recorded("sysctl_studio.txt"))
    assert mac_hardware(profile, sysctls, recorded("sw_vers_studio.txt")) == Hardware(
        system="macOS 26.2 (25C56)",
        macos=(26, 2),
        chip="Apple M3 Ultra",
        model="Mac Studio (Mac15,14)",
        memory_bytes=512 << 30,
        wired_limit_bytes=0,
    )


def test_a_mac_whose_profiler_does_not_answer():
    sysctls = parse_sysctl("machdep.cpu.brand_string: Apple M4\niogpu.wired_limit_mb: 24576\n")
    found = mac_hardware(parse_hardware("{"), sysctls, None)
    assert found == Hardware(chip="Apple M4", wired_limit_bytes=24 << 30)


def test_memory_is_what_the_profiler_says_where_sysctl_is_silent():
    found = mac_hardware(parse_hardware(recorded("hardware_studio.json")), {}, None)
    assert found.memory_bytes == 512 << 30


def test_serial_numbers_are_not_kept():
    kept = parse_hardware(recorded("hardware_studio.json"))
    assert not {"serial_number", "platform_UUID", "provisioning_UDID"} & kept.keys()


def test_a_linux_host():
    files = [recorded(f"{n}_linux.txt") for n in ("os_release", "cpuinfo", "meminfo")]
    assert linux_hardware(files[0], "6.1.0-40-amd64\n", *files[1:]) == Hardware(
        system="Debian GNU/Linux 12 (bookworm), Linux 6.1.0-40-amd64",
        chip="AMD EPYC",
        memory_bytes=24683656 << 10,
    )


def test_nothing_known_is_none():
    assert linux_hardware(None, None, None, None) == mac_hardware({}, {}, None) == Hardware()


@pytest.mark.skipif(sys.platform != "linux", reason="asks a Linux host")
def test_this_host():
    found = probe_hardware("linux")
    assert found.system and "Linux" in found.system and found.memory_bytes
    assert ("lo", "loopback") in [(i.name, i.kind) for i in probe_interfaces("linux", {}, ())]


# -- Thunderbolt --


def test_ports_and_what_is_at_the_other_end():
    seen = {
        port.receptacle: (port.interface, port.kind, port.peer is not None, port.through)
        for port in ports_of("studio")
    }
    assert seen == {
        "1": ("en2", "Thunderbolt 5", False, ""),  # nothing plugged in: what the port can do
        "2": ("en3", "Thunderbolt 5", True, ""),
        "3": ("en4", "Thunderbolt 4", True, "Disk Tower"),
        "4": ("en5", "Thunderbolt 5", False, ""),  # a dock, no Mac
        "5": ("en6", "Thunderbolt 5", False, ""),
        "6": ("en7", "Thunderbolt 5", False, ""),
    }
    assert [p.receptacle for p in ports_of("studio") if p.connected] == ["2", "3", "4"]


def test_rdma_only_over_a_cable_straight_to_a_mac_at_full_speed():
    devices = {port.receptacle: port.rdma_device for port in ports_of("studio")}
    assert devices == {"1": None, "2": "rdma_en3", "3": None, "4": None, "5": None, "6": None}
    assert [port.rdma_device for port in ports_of("macbook")] == ["rdma_en1", None, None]


@pytest.mark.parametrize(
    "text", [None, "", "no such thing", "[]", "{}", '{"SPThunderboltDataType": [{}]}']
)
def test_no_ports_without_an_answer(text):
    assert parse_thunderbolt(text, {}) == ()


def test_a_port_without_an_interface_has_no_device():
    ports = parse_thunderbolt(recorded("thunderbolt_studio.json"), {})
    assert len(ports) == 6 and not any(p.interface or p.rdma_device for p in ports)


def test_rdma_tools():
    assert parse_rdma_status(recorded("rdma_status_studio.txt")) is True
    assert parse_rdma_status("disabled\n") is False
    assert parse_rdma_status(None) is parse_rdma_status("rdma_ctl: not found") is None
    assert parse_ibv_devices(recorded("ibv_devices_studio.txt")) == tuple(
        f"rdma_en{n}" for n in range(2, 8)
    )
    assert parse_ibv_devices(recorded("ibv_devices_off.txt")) == parse_ibv_devices(None) == ()


# -- interfaces --


@pytest.mark.parametrize(
    ("host", "name", "kind"),
    [
        ("studio", "en0", "Ethernet"),
        ("studio", "en8", "Ethernet"),
        ("studio", "en1", "Wi-Fi"),
        ("studio", "en3", "Thunderbolt 5"),
        ("studio", "en4", "Thunderbolt 4"),
        ("studio", "lo0", "loopback"),
        ("studio", "utun4", "virtual"),
        ("studio", "bridge100", "virtual"),
        ("studio", "en99", "unknown"),
        ("macbook", "en10", "Ethernet"),
        # Both cables are in the bridge: the slow one counts.
        ("macbook", "bridge0", "Thunderbolt 4"),
    ],
)
def test_kinds_of_a_mac(host, name, kind):
    hardware_ports = parse_hardware_ports(recorded(f"hardware_ports_{host}.txt"))
    bridges = parse_bridge_members(recorded("ifconfig_macbook.txt"))
    assert mac_kind(name, hardware_ports, ports_of(host), bridges) == kind


def test_members_of_a_bridge():
    assert parse_bridge_members(recorded("ifconfig_macbook.txt")) == {
        "bridge0": ("en1", "en6", "en2")
    }
    assert parse_bridge_members(None) == {}


def test_thunderbolt_of_unknown_speed_is_not_guessed():
    ports = {"Thunderbolt 1": "en1", "Thunderbolt Bridge": "bridge0"}
    assert mac_kind("en1", ports, (), {}) == "Thunderbolt"
    assert mac_kind("bridge0", ports, (), {"bridge0": ("en1",)}) == "Thunderbolt"


def sysfs(root: Path, name: str, *, kind: str = "1", driver: str | None, **files: str) -> None:
    """An entry of /sys/class/net as the kernel makes it."""
    device = root / "devices" / name
    service = device / "service"
    service.mkdir(parents=True)
    place = root / "net" / name
    place.mkdir(parents=True)
    (place / "type").write_text(f"{kind}\n")
    if driver is not None:
        (root / "drivers" / driver).mkdir(parents=True)
        (service / "driver").symlink_to(root / "drivers" / driver)
        (place / "device").symlink_to(service)
    for file, text in files.items():
        (device / file).write_text(f"{text}\n")


def test_kinds_of_a_linux_host(tmp_path):
    sysfs(tmp_path, "lo", kind="772", driver=None)
    sysfs(tmp_path, "eth0", driver="virtio_net")
    sysfs(tmp_path, "wlp2s0", driver="iwlwifi")
    (tmp_path / "net" / "wlp2s0" / "phy80211").mkdir()
    sysfs(tmp_path, "docker0", driver=None)
    sysfs(tmp_path, "ib0", kind="32", driver="mlx5_core")
    link = {"rx_speed": "20.0 Gb/s", "rx_lanes": "2"}
    sysfs(tmp_path, "thunderbolt0", driver="thunderbolt-net", **link)
    kinds = {p.name: linux_kind(p.name, tmp_path / "net") for p in (tmp_path / "net").iterdir()}
    assert kinds == {
        "lo": "loopback",
        "eth0": "Ethernet",
        "wlp2s0": "Wi-Fi",
        "docker0": "virtual",
        "ib0": "unknown",
        "thunderbolt0": "Thunderbolt 4",
    }
    assert linux_kind("gone0", tmp_path / "net") == "unknown"


# -- MLX's wheel --


def test_wheels():
    linux = parse_wheel_tags("Wheel-Version: 1.0\nTag: cp312-cp312-manylinux_2_35_x86_64\n")
    assert has_jaccl(linux) is False
    assert has_jaccl(("cp312-cp312-macosx_14_0_arm64",)) is False
    assert has_jaccl(("cp312-cp312-macosx_26_0_arm64",)) is True
    assert has_jaccl(parse_wheel_tags(None)) is None


@pytest.mark.parametrize(
    ("architecture", "macos", "in_wheel", "used"),
    [
        ("applegpu_g17s", (26, 2), True, True),
        ("applegpu_g17s", (26, 1), True, False),
        ("applegpu_g17s", (26, 2), False, False),
        ("applegpu_g17s", (26, 2), None, None),
        ("applegpu_g16s", (26, 2), True, False),  # M4
        ("applegpu_g17p", (26, 2), True, False),  # a phone's
        ("something else", (26, 2), True, None),
        (None, (), None, False),
    ],
)
def test_neural_accelerators(architecture, macos, in_wheel, used):
    assert neural_accelerators(architecture, macos, in_wheel) is used


def test_kernels_for_them_are_found_by_name(tmp_path):
    library = tmp_path / "mlx.metallib"
    assert has_accelerator_kernels(library) is None
    library.write_bytes(b"MTLB\0steel_gemm_fused_nt\0")
    assert has_accelerator_kernels(library) is False
    library.write_bytes(b"MTLB\0steel_gemm_fused_nax_nt\0")
    assert has_accelerator_kernels(library) is True


# -- commands --


def test_a_command_that_is_not_there_fails_or_hangs_says_nothing():
    assert read_command("no-such-program-here") is None
    assert read_command("false") is None
    assert read_command("sleep", "5", timeout=0.05) is None
    assert read_command("echo", "$HOME; true") == "$HOME; true\n"
