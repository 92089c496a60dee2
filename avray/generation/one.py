"""``pipelines/generate.py`` for a single request."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import soundfile

from avray.config import GenerateSettings
from avray.devices import device_of
from avray.engine import Generated, Generator, make_request
from avray.family import Media, Options, Request
from avray.media import Audio, Fragments, Video, read_video, write_audio, write_video

SUFFIXES = {Audio: ".wav", Video: ".mp4", str: ".txt"}


def generate(settings: GenerateSettings) -> str:
    """Generate, write the file, and say where it is and how to make it again."""
    assert settings.checkpoint is not None
    generator = Generator.open(settings.checkpoint, device=device_of(settings.device), slots=1,
                               family=settings.family.get("_target_"))
    clip = None if settings.video is None else read_video(settings.video)
    request = make_request(settings.prompt, settings.audio, clip, settings.task, None, None, options_of(settings),
                           settings.seed)
    if settings.sound:
        request = replace(request, fields={"sound": True})
    if settings.stream:
        made = write_stream(generator.stream_request(request), settings.output)
    else:
        [result] = generator.generate_many([request])
        made = f"{write(result, settings.output, settings.include_prompt)} · {described(result)}"
    beside = f" · {write_embedding(generator, request, settings.embedding)}" if settings.embedding else ""
    return f"{made} · seed {settings.seed}{beside}"


def write_embedding(generator: Generator, request: Request, path: str) -> Path:
    """The numbers behind what was just generated, which the same seed gives again, as JSON. ValueError where the model
    foresees none."""
    [result] = generator.generate_many([replace(request, fields={"embedding": True})])
    if not isinstance(result.media, str):
        raise ValueError("embedding has no meaning for this model: it foresees no embedding.")
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(result.media + "\n", encoding="utf-8")
    return target


def options_of(settings: GenerateSettings) -> Options:
    return Options(seconds=settings.seconds, max_tokens=settings.max_tokens or settings.count,
                   temperature=settings.temperature, top_k=settings.top_k, top_p=settings.top_p,
                   guidance_scale=settings.guidance_scale, aligned_guidance_scale=settings.aligned_guidance_scale,
                   num_steps=settings.num_steps, beams=settings.beams)


def write(result: Generated, output: str | None, include_prompt: bool = False) -> Path:
    """Write what was generated; the suffix of ``output`` chooses the format, none takes wav, mp4 or txt.

    ValueError for a suffix that does not fit what the model makes.
    """
    media = result.with_prompt().media if include_prompt else result.media
    path = target(output, media)
    if isinstance(media, str):
        path.write_text(media, encoding="utf-8")
    elif isinstance(media, Video):
        write_video(path, media)
    else:
        write_audio(path, media)
    return path


def target(output: str | None, media: Media) -> Path:
    """The file for a medium, its folder made. ValueError for a suffix that it cannot have."""
    path = Path(output or "generated").absolute()
    if not path.suffix:
        path = path.with_suffix(SUFFIXES[type(media)])
    if isinstance(media, Video) and path.suffix != ".mp4":
        raise ValueError(f"output={path.name}: this model makes video, which is written as .mp4.")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def write_stream(pieces: Iterator[Media], output: str | None) -> str:
    """Write while it is made, so that another program can follow; returns the file's name and how much there is. Text
    without an output is printed. ValueError for sound that is not to be a WAV: other formats end what they begin."""
    first = next(pieces, "")
    rest, length = itertools.chain([first], pieces), 0
    if isinstance(first, str):
        path = target(output, first) if output else None
        with path.open("w", encoding="utf-8") if path else nullcontext(sys.stdout) as file:
            for text in rest:
                length += file.write(str(text))
                file.flush()
        return f"{path} · {length} characters" if path else f"\n{length} characters"
    path = target(output, first)
    if isinstance(first, Video):
        fragments = Fragments()
        with path.open("wb", buffering=0) as raw:
            for clip in rest:
                assert isinstance(clip, Video)
                raw.write(fragments.push(clip))
                length += len(clip.frames)
            raw.write(fragments.finish())
        return f"{path} · {length} frames"
    if path.suffix != ".wav":
        raise ValueError(f"output={path.name}: with stream=true sound is written as .wav.")
    with soundfile.SoundFile(path, "w", first.sample_rate_hz, len(first.samples), "PCM_16", format="WAV") as sound:
        for piece in rest:
            assert isinstance(piece, Audio)
            sound.write(piece.samples.T.clip(-1.0, 1.0))
            sound.flush()
        return f"{path} · {sound.frames / sound.samplerate:.2f} s at {sound.samplerate} Hz"


def described(result: Generated) -> str:
    media = result.media
    if isinstance(media, Audio):
        return f"{media.seconds:.2f} s at {media.sample_rate_hz} Hz"
    return f"{len(media)} characters" if isinstance(media, str) else f"{len(media.frames)} frames"
