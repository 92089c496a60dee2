"""Reading pictures in bounds, and the networks that see them: tiny random checkpoints, as transformers saves them."""

import json

import numpy as np
import pytest
import torch

from avray.data.cache import Cache
from avray.data.embed import Embedder
from avray.data.plan import plan_split
from avray.encoders.clips import ClipNumbers, ClipStates, windows
from avray.errors import DataError, MissingDependency
from avray.families.multitask import Multitask
from avray.media import Limits, Video, read_video, write_video
from tests.tiny_codec import WIDTH, TinyConfig

GREYS = np.arange(30, 230, 10)  # a frame each, 10 a second


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    """2 s, each frame greyer than the one before; 48 x 32."""
    path = tmp_path_factory.mktemp("film") / "film.mp4"
    write_video(path, Video(np.broadcast_to(GREYS[:, None, None, None], (20, 32, 48, 3)).astype(np.uint8), 10.0))
    return path


def greys(clip):
    return clip.frames.mean((1, 2, 3))


@pytest.mark.parametrize(("rate", "span", "expected"), [
    (None, (0.0, None), GREYS), (10.0, (0.0, None), GREYS), (5.0, (0.0, None), GREYS[1::2]),
    (20.0, (0.0, 1.0), np.repeat(GREYS[:10], 2)), (10.0, (0.5, 0.5), GREYS[5:10]),
    (10.0, (1.8, 1.0), [*GREYS[18:], *[220] * 8]),
])
def test_frames_are_sampled_by_rate(film, rate, span, expected):
    clip = read_video(str(film), *span, frame_rate_hz=rate, size=16)
    assert clip.frames.shape == (len(expected), 16, 16, 3) and clip.frame_rate_hz == (rate or 10.0)
    np.testing.assert_allclose(greys(clip), expected, atol=3)


def test_a_clip_keeps_its_shape_unless_scaled(film):
    assert read_video(str(film)).frames.shape == (20, 32, 48, 3)


@pytest.mark.parametrize(("limits", "reason"), [
    ({"max_seconds": 1.0}, "over the limit of 1 s"), ({"max_pixels": 100}, "over the limit"),
    ({"max_decoded_bytes": 1000}, "would take 92,160 bytes of memory"), ({"max_file_bytes": 10}, "max_file_bytes"),
])
def test_what_is_over_a_limit_is_refused(film, limits, reason):
    with pytest.raises(DataError, match=reason):
        read_video(str(film), limits=Limits(**limits))


def test_40000_by_40000_pixels_are_refused_by_the_header(film, tmp_path):
    """The track's and the sample entry's sizes are rewritten in the file itself."""
    content = bytearray(film.read_bytes())
    entry = content.index(b"avc1", content.index(b"stsd")) + 4 + 24
    assert int.from_bytes(content[entry : entry + 2]) == 48
    content[entry : entry + 4] = (40_000).to_bytes(2) * 2
    header = content.index(b"tkhd") + 4 + 76
    content[header : header + 8] = (40_000 << 16).to_bytes(4) * 2
    path = tmp_path / "huge.mp4"
    path.write_bytes(content)
    with pytest.raises(DataError, match="pixels"):
        read_video(str(path), limits=Limits(max_pixels=1000))


def test_no_pictures(tmp_path, film):
    sound = tmp_path / "sound.wav"
    import soundfile

    soundfile.write(sound, np.zeros(100), 1000)
    for path in (sound, tmp_path / "none.mp4"):
        with pytest.raises(DataError):
            read_video(str(path))
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(film.read_bytes()[:300])
    with pytest.raises(DataError):
        read_video(str(cut))
    with pytest.raises(DataError, match="no pictures from 9 s on"):
        read_video(str(film), 9.0, 1.0)
    with pytest.raises(ValueError, match="start of at least 0"):
        read_video(str(film), -1.0)


def test_windows_hold_the_last_frame():
    frames = np.arange(27).reshape(27, 1)
    assert [window[[0, -1], 0].tolist() for window in windows(frames, 10)] == [[0, 9], [10, 19], [20, 26]]
    assert [len(window) for window in windows(frames[:24], 10)] == [10, 10]
    assert windows(frames[:3], 10)[0][-1, 0] == 2


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    from transformers import (
        CLIPVisionConfig,
        CLIPVisionModelWithProjection,
        TimesformerConfig,
        TimesformerModel,
        VideoMAEConfig,
        VideoMAEModel,
    )

    folder = tmp_path_factory.mktemp("networks")
    torch.manual_seed(0)
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16,
             "image_size": 32, "patch_size": 16}
    models = {"videomae": VideoMAEModel(VideoMAEConfig(**small, num_frames=4, tubelet_size=2)),
              "timesformer": TimesformerModel(TimesformerConfig(**small, num_frames=4)),
              "clip": CLIPVisionModelWithProjection(CLIPVisionConfig(**small, projection_dim=12))}
    for name, model in models.items():
        model.save_pretrained(folder / name)
    return folder


@pytest.mark.parametrize(("name", "width", "frames"), [("videomae", 16, 4), ("timesformer", 16, 4), ("clip", 12, 8)])
def test_pretrained_networks_see_clips(networks, film, name, width, frames):
    encoder = ClipStates(str(networks / name))
    network = encoder.load("cpu")
    assert (network.width, network.num_frames, network.sampling_hz) == (width, frames, frames / 2)
    clip = read_video(str(film), frame_rate_hz=network.sampling_hz, size=network.size)
    [vectors] = network.encode_batch([clip])
    assert vectors.shape == (1, width) and np.isfinite(vectors).all() and vectors.std() > 0
    [other] = network.encode_batch([Video(255 - clip.frames, clip.frame_rate_hz)])
    assert not np.allclose(vectors, other)
    assert encoder.column_id() == ClipStates(str(networks / name)).column_id() != ClipNumbers().column_id()


def test_a_network_that_is_not_there_or_does_not_see(tmp_path, networks):
    with pytest.raises(MissingDependency):
        ClipStates(str(tmp_path / "none")).load("cpu")
    from transformers import Wav2Vec2Config

    Wav2Vec2Config().save_pretrained(tmp_path / "ears")
    (tmp_path / "ears" / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="a wav2vec2 does not see clips"):
        ClipStates(str(tmp_path / "ears")).load("cpu")


def test_clips_are_embedded_once_and_a_broken_one_is_named(tmp_path, film):
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(film.read_bytes()[:400])
    family = Multitask(TinyConfig(), audio_width=WIDTH, task="video")
    rows = [{"id": name, "video": str(path), "video_hash": name, "duration_s": 2.0, "split": "train", "text": name}
            for name, path in (("film", film), ("broken", broken))]
    plan = plan_split(family, rows, "train")
    cache, [column] = Cache(str(tmp_path / "cache")), family.columns(None)
    assert all(Embedder(column, cache).ensure(shard) for shard in plan.shards)
    values = [value for shard in plan.shards for value in cache.read(shard, column)]
    assert [None if value is None else value.shape for value in values] == [(1, 256), None]
    assert "broken.mp4" in json.dumps(cache.rejects(plan, [column]))


def test_a_decoder_learns_to_play_what_a_pretrained_network_said(networks):
    """The embedding is CLIP's; what is shown are the DCT's numbers, by a decoder trained beside."""
    family = Multitask(TinyConfig(), task="video", video_encoder=ClipStates(str(networks / "clip")), video_width=12,
                       width=32, num_layers=1, num_heads=2)
    random = np.random.default_rng(0)
    rows = [{"id": str(i), "weight": 1.0, "task": "video", "prompt": "up"[i % 2],
             "video.clip": random.normal(size=(1, 12)),
             "video.numbers": np.full((1, 256), i % 2, np.float32)} for i in range(4)]
    fitted = family.fit(iter(rows))
    model = family.build(fitted)
    family.init(model, torch.Generator().manual_seed(0))
    batch = family.collate(rows, fitted)
    assert batch.counts["video_decoder"] == 4 * 256
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(60):
        losses = family.loss(model, batch, torch.Generator())
        optimizer.zero_grad()
        sum(losses[name] / batch.counts[name] for name in losses).backward()
        optimizer.step()
    simple = family.baselines(batch, fitted)["simple"]
    assert float(losses["video_decoder"].detach()) < 0.1 * float(simple["video_decoder"])
