"""Downloads go from the file to the socket inside the kernel: no byte of them passes through the gateway's memory."""

from __future__ import annotations

import asyncio
import http.client
import os
from pathlib import Path

import pytest
from http_ground import prompts, until

from spillway.gateway.http.door import DoorConfig, door
from spillway.gateway.http.metrics import GatewayMetrics
from spillway.gateway.service.access import Access
from spillway.gateway.service.coordinator import ServiceConfig
from spillway.gateway.service.server import gateway

FORM = "multipart/form-data; boundary=xyz"


def test_a_download_is_sent_by_the_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[int] = []
    sendfile = os.sendfile

    def counted(*arguments: int) -> int:
        sent.append(sendfile(*arguments))
        return sent[-1]

    monkeypatch.setattr(os, "sendfile", counted)
    content = prompts(20_000)
    parts = (b'name="purpose"\r\n\r\nbatch', b'name="file"; filename="x"\r\n\r\n' + content)
    body = b"".join(b"--xyz\r\nContent-Disposition: form-data; %b\r\n" % part for part in parts) + b"--xyz--\r\n"

    def up_and_down(port: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request("POST", "/v1/files", body, {"Content-Type": FORM})
        name = connection.getresponse().read().split(b'"id":"')[1].split(b'"')[0].decode()
        for asked, expected in ((None, content), ("bytes=1000-", content[1000:])):
            sent.clear()
            connection.request("GET", f"/v1/files/{name}/content", headers={} if asked is None else {"Range": asked})
            assert connection.getresponse().read() == expected
            until(lambda expected=expected: sum(sent) == len(expected), "the last byte is counted")
        connection.close()

    async def serve() -> None:
        async with gateway(ServiceConfig(tmp_path), "127.0.0.1:0") as served:
            config = DoorConfig("127.0.0.1:0", Access())
            async with door(config, served.ownership, GatewayMetrics()) as port:
                await asyncio.to_thread(up_and_down, port)

    asyncio.run(serve())
