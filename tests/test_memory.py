"""How much memory a rank may take: the host's, its container's, its own limit, the GPU's."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import mlx.core as mx
import psutil
import pytest

from hpcmlx.errors import ConfigError
from hpcmlx.observe import memory
from hpcmlx.observe.memory import cgroup_headroom
from hpcmlx.observe.summary import peak_memory
from hpcmlx.units import format_bytes, parse_bytes

GIB = 1 << 30
V1_UNLIMITED = 9223372036854771712


def group_v2(path, limit, current, inactive_file=0):
    path.mkdir(parents=True, exist_ok=True)
    (path / "memory.max").write_text(f"{limit}\n")
    (path / "memory.current").write_text(f"{current}\n")
    (path / "memory.stat").write_text(f"anon 5\ninactive_file {inactive_file}\nactive_file 7\n")


def group_v1(path, limit, usage, inactive_file=0):
    path.mkdir(parents=True, exist_ok=True)
    (path / "memory.limit_in_bytes").write_text(f"{limit}\n")
    (path / "memory.usage_in_bytes").write_text(f"{usage}\n")
    (path / "memory.stat").write_text(f"inactive_file 1\ntotal_inactive_file {inactive_file}\n")


def test_v2_the_tightest_limit_on_the_way_up_holds(tmp_path):
    job = tmp_path / "system.slice/slurmstepd.scope/job_12"
    task = job / "step_0/user/task_0"
    group_v2(task, "max", 3 * GIB)
    group_v2(job, 8 * GIB, 3 * GIB)
    membership = f"0::/{task.relative_to(tmp_path)}\n"
    assert cgroup_headroom(membership, tmp_path) == 5 * GIB
    group_v2(task, 4 * GIB, 3 * GIB)
    assert cgroup_headroom(membership, tmp_path) == GIB


def test_v2_inside_a_container(tmp_path):
    group_v2(tmp_path, 2 * GIB, 1 * GIB, inactive_file=GIB // 2)
    assert cgroup_headroom("0::/\n", tmp_path) == GIB + GIB // 2


def test_v2_of_another_name_space(tmp_path):
    group_v2(tmp_path, 2 * GIB, 1 * GIB)
    assert cgroup_headroom("0::/../../outside\n", tmp_path) == GIB


def test_v1_beside_an_empty_v2(tmp_path):
    group_v1(tmp_path / "memory", V1_UNLIMITED, 9 * GIB)
    group_v1(tmp_path / "memory/slurm/uid_0/job_3", 6 * GIB, 2 * GIB, inactive_file=GIB)
    membership = "9:name=systemd:/\n5:cpu,memory:/slurm/uid_0/job_3\n0::/\n"
    assert cgroup_headroom(membership, tmp_path) == 5 * GIB


def test_v1_where_the_path_is_the_hosts(tmp_path):
    group_v1(tmp_path / "memory", 3 * GIB, 1 * GIB)
    assert cgroup_headroom("4:memory:/docker/0123abcd\n0::/\n", tmp_path) == 2 * GIB


def test_no_limit_is_none_and_an_exceeded_one_negative(tmp_path):
    group_v2(tmp_path, "max", GIB)
    assert cgroup_headroom("0::/\n", tmp_path) is None
    assert cgroup_headroom("", tmp_path) is None
    group_v1(tmp_path / "memory", V1_UNLIMITED, GIB)
    assert cgroup_headroom("4:memory:/\n", tmp_path) is None
    group_v2(tmp_path, GIB, 2 * GIB)
    assert cgroup_headroom("0::/\n", tmp_path) == -GIB


def test_the_smallest_bound_counts(monkeypatch):
    free = SimpleNamespace(available=80 * GIB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    monkeypatch.setattr(memory, "cgroup_headroom", lambda *_: None)
    assert memory.available_bytes() == 80 * GIB
    assert memory.available_bytes(4) == 20 * GIB
    assert memory.default_kv_budget(4) == 14 * GIB
    monkeypatch.setattr(memory, "cgroup_headroom", lambda *_: 8 * GIB)
    assert memory.available_bytes(4) == 2 * GIB
    monkeypatch.setattr(memory, "cgroup_headroom", lambda *_: -GIB)
    assert memory.default_kv_budget(1) == 0


def test_on_metal_the_working_set_is_shared_too(monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=80 * GIB))
    monkeypatch.setattr(memory, "cgroup_headroom", lambda *_: None)
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx, "get_active_memory", lambda: 10 * GIB)
    info = {"max_recommended_working_set_size": 48 * GIB}
    monkeypatch.setattr(mx, "device_info", lambda: info)
    assert memory.available_bytes() == 80 * GIB  # the CPU device needs no GPU memory
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    assert memory.available_bytes() == 38 * GIB
    assert memory.available_bytes(2) == 14 * GIB


def test_this_host():
    available = memory.available_bytes()
    assert 0 < available <= psutil.virtual_memory().total
    assert memory.default_kv_budget(2) < available / 2


@pytest.mark.skipif(sys.platform == "darwin", reason="macOS does not keep RLIMIT_AS")
def test_ulimit_counts():
    code = (
        "import resource, psutil; from hpcmlx.observe.memory import available_bytes\n"
        "limit = psutil.Process().memory_info().vms + (64 << 20)\n"
        "resource.setrlimit(resource.RLIMIT_AS, (limit, limit)); print(available_bytes())"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 32 << 20 <= int(out.stdout) <= 64 << 20


def test_the_peak_counts_the_gpu_where_there_is_one(monkeypatch):
    monkeypatch.setattr(mx.metal, "is_available", lambda: False)
    [(name, resident)] = peak_memory().items()
    assert name == "peak_rss_bytes" and resident >= psutil.Process().memory_info().rss // 2
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx, "get_peak_memory", lambda: 12 * GIB)
    assert peak_memory()["peak_metal_bytes"] == 12 * GIB


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4GiB", 4 * GIB),
        ("1.5 gib", 3 * GIB // 2),
        ("512MB", 512_000_000),
        ("64KiB", 65536),
        ("2tb", 2 * 10**12),
        ("1048576", 1048576),
        (" 100 B ", 100),
    ],
)
def test_sizes(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize(
    "text", ["", "4G", "GiB", "-1GiB", "0", "0.2B", "1e9", "nan", "4 GiB each", "٤GiB", "1,5GiB"]
)
def test_what_is_not_a_size_is_refused(text):
    with pytest.raises(ConfigError, match=r"inference\.kv_memory=.*4GiB, 512MB or 1048576"):
        parse_bytes(text, "inference.kv_memory")


def test_format_bytes_is_read_back():
    assert format_bytes(0) == "0 B" and format_bytes(1023) == "1023 B"
    assert format_bytes(1536) == "1.5 KiB" and format_bytes(300 * GIB) == "300 GiB"
    assert format_bytes(5000 * 1024 * GIB) == "5000 TiB"
    assert parse_bytes(format_bytes(3 * GIB // 2)) == 3 * GIB // 2
