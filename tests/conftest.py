"""What all tests share: one Ray, the folder of real recordings, and a machine kept small.

The environment is set before torch or Ray is imported: one thread each, no network, no telemetry. Shapes in annotations
are checked in every call, in this process (Ray's workers run avray as it is).
"""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
from jaxtyping import install_import_hook

SMALL_MACHINE = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_enable_worker_prestart": "0",
    "RAY_DEDUP_LOGS": "1",
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
}
for name, value in SMALL_MACHINE.items():
    os.environ.setdefault(name, value)

# What a shell starts in the background ignores SIGINT, and so would the commands that tests end by it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import tests.shapes  # noqa: E402, F401 (the hook names it)

# Only modules with shapes in them: a checked call costs some 20 µs, which loops over rows would feel.
ROOT = Path(__file__).parents[1]
SHAPED = [path for path in (ROOT / "avray").rglob("*.py") if "jaxtyping" in path.read_text()]
install_import_hook(
    [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in SHAPED],
    "tests.shapes.check",
)

# No deadlines: a busy machine is no failure. In CI the same examples every time.
hypothesis.settings.register_profile("avray", deadline=None, derandomize=bool(os.environ.get("CI")))
hypothesis.settings.load_profile("avray")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    wanting = [item for item in items if item.get_closest_marker("gpu")]
    if not wanting:
        return
    import torch

    if not torch.cuda.is_available():
        for item in wanting:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder of real recordings, for tests marked ``realdata``."""
    folder = os.environ.get("AVRAY_TEST_DATA")
    if not folder:
        pytest.skip("AVRAY_TEST_DATA names no folder of recordings")
    path = Path(folder).absolute()
    assert path.is_dir(), f"AVRAY_TEST_DATA={folder} is not a folder"
    return path


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """One Ray for the whole session, for tests marked ``ray``: starting one takes about 10 s on 2 cores.

    Its 8 CPUs are numbers for the scheduler, whatever the machine has: train workers, embedding actors and a reader
    want one each, and too few of them hang rather than fail. A pipeline that makes no progress ends after 2 minutes.
    """
    import ray
    import ray.data

    ray.init(num_cpus=8, include_dashboard=False, object_store_memory=512 << 20)
    context = ray.data.DataContext.get_current()
    context.execution_no_progress_timeout_s = 120
    context.enable_progress_bars = False
    yield
    ray.shutdown()


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """Ray's sockets have to lie under a short path."""
    folder = Path(tempfile.mkdtemp(prefix="avray-test-", dir="/tmp"))
    yield folder
    shutil.rmtree(folder)
