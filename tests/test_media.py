"""Reading and writing media: exact lengths, exact seeks, and a DataError for whatever is wrong with a file."""

from __future__ import annotations

import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile as sf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from avray.errors import DataError
from avray.media import (
    Audio,
    Fragments,
    Limits,
    Video,
    content_hash,
    joined,
    probe,
    probe_video,
    read_audio,
    read_video,
    resampled_length,
    stream_audio,
    write_audio,
    write_video,
)

RATE = 16_000
FORMATS = ["wav", "flac", "ogg", "opus", "mp3"]


def sweep(seconds: float = 3.0, rate: int = RATE, channels: int = 1) -> Audio:
    """A rising tone with a little noise, another in each channel, so that no two places sound alike."""
    t = np.arange(int(seconds * rate)) / rate
    noise = np.random.default_rng(0).standard_normal((channels, len(t))) * 0.01
    tones = [0.3 * np.sin(2 * np.pi * (150 + 90 * k + 300 * t) * t) for k in range(channels)]
    return Audio((np.stack(tones) + noise).astype(np.float32), rate)


def wav_bytes(samples: np.ndarray, claimed_bytes: int | None = None, rate: int = RATE, channels: int = 1) -> bytes:
    """16-bit PCM with a data chunk of whatever length."""
    pcm = (samples * 32767).astype("<i2").tobytes()
    claimed = len(pcm) if claimed_bytes is None else claimed_bytes
    header = struct.pack("<4sI4s4sIHHIIHH4sI", b"RIFF", (36 + claimed) % 2**32, b"WAVE", b"fmt ", 16, 1, channels, rate,
                         rate * channels * 2 % 2**32, channels * 2, 16, b"data", claimed)
    return header + pcm


def flac_claiming(path: Path, rate: int | None = None, channels: int | None = None, frames: int | None = None) -> Path:
    """A FLAC file whose STREAMINFO was changed: 20 bits of rate, 3 of channels - 1, 5 of depth, 36 of length."""
    write_audio(path, sweep(1.0), format="flac")
    content = bytearray(path.read_bytes())
    info = int.from_bytes(content[18:26], "big")
    for value, shift, bits in ((rate, 44, 20), (channels and channels - 1, 41, 3), (frames, 0, 36)):
        if value is not None:
            info = info & ~(((1 << bits) - 1) << shift) | value << shift
    content[18:26] = info.to_bytes(8, "big")
    path.write_bytes(content)
    return path


# What is written comes back ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", FORMATS)
def test_round_trip_keeps_length_and_sound(tmp_path: Path, kind: str) -> None:
    audio = sweep()
    path = str(tmp_path / f"a.{kind}")
    write_audio(path, audio)
    info = probe(path)
    assert (info.num_frames, info.sample_rate_hz, info.channels) == (3 * RATE, RATE, 1)
    assert info.duration_s == 3.0
    back = read_audio(path)
    assert back.samples.dtype == np.float32 and back.samples.shape == (1, 3 * RATE)
    worst = {"wav": 1e-4, "flac": 1e-4}.get(kind, 0.1)
    assert np.abs(back.samples - audio.samples)[:, 100:-100].mean() < worst


def test_samples_beyond_one_are_clipped_not_wrapped(tmp_path: Path) -> None:
    write_audio(tmp_path / "a.wav", Audio(np.array([[1.5, -1.5, 0.5]], np.float32), RATE))
    assert read_audio(str(tmp_path / "a.wav")).samples[0] == pytest.approx([1, -1, 0.5], abs=1e-4)


def test_write_refuses_what_a_format_has_not(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="resample"):
        write_audio(tmp_path / "a.opus", sweep(0.1, rate=22_050))
    with pytest.raises(ValueError, match="choose one of wav"):
        write_audio(tmp_path / "a.xyz", sweep(0.1))
    with pytest.raises(ValueError, match="not finite"):
        write_audio(tmp_path / "a.wav", Audio(np.full((1, 9), np.nan, np.float32), RATE))


def test_half_a_minute_of_vorbis_does_not_overflow_the_stack(tmp_path: Path) -> None:
    write_audio(tmp_path / "a.ogg", Audio(np.zeros((1, 30 * 48_000), np.float32), 48_000))
    assert probe(str(tmp_path / "a.ogg")).num_frames == 30 * 48_000


def test_writes_to_and_reads_from_urls() -> None:
    write_audio("memory://media/a.flac", sweep(1.0))
    assert read_audio("memory://media/a.flac").samples.shape == (1, RATE)
    with pytest.raises(DataError, match="does not exist"):
        read_audio("memory://media/b.flac")


def test_mono_is_the_mean_of_the_channels(tmp_path: Path) -> None:
    audio = sweep(channels=2)
    write_audio(tmp_path / "a.wav", audio)
    both = read_audio(str(tmp_path / "a.wav"), mono=False).samples
    assert both.shape == (2, 3 * RATE)
    assert np.array_equal(read_audio(str(tmp_path / "a.wav")).samples[0], both.mean(axis=0, dtype=np.float32))
    assert read_audio(str(tmp_path / "a.wav"), mono=False, sample_rate_hz=8_000).samples.shape == (2, 3 * 8_000)


# Spans and rates --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("start_s", [0.0, 0.0625, 1.00003, 2.4])
def test_a_window_is_a_cut_of_the_whole(tmp_path: Path, kind: str, start_s: float) -> None:
    path = str(tmp_path / f"a.{kind}")
    write_audio(path, sweep())
    whole = read_audio(path).samples[0]
    window = read_audio(path, start_s=start_s, duration_s=0.5).samples[0]
    expected = whole[round(start_s * RATE):][: RATE // 2]
    assert np.abs(window - expected).max() <= {"mp3": 1e-6, "opus": 1e-3}.get(kind, 0.0)


def test_span_beyond_the_end(tmp_path: Path) -> None:
    path = str(tmp_path / "a.wav")
    write_audio(path, sweep(1.0))
    assert read_audio(path, 0.5, 0.55).samples.shape == (1, RATE // 2)  # rounding of up to 0.1 s is forgiven
    for start_s, duration_s in ((0.5, 0.7), (1.0, None), (1.5, 0.1)):
        with pytest.raises(DataError, match="1.000 s long"):
            read_audio(path, start_s, duration_s)
    assert sum(map(len, stream_audio(path, 0.5, 9.0, past_end="stop"))) == RATE // 2
    for start_s, duration_s in ((-1.0, None), (float("nan"), None), (0.0, 0.0), (0.0, float("inf"))):
        with pytest.raises(ValueError, match="start_s"):
            read_audio(path, start_s, duration_s)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(frames=st.integers(1, 30_000), source=st.sampled_from([8_000, 11_025, 22_050, 44_100, 48_000]),
       target=st.sampled_from([8_000, 16_000, 24_000, 44_100]), block_s=st.floats(0.001, 1.0))
def test_blocks_joined_are_the_whole_and_the_length_is_exact(tmp_path: Path, frames: int, source: int, target: int,
                                                             block_s: float) -> None:
    path = str(tmp_path / "a.wav")
    sf.write(path, np.random.default_rng(frames).uniform(-0.5, 0.5, frames), source)
    whole = read_audio(path, sample_rate_hz=target)
    assert whole.samples.shape == (1, resampled_length(frames, source, target))
    blocks = list(stream_audio(path, sample_rate_hz=target, block_s=block_s))
    assert np.array_equal(np.concatenate([np.zeros(0, np.float32), *blocks]), whole.samples[0])


def test_resampling_keeps_the_pitch(tmp_path: Path) -> None:
    t = np.arange(44_100) / 44_100
    sf.write(tmp_path / "a.wav", 0.5 * np.sin(2 * np.pi * 1000 * t), 44_100)
    samples = read_audio(str(tmp_path / "a.wav"), sample_rate_hz=24_000).samples[0]
    assert np.abs(samples - 0.5 * np.sin(2 * np.pi * 1000 * np.arange(24_000) / 24_000))[500:-500].max() < 1e-3


def test_streaming_a_long_file_takes_little_memory(tmp_path: Path) -> None:
    sf.write(tmp_path / "a.flac", np.zeros(600 * RATE, np.int16), RATE)
    tracemalloc.start()
    total = sum(map(len, stream_audio(str(tmp_path / "a.flac"), sample_rate_hz=24_000)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert total == 600 * 24_000
    assert peak < 8e6  # the whole would be 58 MB


# Containers -------------------------------------------------------------------------------------------------------

def clip(num_frames: int = 20, audio: Audio | None = None) -> Video:
    frames = np.zeros((num_frames, 48, 64, 3), np.uint8)
    for index in range(num_frames):
        frames[index, 10:20, index:index + 10] = 255
    return Video(frames, 10.0, audio)


def test_video_is_written_and_probed(tmp_path: Path) -> None:
    path = str(tmp_path / "a.mp4")
    write_video(path, clip(audio=sweep(2.0)))
    info = probe_video(path)
    assert (info.num_frames, info.width, info.height, info.frame_rate_hz) == (20, 64, 48, 10.0)
    assert info.duration_s == pytest.approx(2.0) and info.has_audio
    assert probe(path).num_frames == 2 * RATE
    write_video(path, clip())
    assert not probe_video(path).has_audio
    with pytest.raises(DataError, match="no sound"):
        probe(path)
    with pytest.raises(DataError, match="over the limit"):
        probe_video(path, Limits(max_pixels=1000))
    with pytest.raises(ValueError, match="even width"):
        write_video(path, Video(np.zeros((3, 48, 63, 3), np.uint8), 10.0))


@pytest.mark.parametrize("has_sound", [False, True])
def test_a_video_in_fragments_is_played_as_it_comes(tmp_path: Path, has_sound: bool) -> None:
    sound = sweep(4.0).samples
    pieces = [clip(audio=Audio(sound[:, k * 2 * RATE:(k + 1) * 2 * RATE], RATE) if has_sound else None)
              for k in (0, 1)]
    writer, path = Fragments("made"), tmp_path / "a.mp4"
    first, second, last = writer.push(pieces[0]), writer.push(pieces[1]), writer.finish()
    path.write_bytes(first)
    with av.open(str(path)) as file:  # before the second piece is there
        assert sum(1 for _ in file.decode(video=0)) >= 16 and file.metadata["comment"] == "made"
    path.write_bytes(first + second + last)
    info = probe_video(str(path))
    assert (info.num_frames, info.frame_rate_hz, info.has_audio) == (40, 10.0, has_sound)
    shown = read_video(str(path)).frames
    assert np.abs(shown.astype(float) - joined(pieces).frames).mean() < 3
    if has_sound:
        heard = read_audio(str(path)).samples[0, : 4 * RATE]
        shift = np.correlate(heard[8000:24_000], sound[0, 8000:24_000], "full").argmax() - (16_000 - 1)
        assert shift == 0
    with pytest.raises(ValueError, match="even width"):
        Fragments().push(Video(np.zeros((3, 48, 63, 3), np.uint8), 10.0))


def test_sound_of_a_container_keeps_its_length_and_time(tmp_path: Path) -> None:
    audio = sweep(2.0)
    path = str(tmp_path / "a.m4a")
    write_video(path, clip(audio=audio))
    whole = read_audio(path).samples[0]
    assert len(whole) == 2 * RATE
    shift = np.correlate(whole[8000:24_000], audio.samples[0, 8000:24_000], "full").argmax() - (16_000 - 1)
    assert shift == 0
    window = read_audio(path, 1.0, 0.5).samples[0]
    assert np.abs(window - whole[RATE:RATE + RATE // 2]).max() < 1e-5
    assert np.array_equal(np.concatenate(list(stream_audio(path, block_s=0.1))), whole)


def test_mp3_without_a_length_header_is_read_to_its_end(tmp_path: Path) -> None:
    write_audio(tmp_path / "a.mp3", sweep(4.0))
    content = (tmp_path / "a.mp3").read_bytes()
    (tmp_path / "b.mp3").write_bytes(content[content.find(content[:2], 10):])
    whole = read_audio(str(tmp_path / "b.mp3")).samples[0]
    assert 4.0 <= len(whole) / RATE < 4.3  # with the encoder's padding, which the lost header would have cut
    assert np.abs(read_audio(str(tmp_path / "b.mp3"), 2.0, 0.5).samples[0] - whole[2 * RATE:][: RATE // 2]).max() < 1e-5


def test_a_playlist_opens_nothing(tmp_path: Path) -> None:
    write_audio(tmp_path / "secret.wav", sweep(1.0))
    for name, text in (("a.m4a", f"#EXTM3U\n#EXTINF:1,\n{tmp_path}/secret.wav\n"),
                       ("b.mp4", f"ffconcat version 1.0\nfile {tmp_path}/secret.wav\n")):
        (tmp_path / name).write_text(text)
        with pytest.raises(DataError, match="nothing that avray reads"):
            read_audio(str(tmp_path / name))


# Bad files --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["wav", "flac", "mp3", "ogg", "mp4"])
def test_missing_empty_and_cut_files(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"a.{kind}"
    with pytest.raises(DataError, match="does not exist"):
        read_audio(str(path))
    path.write_bytes(b"")
    with pytest.raises(DataError, match="empty"):
        read_audio(str(path))
    if kind == "mp4":
        write_video(path, clip(audio=sweep(2.0)))
    else:
        write_audio(path, sweep(2.0))
    path.write_bytes(path.read_bytes()[:30])
    with pytest.raises(DataError):
        read_audio(str(path))


@pytest.mark.parametrize("kind", ["flac", "mp3"])
def test_half_a_file_is_not_taken_for_a_whole_one(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"a.{kind}"
    write_audio(path, sweep(4.0))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DataError):
        read_audio(str(path))


def test_no_samples(tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(wav_bytes(np.zeros(0)))
    with pytest.raises(DataError, match="no samples"):
        read_audio(str(tmp_path / "a.wav"))


def test_samples_that_are_not_finite(tmp_path: Path) -> None:
    samples = sweep(1.0).samples[0].copy()
    samples[-3] = np.nan
    sf.write(tmp_path / "a.wav", samples, RATE, subtype="FLOAT")
    with pytest.raises(DataError, match="finite"):
        read_audio(str(tmp_path / "a.wav"))


@pytest.mark.parametrize("write", [
    lambda path: flac_claiming(path, rate=655_350, channels=8),
    lambda path: path.write_bytes(wav_bytes(np.zeros(800), 0x7FFFFFF0, rate=655_350, channels=8)),
])
def test_absurd_header_is_refused_before_allocation(tmp_path: Path, write: Callable[[Path], object]) -> None:
    write(tmp_path / "a.bin")
    tracemalloc.start()
    with pytest.raises(DataError, match="8 channels at 655,350 Hz"):
        read_audio(str(tmp_path / "a.bin"))
    assert tracemalloc.get_traced_memory()[1] < 1e6
    tracemalloc.stop()


@pytest.mark.parametrize("frames", [0, 10**6, 2**36 - 1])
def test_flac_that_lies_about_its_length(tmp_path: Path, frames: int) -> None:
    path = flac_claiming(tmp_path / "a.flac", frames=frames)  # 0 stands for "unknown"
    tracemalloc.start()
    with pytest.raises(DataError):
        read_audio(str(path))
    assert tracemalloc.get_traced_memory()[1] < 100e6
    tracemalloc.stop()


@pytest.mark.parametrize("claimed", [0xFFFFFFFF, 0x7FFFFFFF, 2 * RATE + 5000])
def test_wav_that_claims_too_much_gives_what_is_there(tmp_path: Path, claimed: int) -> None:
    samples = sweep(1.0).samples[0]
    (tmp_path / "a.wav").write_bytes(wav_bytes(samples, claimed))
    back = read_audio(str(tmp_path / "a.wav")).samples[0]
    assert len(back) == RATE and np.abs(back - samples).max() < 1e-4


@pytest.mark.parametrize("claimed", [0, 1000])
def test_wav_that_claims_too_little_is_rejected(tmp_path: Path, claimed: int) -> None:
    (tmp_path / "a.wav").write_bytes(wav_bytes(sweep(1.0).samples[0], claimed))
    with pytest.raises(DataError, match=f"{claimed:,} bytes of sound, but 32,000 follow"):
        read_audio(str(tmp_path / "a.wav"))


def test_chunks_after_the_samples_are_no_lie(tmp_path: Path) -> None:
    content = wav_bytes(sweep(1.0).samples[0]) + struct.pack("<4sI4s", b"LIST", 4, b"INFO")
    (tmp_path / "a.wav").write_bytes(content)
    assert probe(str(tmp_path / "a.wav")).num_frames == RATE


def test_a_compression_bomb_meets_the_caps(tmp_path: Path) -> None:
    path = str(tmp_path / "a.flac")
    sf.write(path, np.zeros(900 * RATE, np.int16), RATE)  # 15 minutes in a few kB
    with pytest.raises(DataError, match="max_seconds"):
        read_audio(path, limits=Limits(max_seconds=600))
    with pytest.raises(DataError, match="max_decoded_bytes"):
        read_audio(path, limits=Limits(max_decoded_bytes=10**6))
    with pytest.raises(DataError, match="max_file_bytes"):
        read_audio(path, limits=Limits(max_file_bytes=100))
    with pytest.raises(ValueError, match="max_seconds"):
        Limits(max_seconds=0)


@pytest.fixture(scope="module")
def containers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("containers")
    for kind in FORMATS:
        write_audio(folder / f"a.{kind}", sweep(0.3))
    write_video(folder / "a.mp4", clip(3, sweep(0.3)))
    return folder


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(kind=st.sampled_from([*FORMATS, "mp4"]), data=st.data())
def test_fuzzed_files_are_read_or_rejected(tmp_path: Path, containers: Path, kind: str,
                                           data: st.DataObject) -> None:
    content = bytearray((containers / f"a.{kind}").read_bytes())
    for _ in range(data.draw(st.integers(1, 8))):
        # Half of the changes fall into the header, where they matter most.
        place = data.draw(st.integers(0, 200) | st.integers(0, len(content) - 1))
        content[place] = data.draw(st.integers(0, 255))
    del content[data.draw(st.integers(1, len(content)) | st.just(len(content))):]
    (tmp_path / "a").write_bytes(content)
    for read in (read_audio, probe_video):
        try:
            read(str(tmp_path / "a"), limits=Limits(max_seconds=60))
        except DataError as error:
            assert str(error).startswith(str(tmp_path / "a")) and "\n" not in str(error)


# Identity ---------------------------------------------------------------------------------------------------------

def test_hash_is_of_the_content(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"one")
    (tmp_path / "b").write_bytes(b"one")
    (tmp_path / "c").write_bytes(b"two")
    first, same, other = (content_hash(str(tmp_path / name)) for name in "abc")
    assert first == same != other and len(first) == 32
    with pytest.raises(DataError, match="No such file"):
        content_hash(str(tmp_path / "d"))
    write_audio("memory://media/h.wav", sweep(0.1))
    assert content_hash("memory://media/h.wav") == content_hash("memory://media/h.wav")


@pytest.mark.realdata
def test_real_recordings_probe_and_seek(test_data: Path) -> None:
    for path in sorted((test_data / "music").glob("*.ogg")) + sorted((test_data / "speech/librispeech").glob("*.flac")):
        info = probe(str(path))
        whole = read_audio(str(path)).samples
        assert whole.shape == (1, info.num_frames) and np.abs(whole).max() > 0.01
        window = read_audio(str(path), 1.5, 1.0).samples[0]
        assert np.array_equal(window, whole[0, round(1.5 * info.sample_rate_hz):][: info.sample_rate_hz])
