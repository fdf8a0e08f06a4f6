"""A disk that is really full: a small file system of its own, or a file-size limit where none can be mounted."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from kv_factories import blank, content, disk_bytes, name, store_config

from spillway.kvstore import BlockStore, Deadlines

SMALL_BYTES = 1 << 20


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    point = tmp_path / "small"
    point.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={SMALL_BYTES}", "tmpfs", str(point)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("a file system can only be mounted by root with CAP_SYS_ADMIN")
    yield point
    subprocess.run(["umount", str(point)], check=True)


def use(store: BlockStore, numbers: range) -> int:
    """Put blocks, then get them; how many came back, all of them right."""
    store.put_many([(name(number), content(number)) for number in numbers])
    store.flush()
    outs = [blank() for _ in numbers]
    found = store.get_many([(name(number), out) for number, out in zip(numbers, outs, strict=True)])
    for number, out, hit in zip(numbers, outs, found, strict=True):
        assert not hit or np.array_equal(out, content(number))
    return found.count(True)


def test_a_budget_larger_than_the_disk_uses_what_there_is(small_disk: Path) -> None:
    config = store_config(small_disk, disk=1000, deadlines=Deadlines(put_s=5, load_s=5))
    assert config.disk_bytes > 10 * SMALL_BYTES
    with BlockStore.open(config) as store:
        use(store, range(200))
        disk = store.stats().tiers["disk"]
        assert 40 < disk.blocks < SMALL_BYTES // 8192
        assert use(store, range(190, 200)) == 10
        store.check()
    with BlockStore.open(config) as store:
        assert use(store, range(190, 200)) == 10


def test_a_disk_that_others_filled_is_a_miss(small_disk: Path) -> None:
    config = store_config(small_disk, host=8, disk=40, deadlines=Deadlines(put_s=0.2, load_s=5))
    with (small_disk / "others").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, SMALL_BYTES - (32 << 10))
    with BlockStore.open(config) as store:
        for start in range(0, 40, 4):
            assert use(store, range(start, start + 4)) == 4, "host memory serves what was put last"
        stats = store.stats()
        assert stats.put_drops == 0
        assert stats.tiers["disk"].blocks == 0
        assert stats.tiers["disk"].drops["full"] > 0
        store.check()


def test_a_full_disk_does_not_keep_a_store_from_opening(small_disk: Path) -> None:
    config = store_config(small_disk, disk=40, deadlines=Deadlines(put_s=5, load_s=5))
    with BlockStore.open(config) as store:
        assert use(store, range(10)) == 10
    with (small_disk / "others").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    with BlockStore.open(config) as store:
        outs = [blank() for _ in range(10)]
        assert all(store.get_many([(name(number), out) for number, out in enumerate(outs)]))
        assert all(np.array_equal(out, content(number)) for number, out in enumerate(outs))
        assert use(store, range(10, 20)) == 10, "what is allocated can be used"
        store.check()


LIMITED = """
import resource, sys
from pathlib import Path
from kv_factories import name, store_config
from spillway.kvstore import BlockStore, Deadlines
from test_disk_full import use

resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
with BlockStore.open(store_config(Path(sys.argv[1]), host=8, disk=40, deadlines=Deadlines(put_s=0.2))) as store:
    assert use(store, range(8)) == 8
    use(store, range(30))
    store.check()
    assert store.stats().tiers["disk"].drops["full"] > 0
"""


def test_a_file_size_limit_is_a_miss(tmp_path: Path) -> None:
    assert disk_bytes(40) > 100_000
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    subprocess.run([sys.executable, "-c", LIMITED, str(tmp_path)], env=environment, check=True, timeout=60)
