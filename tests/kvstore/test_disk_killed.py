"""A process that dies while it writes leaves whole blocks or none."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from kv_factories import blank, content, name, store_config

from spillway.kvstore import BlockStore

WRITER = """
import json, sys
from pathlib import Path
from kv_factories import content, name, store_config
from spillway.kvstore import BlockStore

directory, host, start = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
store = BlockStore.open(store_config(directory, host=host, disk=24))
store.get_many([])
print("open", flush=True)
number = start
while True:
    store.put_many([(name(n % 100), content(n % 100)) for n in range(number, number + 4)])
    number += 4
"""


@pytest.mark.parametrize("host", [0, 6])
def test_killed_again_and_again_in_mid_write(tmp_path: Path, host: int) -> None:
    """The disk holds a quarter of what is written, so slots are overwritten all the time."""
    config = store_config(tmp_path, host=host, disk=24)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    recovered = 0
    for turn in range(6):
        arguments = [sys.executable, "-c", WRITER, str(tmp_path), str(host), str(37 * turn)]
        with subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE) as writer:
            assert writer.stdout is not None
            assert writer.stdout.readline() == b"open\n"
            time.sleep(0.05 + 0.03 * turn)
            writer.send_signal(signal.SIGKILL)
        assert writer.returncode == -signal.SIGKILL
        with BlockStore.open(config) as store:
            store.check()
            before = store.stats().tiers["disk"].blocks
            names = [name(number) for number in range(100)]
            outs = [blank() for _ in names]
            found = store.get_many(list(zip(names, outs, strict=True)))
            for number, (out, hit) in enumerate(zip(outs, found, strict=True)):
                assert not hit or np.array_equal(out, content(number)), f"wrong bytes for block {number}"
            assert sum(found) == before, "a block that the headers promised was torn: its header came too early"
            recovered += sum(found)
            store.check()
    assert recovered > 0
    assert json.loads((tmp_path / "share-00" / "share.json").read_bytes())["generation"] == 12
