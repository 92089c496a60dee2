"""What the tests of object stores share: an S3 on loopback (moto's server) in place of AWS."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from unittest import mock

BUCKET = "bucket"


@contextmanager
def s3_on_loopback() -> Iterator[Mapping[str, str]]:
    """With an empty bucket, until the block ends; yields the environment that leads there, which is set meanwhile."""
    import boto3
    import s3fs
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    leading = {"AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_ACCESS_KEY_ID": "any", "AWS_SECRET_ACCESS_KEY": "any",
               "AWS_DEFAULT_REGION": "us-east-1"}
    with mock.patch.dict(os.environ, leading):
        s3fs.S3FileSystem.clear_instance_cache()
        boto3.client("s3").create_bucket(Bucket=BUCKET)
        yield leading
        s3fs.S3FileSystem.clear_instance_cache()
    server.stop()
