"""An S3 server in this process, and a proxy in front of it that injects faults."""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from faults import Proxy

from streamx.store.bucket import Bucket


@pytest.fixture(scope="session")
def server() -> Iterator[str]:
    """URL of the server, which has one bucket, `cells`."""
    import boto3  # here: the environment of the peers has neither, and collects these tests too
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line per request
    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    host, port = moto.get_host_and_port()
    url = f"http://{host}:{port}"
    keys = {"aws_access_key_id": "test", "aws_secret_access_key": "hush"}
    boto3.client("s3", endpoint_url=url, region_name="us-east-1", **keys).create_bucket(Bucket="cells")
    yield url
    moto.stop()


@pytest.fixture(autouse=True)
def surroundings(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a user has in the environment, journals in a folder of the test, and no waiting for disks."""
    for name in [name for name in os.environ if name.startswith(("AWS_", "GOOGLE_", "AZURE_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", server)
    monkeypatch.setenv("STREAMX_SCRATCH", str(tmp_path / "scratch"))
    monkeypatch.setattr(os, "sync", lambda: None)


@pytest.fixture
def proxy(server: str) -> Iterator[Proxy]:
    with Proxy(server) as proxy:
        yield proxy


@pytest.fixture
def url() -> str:
    """A prefix that no other test uses."""
    return f"s3://cells/{uuid.uuid4().hex}"


@pytest.fixture
def bucket(url: str) -> Callable[..., Bucket]:
    """Places of this test in the bucket."""

    def make(name: str = "store", **options: object) -> Bucket:
        return Bucket(f"{url}/{name}", **options)

    return make
