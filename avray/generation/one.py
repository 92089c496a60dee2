"""``pipelines/generate.py`` for a single request."""

from __future__ import annotations

from pathlib import Path

from avray.config import GenerateSettings
from avray.devices import device_of
from avray.engine import Generated, Generator
from avray.family import Options
from avray.media import Audio, Video, write_audio, write_video

SUFFIXES = {Audio: ".wav", Video: ".mp4", str: ".txt"}


def generate(settings: GenerateSettings) -> str:
    """Generate, write the file, and say where it is and how to make it again."""
    assert settings.checkpoint is not None
    generator = Generator.open(settings.checkpoint, device=device_of(settings.device), slots=1,
                               family=settings.family.get("_target_"))
    result = generator.generate(prompt=settings.prompt, audio=settings.audio, task=settings.task,
                                options=options_of(settings), seed=settings.seed)
    path = write(result, settings.output, settings.include_prompt)
    return f"{path} · {described(result)} · seed {settings.seed}"


def options_of(settings: GenerateSettings) -> Options:
    return Options(seconds=settings.seconds, max_tokens=settings.max_tokens, temperature=settings.temperature,
                   top_k=settings.top_k, top_p=settings.top_p, guidance_scale=settings.guidance_scale,
                   aligned_guidance_scale=settings.aligned_guidance_scale,
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
