"""The server as it runs: Ray Serve, ``openai``'s unmodified client, and a process that dies."""

from __future__ import annotations

import io
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import ray
import ray.serve
import requests
import soundfile as sf

from avray.config import AppSettings, ServeSettings
from avray.serving import launch
from avray.serving.directory import PREFIX
from avray.settings.serve import JobSettings, LimitSettings, ReplicaSettings
from tests.commands import free_port
from tests.serving import save_codec_lm, save_continuation
from tests.test_serving import wav

pytestmark = [pytest.mark.ray, pytest.mark.slow]
KEY = "a key for tests"


def settings(folder: Path, *checkpoints: str, port: int = 0) -> AppSettings:
    serve = ServeSettings(port=port, limits=LimitSettings(queue=8),
                          replica=ReplicaSettings(slots=2, num_cpus=0.5, shutdown_s=10.0),
                          jobs=JobSettings(folder=str(folder / "jobs"), lease_s=3.0))
    return AppSettings(checkpoints=checkpoints, serve=serve)


@pytest.fixture(scope="module")
def site(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Two models behind one server; yields its settings and address."""
    folder = tmp_path_factory.mktemp("site")
    save_continuation(folder / "next")
    save_codec_lm(folder / "speech")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AVRAY_API_KEYS", KEY)
        made = settings(folder, str(folder / "next"), str(folder / "speech"), port=free_port())
        launch.run(made, wait=False)
        yield folder, made, f"http://127.0.0.1:{made.serve.port}"
        ray.serve.shutdown()


@pytest.fixture(scope="module")
def client(site: Any) -> openai.OpenAI:
    until(lambda: requests.get(f"{site[2]}/v1/health/ready", timeout=10).status_code == 200)
    return openai.OpenAI(base_url=f"{site[2]}/v1", api_key=KEY)


def until(true: Any, timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def handle(name: str) -> Any:
    """To be called from a thread without an event loop."""
    made = ray.serve.get_app_handle(PREFIX + name)
    if not made.is_initialized:
        made._init(_run_router_in_separate_loop=True)
    return made


def post(site: Any, **fields: Any) -> requests.Response:
    return requests.post(f"{site[2]}/v1/audio/generate", json={"model": "speech", **fields}, timeout=60,
                         headers={"authorization": f"Bearer {KEY}"}, stream=bool(fields.get("stream")))


def test_models(client: openai.OpenAI) -> None:
    models = client.models.list().data
    assert [model.id for model in models] == ["next", "speech"] and models[0].owned_by == "avray"
    assert client.models.retrieve("next").id == "next"


def test_speech(client: openai.OpenAI, tmp_path: Path) -> None:
    whole = client.audio.speech.create(model="speech", input="a bell", voice="default", response_format="wav",
                                       extra_body={"seed": 1, "seconds": 0.4})
    whole.write_to_file(tmp_path / "a.wav")
    assert sf.info(io.BytesIO(whole.content)).samplerate == 24_000
    with client.audio.speech.with_streaming_response.create(
            model="speech", input="a bell", voice="default", response_format="pcm",
            extra_body={"seed": 1, "seconds": 0.4}) as response:
        chunks = list(response.iter_bytes())
        assert response.headers["x-avray-seed"] == "1" and response.headers["x-request-id"]
    assert whole.content.endswith(b"".join(chunks)) and len(b"".join(chunks)) == 19_200
    assert client.audio.speech.create(model="speech", input="a bell", voice="default").content[:3] == b"ID3"


def test_error_types(client: openai.OpenAI, site: Any) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.audio.speech.create(model="nothing", input="a", voice="default")
    assert caught.value.code == "model_not_found" and caught.value.param == "model"
    with pytest.raises(openai.BadRequestError) as refused:
        client.audio.speech.create(model="speech", input="a", voice="alloy")
    assert refused.value.param == "voice"
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{site[2]}/v1", api_key="wrong").models.list()
    with pytest.raises(openai.BadRequestError) as unfit:
        client.embeddings.create(model="speech", input="a")
    assert unfit.value.code == "wrong_model"


def test_a_client_that_leaves_stops_the_work(client: openai.OpenAI, site: Any) -> None:
    load = handle("speech").load
    before = load.remote().result()["steps"]  # a new handle takes seconds, this model less
    post(site, seconds=1)
    until(lambda: load.remote().result()["active"] == 0)
    between = load.remote().result()["steps"]
    response = post(site, seconds=120, stream=True)
    next(response.iter_content(1000))
    response.close()
    until(lambda: load.remote().result()["active"] == 0, 10)
    stopped = load.remote().result()["steps"]
    time.sleep(0.3)
    assert load.remote().result()["steps"] == stopped
    assert between < stopped < between + 120 * (between - before)


def test_models_come_and_go_and_the_others_go_on(client: openai.OpenAI, site: Any) -> None:
    folder, made, address = site
    response = post(site, seconds=20, stream=True)
    chunks = response.iter_content(4096)
    received = len(next(chunks))
    save_continuation(folder / "third", seed=1)
    more = AppSettings(checkpoints=(str(folder / "third"),), cluster="auto", serve=made.serve)
    launch.run(more)
    until(lambda: "third" in [model.id for model in client.models.list().data])
    files = {"file": wav()}
    ask = lambda: requests.post(f"{address}/v1/audio/continuations", data={"model": "third", "response_format": "pcm"},  # noqa: E731
                                files=files, headers={"authorization": f"Bearer {KEY}"}, timeout=60)
    first = ask()
    assert first.status_code == 200
    save_continuation(folder / "third", step=4, seed=2)
    launch.run(more)
    until(lambda: client.models.retrieve("third").step == 4)
    assert ask().content != first.content
    launch.run(AppSettings(unload=("third",), cluster="auto", serve=made.serve))
    until(lambda: "third" not in [model.id for model in client.models.list().data])
    assert received + sum(map(len, chunks)) > 20 * 48_000


@pytest.mark.parametrize("sse", [False, True])
def test_a_replica_killed_during_a_stream(client: openai.OpenAI, site: Any, sse: bool) -> None:
    fields = {"stream_format": "sse"} if sse else {}
    response = post(site, seconds=60, stream=True, **fields)
    chunks = response.iter_content(1000)
    next(chunks)
    os.kill(handle("speech").process.remote().result(), signal.SIGKILL)
    if sse:
        assert b'"code": "replica_lost"' in b"".join(chunks)
    else:
        with pytest.raises(requests.exceptions.ChunkedEncodingError):
            list(chunks)
    assert post(site, seconds=0.2).status_code == 200


def test_a_replica_killed_during_a_job(client: openai.OpenAI, site: Any) -> None:
    headers = {"authorization": f"Bearer {KEY}", "prefer": "respond-async"}
    body = {"model": "speech", "seconds": 20, "seed": 3}
    accepted = requests.post(f"{site[2]}/v1/audio/generate", json=body, headers=headers, timeout=60)
    assert accepted.status_code == 202
    status = lambda: requests.get(f"{site[2]}{accepted.headers['location']}", headers=headers, timeout=60).json()  # noqa: E731
    until(lambda: status()["progress"] > 0.01)
    os.kill(handle("speech").process.remote().result(), signal.SIGKILL)
    until(lambda: status()["status"] == "succeeded")
    content = requests.get(f"{site[2]}{status()['content']}", headers=headers, timeout=60)
    assert content.content == post(site, seconds=20, seed=3).content


def test_serves_one_application_too(ray_session: None, site: Any) -> None:
    """``serve run serve.app:build`` builds what Serve can deploy; ``serve/config.yaml`` is what its schema wants."""
    import yaml
    from ray.serve.schema import ServeDeploySchema

    from serve import app

    config = yaml.safe_load((Path(__file__).parents[1] / "serve" / "config.yaml").read_text())
    schema = ServeDeploySchema.model_validate(config)
    assert [entry.import_path for entry in schema.applications] == ["serve.app:gateway", "serve.app:model"]
    assert callable(app.gateway) and callable(app.model)
    built = app.build({"checkpoint": str(site[0] / "next"), "serve.replica.slots": 1})
    assert isinstance(built, ray.serve.Application)
