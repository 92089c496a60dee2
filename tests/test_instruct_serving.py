"""instruct behind the HTTP server, without Ray: the route it answers, its options, the same bytes again."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile as sf

from avray.media import Video, write_video
from tests.serving import save_instruct, server


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    run = save_instruct(tmp_path_factory.mktemp("served") / "sounds")
    with server({"sounds": run}) as client:
        yield client


def post(client: Any, **fields: Any) -> Any:
    return client.post("/v1/audio/generate", json={"model": "sounds", "input": "a bell at C4", **fields})


def test_a_description_becomes_sound(client: Any) -> None:
    answer = post(client, seconds=0.48, seed=3, steps=2, guidance_scale=2.5)
    assert answer.status_code == 200, answer.text
    samples, rate = sf.read(io.BytesIO(answer.content))
    assert rate == 24_000 and len(samples) == round(0.48 * 24_000)
    assert post(client, seconds=0.48, seed=3, steps=2, guidance_scale=2.5).content == answer.content
    assert post(client, seconds=0.48, seed=4, steps=2, guidance_scale=2.5).content != answer.content


def test_a_length_may_be_left_to_the_model(client: Any) -> None:
    answer = post(client, seed=3, steps=1)
    assert answer.status_code == 200 and 0 < len(sf.read(io.BytesIO(answer.content))[0]) <= 24_000


@pytest.mark.parametrize(("fields", "named"), [
    ({"seconds": 0}, "seconds"), ({"seconds": 1e9}, "seconds"), ({"seconds": 5}, "seconds"),
    ({"temperature": 1.0}, "temperature"), ({"steps": 10**6}, "steps"), ({"input": None}, "input"),
    ({"task": "sing"}, "task"), ({"guidance_scale": -1}, "guidance_scale"),
])
def test_what_cannot_be_made_is_a_400_that_names_it(client: Any, fields: dict[str, Any], named: str) -> None:
    answer = post(client, **fields)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == named


def test_its_card_says_what_it_takes(client: Any) -> None:
    card = client.get("/v1/models/sounds").json()
    assert "/v1/audio/generate" in str(card) and "guidance_scale" in str(card)


def test_a_clip_is_given_its_sound(tmp_path: Path) -> None:
    frames = np.zeros((15, 32, 32, 3), np.uint8)
    frames[7:] = 255
    write_video(tmp_path / "a.mp4", Video(frames, 25.0))
    sound, clip = io.BytesIO(), (tmp_path / "a.mp4").read_bytes()
    sf.write(sound, np.zeros(8000), 16_000, format="wav")
    runs = {"sees": save_instruct(tmp_path / "sees", "video_to_audio"),
            "both": save_instruct(tmp_path / "both", "enhancement", "video_to_audio")}
    with server(runs) as client:
        def send(data: bytes, **fields: Any) -> Any:
            return client.post("/v1/audio/continuations", data={"seed": 3, **fields}, files={"file": ("a", data)})

        assert client.get("/v1/models/sees").json()["takes"] == ["video"]
        made = send(clip, model="sees")
        assert made.status_code == 200, made.text
        assert len(sf.read(io.BytesIO(made.content))[0]) == round(0.6 * 24_000)
        assert send(sound.getvalue(), model="sees").status_code == 400
        assert send(clip, model="both", task="video_to_audio").status_code == 200
        assert send(sound.getvalue(), model="both", task="enhancement").status_code == 200
