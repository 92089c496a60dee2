"""What Ray Serve reads from the environment, once, when it is imported: so this comes before, and imports no Ray."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import sys
from pathlib import Path

# Measured: two hops take 6.0 ms with THROUGHPUT_OPTIMIZED and 8.2 without; direct ingress, which it would switch on as
# well, is for HAProxy.
ALWAYS = {"RAY_SERVE_THROUGHPUT_OPTIMIZED": "1", "RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE": "1"}
PYTHON = {"RAY_SERVE_ENABLE_DIRECT_INGRESS": "0", "RAY_SERVE_ENABLE_HA_PROXY": "0"}
HAPROXY = {"RAY_SERVE_ENABLE_DIRECT_INGRESS": "1", "RAY_SERVE_ENABLE_HA_PROXY": "1",
           "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1"}


def set_environment(proxy: str | None = None) -> None:
    """For this process, and the Ray it starts: ``python`` or ``haproxy``, or what stands there already. ValueError for
    a proxy other than that."""
    wanted = HAPROXY if proxy == "haproxy" else PYTHON
    known = os.environ.get("RAY_SERVE_ENABLE_HA_PROXY")
    if proxy is not None and known is not None and known != wanted["RAY_SERVE_ENABLE_HA_PROXY"]:
        raise ValueError(f"serve.proxy={proxy}, and RAY_SERVE_ENABLE_HA_PROXY={known} is in the environment, which Ray "
                         "reads first: take one of them away.")
    for name, value in (ALWAYS | wanted).items():
        os.environ.setdefault(name, value)
    if proxy == "haproxy" and "RAY_SERVE_HAPROXY_METRICS_PORT" not in os.environ:
        os.environ["RAY_SERVE_HAPROXY_METRICS_PORT"] = str(_free_port())
    # Ray takes the user's token for cluster=auto, but not for an address. It reads the mode when it is imported: set
    # later, a Ray started here would ask for a token that this process does not send.
    if "ray" not in sys.modules and (Path.home() / ".ray" / "auth_token").exists():
        os.environ.setdefault("RAY_AUTH_MODE", "token")


def _free_port() -> int:
    """Of those that neither Ray's workers (10002 to 19999), its replicas (30000 to 31000) nor outgoing connections
    (from 32768 on) will have taken by the time that HAProxy starts. Its own default is one for all servers."""
    for port in random.sample(range(20_000, 30_000), 100):
        with socket.socket() as tried, contextlib.suppress(OSError):
            tried.bind(("", port))
            return port
    raise ValueError("No port is free for HAProxy's counters: set RAY_SERVE_HAPROXY_METRICS_PORT.")
