"""What a request may say: one set of fields for all routes that make sound, with the names that clients know them by.

Types and bounds that hold for every model are checked here; ``check`` holds a request against the server's limits and
its model. Unknown fields are refused, because a setting that is silently ignored is a wrong result.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from avray.serving.messages import Ask, Card
from avray.serving.refusals import ApiError
from avray.settings.serve import LimitSettings

Format = Literal["wav", "flac", "mp3", "opus", "pcm"]
ALIASES = {"prompt": "input", "duration": "seconds", "audio_length": "seconds", "num_inference_steps": "steps",
           "cfg_scale": "guidance_scale"}
OPTIONS = {"seconds": "seconds", "temperature": "temperature", "top_k": "top_k", "top_p": "top_p",
           "guidance_scale": "guidance_scale", "aligned_guidance_scale": "aligned_guidance_scale", "steps": "num_steps",
           "max_tokens": "max_tokens", "beams": "beams"}
"""Fields that become ``avray.family.Options``."""
PCM_RATE_HZ = 24_000


class Sound(BaseModel):
    """``/v1/audio/generate``, and the fields beside the file of ``/v1/audio/continuations``."""

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

    model: Annotated[str, Field(max_length=200)]
    input: Annotated[str | None, Field(description="The prompt. Also: prompt.")] = None
    response_format: Format = "wav"
    seconds: Annotated[float | None, Field(gt=0, allow_inf_nan=False,
                                           description="How long. Also: duration, audio_length.")] = None
    seed: Annotated[int | None, Field(ge=0, lt=2**63)] = None
    temperature: Annotated[float | None, Field(ge=0, allow_inf_nan=False)] = None
    top_k: Annotated[int | None, Field(ge=1, lt=2**31)] = None
    top_p: Annotated[float | None, Field(gt=0, le=1)] = None
    guidance_scale: Annotated[float | None, Field(ge=0, le=1000, description="Also: cfg_scale.")] = None
    aligned_guidance_scale: Annotated[float | None, Field(ge=0, le=1000)] = None
    steps: Annotated[int | None, Field(ge=1, description="Also: num_inference_steps.")] = None
    max_tokens: Annotated[int | None, Field(ge=1, lt=2**31)] = None
    beams: Annotated[int | None, Field(ge=1, le=64)] = None
    task: Annotated[str | None, Field(max_length=100)] = None
    sample_rate: Annotated[int | None, Field(ge=8000, le=192_000, description="Of the file; the model's own (24000 for "
                                                                              "pcm) where it is left out.")] = None
    stream: bool | None = None
    stream_format: Literal["audio", "sse"] | None = None

    @model_validator(mode="before")
    @classmethod
    def _fold_aliases(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        folded = dict(given)
        for alias, name in ALIASES.items():
            if alias in folded and name in cls.model_fields:
                if name in folded:
                    raise ValueError(f"{alias} and {name} are the same, give one of them")
                folded[name] = folded.pop(alias)
        return folded

    @property
    def streams(self) -> bool:
        return bool(self.stream) or self.stream_format is not None


class Speech(Sound):
    """``/v1/audio/speech``: OpenAI's fields, its default format, and sound as it is made."""

    response_format: Format = "mp3"
    voice: Annotated[str | dict[str, str], Field(description="A speaker that the model knows, or default.")] = "default"
    speed: Annotated[float, Field(gt=0, le=4)] = 1.0
    instructions: str | None = None

    @property
    def streams(self) -> bool:
        return self.stream is not False


class Completion(Sound):
    """``/v1/completions``: text from text, whole."""

    response_format: Literal["json"] = "json"  # type: ignore[assignment]
    n: Literal[1] = 1
    echo: Literal[False] = False
    stream: Literal[False] | None = None  # type: ignore[assignment]
    stream_format: None = None  # type: ignore[assignment]


class Transcription(Completion):
    """The fields beside the file of ``/v1/audio/transcriptions``."""

    response_format: Literal["json", "text", "verbose_json"] = "json"  # type: ignore[assignment]


class Video(Sound):
    """``/v1/videos`` and ``/v1/videos/sync``: a clip, whole, or with ``stream`` as an MP4 in fragments."""

    response_format: Literal["mp4"] = "mp4"  # type: ignore[assignment]
    size: Annotated[str | None, Field(max_length=20, description="width x height, as 64x64: the model's own.")] = None
    sound: Annotated[bool, Field(description="That of the same prompt under the clip.")] = False
    sample_rate: None = None  # type: ignore[assignment]
    stream_format: None = None  # type: ignore[assignment]


class _Numbers(BaseModel):
    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

    model: Annotated[str, Field(max_length=200)]
    task: Annotated[str | None, Field(max_length=100, description="Whose embedding: audio or video.")] = None
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[int | None, Field(ge=1, description="The model's own number.")] = None
    user: Annotated[str | None, Field(max_length=500, description="Not used.")] = None


class Embeddings(_Numbers):
    """``/v1/embeddings``: what the model means by each text, in the space of ``/v1/media/embeddings``."""

    input: Annotated[str, Field(min_length=1)] | Annotated[list[Annotated[str, Field(min_length=1)]],
                                                           Field(min_length=1, max_length=256)]
    seed: Annotated[int, Field(ge=0, lt=2**63, description="Of a model whose embeddings are drawn.")] = 0


class MediaEmbeddings(_Numbers):
    """The fields beside the file of ``/v1/media/embeddings``: what the frozen network says of a file."""


def check(body: Sound, card: Card, limits: LimitSettings) -> None:
    """ApiError for what this server or this model does not take."""
    if body.input is not None and len(body.input) > limits.prompt_characters:
        raise ApiError(400, f"input has {len(body.input)} characters, over the limit of {limits.prompt_characters}.",
                       "input", "too_long")
    seconds = card.segment_s if body.seconds is None else body.seconds
    if seconds > limits.audio_seconds_out:
        raise ApiError(400, f"seconds is {seconds:g}, over the limit of {limits.audio_seconds_out:g}.", "seconds",
                       "too_long")
    if body.steps is not None and body.steps > limits.steps:
        raise ApiError(400, f"steps is {body.steps}, over the limit of {limits.steps}.", "steps", "too_many")
    options = card.options[body.task if card.tasks else None]
    for field, option in OPTIONS.items():
        if getattr(body, field) is not None and option not in options:
            known = ", ".join(name for name, option in OPTIONS.items() if option in options) or "none of its kind"
            asked = f"task {body.task} of model {card.name}" if card.tasks else f"model {card.name}"
            raise ApiError(400, f"{field} has no meaning for {asked}; it takes {known}.", field)
    if isinstance(body, Speech):
        _check_speech(body, card)
    if isinstance(body, Video) and body.size not in (None, card.video_size):
        raise ApiError(400, f"size is {body.size}, and model {card.name} makes {card.video_size}.", "size")


def _check_speech(body: Speech, card: Card) -> None:
    if body.voice != "default":
        raise ApiError(400, f"Model {card.name} knows no voices: voice must be default.", "voice")
    if body.speed != 1.0:
        raise ApiError(400, f"Model {card.name} has no speed: speed must be 1.", "speed")
    if body.instructions:
        raise ApiError(400, f"Model {card.name} takes no instructions beside input.", "instructions")
    if not body.input and "text" in card.takes:
        raise ApiError(400, "input is missing: say what to speak.", "input", "missing_field")


def ask(body: Sound, seed: int, audio: bytes | None = None) -> Ask:
    options = {option: getattr(body, field) for field, option in OPTIONS.items() if getattr(body, field) is not None}
    assert all(math.isfinite(value) for value in options.values())
    return Ask(body.input or None, audio, task=body.task, options=options, seed=seed, stream=body.streams,
               sound=isinstance(body, Video) and body.sound)


def described(body: Sound) -> dict[str, Any]:
    """The settings to make it again with, without the prompt."""
    return {field: getattr(body, field) for field in (*OPTIONS, "task", "response_format", "sample_rate", "sound")
            if getattr(body, field, None) is not None}
