"""``pipelines/generate.py`` for a single request."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from avray.config import GenerateSettings
from avray.devices import device_of
from avray.engine import Generated, Generator, make_request
from avray.family import Options, Request
from avray.media import Audio, Video, write_audio, write_video

SUFFIXES = {Audio: ".wav", Video: ".mp4", str: ".txt"}


def generate(settings: GenerateSettings) -> str:
    """Generate, write the file, and say where it is and how to make it again."""
    assert settings.checkpoint is not None
    generator = Generator.open(settings.checkpoint, device=device_of(settings.device), slots=1,
                               family=settings.family.get("_target_"))
    request = make_request(settings.prompt, settings.audio, None, settings.task, None, None, options_of(settings),
                           settings.seed)
    [result] = generator.generate_many([request])
    path = write(result, settings.output, settings.include_prompt)
    beside = f" · {write_embedding(generator, request, settings.embedding)}" if settings.embedding else ""
    return f"{path} · {described(result)} · seed {settings.seed}{beside}"


def write_embedding(generator: Generator, request: Request, path: str) -> Path:
    """The numbers behind what was just generated, which the same seed gives again, as JSON. ValueError where the model
    foresees none."""
    [result] = generator.generate_many([replace(request, fields={**request.fields, "embedding": True})])
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
    path = Path(output or "generated").absolute()
    if not path.suffix:
        path = path.with_suffix(SUFFIXES[type(media)])
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(media, str):
        path.write_text(media, encoding="utf-8")
    elif isinstance(media, Video):
        if path.suffix != ".mp4":
            raise ValueError(f"output={path.name}: this model makes video, which is written as .mp4.")
        write_video(path, media)
    else:
        write_audio(path, media)
    return path


def described(result: Generated) -> str:
    media = result.media
    if isinstance(media, Audio):
        return f"{media.seconds:.2f} s at {media.sample_rate_hz} Hz"
    return f"{len(media)} characters" if isinstance(media, str) else f"{len(media.frames)} frames"
