"""The routes of text over a real model that listens: transcriptions and completions. No Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import avray
from avray.family import Options
from tests.serving import save_audio_gpt2, server
from tests.test_serving import SERVE, error_of, wav


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_audio_gpt2(tmp_path_factory.mktemp("runs") / "ears")


@pytest.fixture(scope="module")
def client(run: Path) -> Any:
    with server({"ears": run}, SERVE) as client:
        yield client


def transcribe(client: Any, file: bytes | None = None, **fields: Any) -> Any:
    files = {"file": ("a.wav", wav() if file is None else file)}
    return client.post("/v1/audio/transcriptions", data={"model": "ears", "max_tokens": 20, **fields}, files=files)


def test_it_says_what_it_answers(client: Any) -> None:
    card = client.get("/v1/models/ears").json()
    assert card["routes"] == ["/v1/completions", "/v1/audio/transcriptions"]


def test_a_recording_is_written_down_as_the_checkpoint_does(client: Any, run: Path, tmp_path: Path) -> None:
    """A second at 16 kHz, and 2.6 s, which are heard in windows."""
    generator = avray.load(run)
    for seconds in (1.0, 2.6):
        (tmp_path / "a.wav").write_bytes(wav(seconds))
        expected = generator.generate(audio=tmp_path / "a.wav", options=Options(max_tokens=20)).media
        answer = transcribe(client, wav(seconds))
        assert answer.status_code == 200 and answer.json() == {"text": expected} and answer.headers["x-avray-seed"]
        assert transcribe(client, wav(seconds), response_format="text").text == expected
        said = transcribe(client, wav(seconds), response_format="verbose_json").json()
        assert said["text"] == expected and said["duration"] == pytest.approx(seconds, abs=0.01)


def test_a_prompt_and_how_to_draw(client: Any) -> None:
    one, two = (transcribe(client, prompt="so ", temperature=1.0, seed=seed) for seed in (1, 1))
    assert one.json() == two.json() and one.headers["x-avray-seed"] == "1"
    other = [transcribe(client, prompt="so ", temperature=1.0, seed=seed).json() for seed in (2, 3)]
    assert any(answer != one.json() for answer in other)


def test_a_text_is_gone_on_with(client: Any, run: Path) -> None:
    answer = client.post("/v1/completions", json={"model": "ears", "prompt": "some", "max_tokens": 12})
    expected = avray.load(run).generate(prompt="some", options=Options(max_tokens=12)).media
    assert answer.status_code == 200 and answer.json()["choices"][0]["text"] == expected


def test_bad_requests(client: Any) -> None:
    assert error_of(transcribe(client, b"RIFFnone"))["type"] == "invalid_request_error"
    assert error_of(transcribe(client, max_tokens=0))["param"]
    assert "holds 63" in error_of(transcribe(client, max_tokens=5000))["message"]
    assert error_of(client.post("/v1/completions", json={"model": "ears"}))
    assert error_of(client.post("/v1/audio/speech", json={"model": "ears", "input": "x", "voice": "default"}))[
        "code"] == "wrong_model"
    assert transcribe(client, wav(0.05)).status_code == 200, "nothing much is heard, and something written"
