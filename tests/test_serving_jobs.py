"""Jobs, repeated requests, and admission. No Ray."""

from __future__ import annotations

import asyncio
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from avray.serving.auth import Keys
from avray.serving.jobs import Job, JobStore
from avray.serving.messages import Card, Part, Refusal
from avray.settings.serve import JobSettings, LimitSettings, ReplicaSettings, ServeSettings
from tests.serving import save_codec_lm, server
from tests.test_serving import error_of

CARD = Card("toy", "toy", "audio", ("nothing", "text"), {None: ("seconds",)}, 24_000, 1.0, "f" * 64, 1, 0, 1, 1)


class Toy:
    """A handle to a model that makes a tenth of a second at a time, as fast as ``gate`` lets it."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.begun = self.ended = self.open = 0
        self.dies = 0

    def options(self, stream: bool) -> Toy:
        return self

    @property
    def card(self) -> Any:
        class Method:
            async def remote(self) -> Card:
                return CARD

        return Method()

    @property
    def generate(self) -> Toy:
        return self

    def remote(self, ask: Any) -> Any:
        self.begun += 1
        return ToyCall(self, ask)


class ToyCall:
    def __init__(self, toy: Toy, ask: Any) -> None:
        self.toy, self.left, self.is_open = toy, round(ask.options.get("seconds", 1.0) * 10), True
        toy.open += 1

    async def __anext__(self) -> Part | Refusal:
        from ray.exceptions import RayActorError

        while not self.toy.gate.is_set():
            await asyncio.sleep(0.01)
        if self.toy.dies:
            self.toy.dies -= 1
            raise RayActorError
        self.left -= 1
        if not self.left:
            self.toy.ended += 1
        return Part(b"\1\0" * 2400, not self.left, 24_000, 1, "f" * 64)

    def cancel(self) -> None:
        if self.is_open:
            self.toy.open -= 1
        self.is_open = False


@pytest.fixture
def toy() -> Toy:
    return Toy()


def serve(folder: Path, **limits: Any) -> ServeSettings:
    return ServeSettings(limits=LimitSettings(**{"queue": 1, **limits}), jobs=JobSettings(str(folder), lease_s=1.0))


def post(client: Any, seconds: float = 1.0, asynchronous: bool = False, key: str | None = None, **more: Any) -> Any:
    headers = {"prefer": "respond-async"} if asynchronous else {}
    if key is not None:
        headers["idempotency-key"] = key
    return client.post("/v1/audio/generate", json={"model": "toy", "seconds": seconds, **more}, headers=headers)


def until(true: Any, timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def ended(client: Any, job: str) -> dict[str, Any]:
    until(lambda: client.get(f"/v1/jobs/{job}").json()["status"] in ("succeeded", "failed"))
    return client.get(f"/v1/jobs/{job}").json()


def test_a_job_from_202_to_its_file_and_its_end(tmp_path: Path, toy: Toy) -> None:
    with server({"toy": toy}, serve(tmp_path)) as client:
        whole = post(client, seed=4).content
        accepted = post(client, seed=4, asynchronous=True)
        assert accepted.status_code == 202 and accepted.headers["location"] == f"/v1/jobs/{accepted.json()['id']}"
        job = ended(client, accepted.json()["id"])
        assert job["status"] == "succeeded" and job["progress"] == 1.0 and job["expires_at"] > time.time()
        content = client.get(job["content"])
        assert content.content == whole and content.headers["x-avray-seed"] == "4"
        assert content.headers["content-type"] == "audio/wav"
        for wanted, part in (("bytes=0-9", whole[:10]), ("bytes=-5", whole[-5:]), ("bytes=100-", whole[100:])):
            partial = client.get(job["content"], headers={"range": wanted})
            assert partial.status_code == 206 and partial.content == part
        for odd in ("bytes=9-1", "bytes=0-1,4-5", "bytes=a-b", "lines=1-2", "bytes=99999999-", "bytes=-0", "bytes=-",
                    "bytes=" + "9" * 5000 + "-"):
            assert client.get(job["content"], headers={"range": odd}).status_code == 416
        assert client.delete(f"/v1/jobs/{job['id']}").json()["deleted"]
        assert error_of(client.get(f"/v1/jobs/{job['id']}"))["code"] == "job_not_found"
        assert not list(tmp_path.glob("job-*"))


@pytest.mark.parametrize("name", ["../jobs.sqlite", "..%2f..%2fetc%2fpasswd", "job-" + "0" * 32, "job-x", "%00",
                                  "a" * 5000])
def test_ids_that_are_none(tmp_path: Path, toy: Toy, name: str) -> None:
    with server({"toy": toy}, serve(tmp_path)) as client:
        assert client.get(f"/v1/jobs/{name}").status_code == 404
        assert client.get(f"/v1/jobs/{name}/content").status_code == 404
        assert client.delete(f"/v1/jobs/{name}").status_code in (404, 405)


def test_a_job_outlives_the_server(tmp_path: Path, toy: Toy) -> None:
    toy.gate.clear()
    with server({"toy": toy}, serve(tmp_path)) as client:
        job = post(client, asynchronous=True).json()["id"]
        until(lambda: client.get(f"/v1/jobs/{job}").json()["status"] == "running")
    toy.gate.set()
    with server({"toy": toy}, serve(tmp_path)) as client:
        assert ended(client, job)["status"] == "succeeded"
    assert toy.begun == 2 and toy.ended == 1


def test_a_job_whose_worker_vanished_is_taken_up(tmp_path: Path, toy: Toy) -> None:
    """As after SIGKILL: claimed, never released."""
    settings = JobSettings(str(tmp_path), lease_s=0.2)
    store = JobStore(settings)
    document = {"route": "/v1/audio/generate", "body": {"model": "toy", "seconds": 0.5, "seed": 1}}
    job = Job("", "toy", document)
    assert store.add(job, None) and store.claim("toy").id == job.id and store.claim("toy") is None
    with server({"toy": toy}, replace(serve(tmp_path), jobs=settings)) as client:
        assert ended(client, job.id)["status"] == "succeeded"
        assert store.get(job.id, "").attempts == 2
    store.close()


def test_a_job_outlives_its_replica_a_few_times(tmp_path: Path, toy: Toy) -> None:
    with server({"toy": toy}, serve(tmp_path)) as client:
        toy.dies = 2
        assert ended(client, post(client, asynchronous=True).json()["id"])["status"] == "succeeded"
        toy.dies = 1000
        job = ended(client, post(client, asynchronous=True).json()["id"])
        assert job["status"] == "failed" and job["error"]["code"] == "lost"
        assert client.get(f"/v1/jobs/{job['id']}/content").status_code == 410


def test_deleting_a_job_stops_it(tmp_path: Path, toy: Toy) -> None:
    with server({"toy": toy}, serve(tmp_path)) as client:
        toy.gate.clear()
        job = post(client, asynchronous=True).json()["id"]
        until(lambda: toy.open == 1)
        client.delete(f"/v1/jobs/{job}")
        until(lambda: toy.open == 0)
        assert toy.ended == 0


def test_jobs_expire_and_wait_in_bounds(tmp_path: Path, toy: Toy) -> None:
    settings = replace(serve(tmp_path), jobs=JobSettings(str(tmp_path), keep_s=0.01, queue=2, at_once=1))
    toy.gate.clear()
    with server({"toy": toy}, settings) as client:
        first = post(client, asynchronous=True).json()["id"]
        until(lambda: toy.open == 1)
        assert [post(client, asynchronous=True).status_code for _ in range(3)] == [202, 202, 429]
        toy.gate.set()
        until(lambda: toy.ended == 3)
        store = JobStore(settings.jobs)
        until(lambda: store.get(first, "").state == "succeeded")
        store.expire()
        assert store.get(first, "") is None and not (tmp_path / first).exists()
        store.close()


def test_jobs_are_their_owners(tmp_path: Path, toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AVRAY_API_KEYS", "one,two")
    with server({"toy": toy}, serve(tmp_path), Keys.from_environment()) as client:
        client.headers["authorization"] = "Bearer one"
        job = post(client, asynchronous=True).json()["id"]
        assert ended(client, job)["status"] == "succeeded"
        client.headers["authorization"] = "Bearer two"
        assert client.get(f"/v1/jobs/{job}").status_code == 404
        assert client.delete(f"/v1/jobs/{job}").status_code == 404


def test_one_generation_for_a_key(tmp_path: Path, toy: Toy) -> None:
    with server({"toy": toy}, serve(tmp_path)) as client:
        toy.gate.clear()
        answers: list[Any] = []
        threads = [threading.Thread(target=lambda: answers.append(post(client, key="k"))) for _ in range(3)]
        for thread in threads:
            thread.start()
        until(lambda: toy.begun == 1)
        time.sleep(0.2)
        toy.gate.set()
        for thread in threads:
            thread.join()
        again = post(client, key="k")
        assert toy.begun == 1 and {answer.content for answer in [*answers, again]} == {again.content}
        assert {answer.headers["x-avray-seed"] for answer in [*answers, again]} == {again.headers["x-avray-seed"]}
        assert error_of(post(client, 0.5, key="k"))["code"] == "idempotency_key_reused"
        assert post(client, key="other").status_code == 200 and toy.begun == 2
        first, second = (post(client, asynchronous=True, key="j").json() for _ in range(2))
        assert first["id"] == second["id"]
        assert post(client, key="s", stream=True).status_code == 400
    with server({"toy": toy}, serve(tmp_path)) as client:
        assert post(client, key="k").content == again.content and toy.begun == 3


def test_ten_times_the_capacity(tmp_path: Path, toy: Toy) -> None:
    toy.gate.clear()
    with server({"toy": toy}, serve(tmp_path)) as client:
        answers: list[Any] = []
        threads = [threading.Thread(target=lambda: answers.append(post(client))) for _ in range(20)]
        for thread in threads:
            thread.start()
        until(lambda: len(answers) == 18)
        assert {answer.status_code for answer in answers} == {429} and toy.begun == 2
        assert all(1 <= int(answer.headers["retry-after"]) <= 120 for answer in answers)
        assert error_of(answers[0])["type"] == "rate_limit_error"
        toy.gate.set()
        for thread in threads:
            thread.join()
        assert sorted(answer.status_code for answer in answers[18:]) == [200, 200] and toy.open == 0
        assert post(client).status_code == 200


def test_a_deadline(tmp_path: Path, toy: Toy) -> None:
    toy.gate.clear()
    with server({"toy": toy}, serve(tmp_path, request_timeout_s=0.3)) as client:
        late = post(client)
        assert late.status_code == 504 and late.headers["x-should-retry"] == "false" and toy.open == 0
        assert error_of(late)["code"] == "deadline_exceeded"


def test_a_rate_for_each_key(tmp_path: Path, toy: Toy) -> None:
    with server({"toy": toy}, serve(tmp_path, per_minute=3)) as client:
        assert [post(client, 0.1).status_code for _ in range(4)] == [200, 200, 200, 429]
        assert client.get("/v1/models").status_code == 200


def test_a_body_that_drips(tmp_path: Path, toy: Toy) -> None:

    with server({"toy": toy}, serve(tmp_path, body_timeout_s=0.3)) as client:
        guard = client.app
        sent: list[Any] = []

        async def slowly() -> Any:
            await asyncio.sleep(0.05)
            return {"type": "http.request", "body": b" ", "more_body": True}

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {"type": "http", "path": "/v1/audio/generate", "method": "POST", "raw_path": b"", "query_string": b"",
                 "headers": [(b"content-type", b"application/json")], "server": ("127.0.0.1", 1), "http_version": "1.1"}
        client.portal.call(guard, scope, slowly, send)
        assert sent[0]["status"] == 408
        scope["headers"] = [(b"content-type", b"application/json")]
        sent.clear()

        async def endlessly() -> Any:
            return {"type": "http.request", "body": b" " * 2**20, "more_body": True}

        client.portal.call(guard, scope, endlessly, send)
        assert sent[0]["status"] == 413


def test_a_model_that_fails_leaves_the_server_alone(tmp_path: Path) -> None:
    save_codec_lm(tmp_path / "toy")
    settings = replace(serve(tmp_path / "jobs"), replica=ReplicaSettings(slots=1))
    with server({"toy": tmp_path / "toy"}, settings) as client:
        model = client.handles["toy"].model
        step, failures = model.engine.sampler.step, [1, 1]

        def failing() -> Any:
            if failures:
                failures.pop()
                raise RuntimeError("/secret/path of a bug")
            return step()

        model.engine.sampler.step = failing
        for stream in (False, True):
            response = post(client, 0.2, stream=stream)
            assert response.status_code == 500 and "secret" not in response.text
            error_of(response)
        assert post(client, 0.2).status_code == 200 and model.thread.failures == 0


class Writer(Toy):
    """A model that hears and writes."""

    @property
    def card(self) -> Any:
        class Method:
            async def remote(self) -> Card:
                return replace(CARD, modality="text", takes=("text", "audio"), options={None: ("temperature",)},
                               sample_rate_hz=0)

        return Method()

    def remote(self, ask: Any) -> Any:
        async def said() -> Any:
            yield Part("two ", False, checkpoint="f")
            yield Part("words", True, checkpoint="f", heard_s=1.5 if ask.audio else 0.0)

        class Call:
            def __init__(self) -> None:
                self.parts = said()

            async def __anext__(self) -> Any:
                return await anext(self.parts)

            def cancel(self) -> None:
                pass

        return Call()


def test_models_that_write_answer_the_routes_of_text(tmp_path: Path) -> None:
    with server({"toy": Writer()}, serve(tmp_path)) as client:
        assert client.get("/v1/models/toy").json()["routes"] == ["/v1/completions", "/v1/audio/transcriptions"]
        made = client.post("/v1/completions", json={"model": "toy", "prompt": "a", "temperature": 0.5})
        assert made.json()["choices"][0]["text"] == "two words" and made.headers["x-avray-seed"]
        assert error_of(client.post("/v1/completions", json={"model": "toy", "prompt": "a", "stream": True}))

        def heard(**fields: Any) -> Any:
            return client.post("/v1/audio/transcriptions", data={"model": "toy", **fields}, files={"file": b"x"})

        assert heard().json() == {"text": "two words"} and heard(response_format="text").text == "two words"
        assert heard(response_format="verbose_json").json()["duration"] == 1.5
        assert error_of(heard(response_format="srt"))["param"] == "response_format"
        assert error_of(post(client))["code"] == "wrong_model"
