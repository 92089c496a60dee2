"""The vocoder codec: its frames are those of its own feature extractor, its sound what transformers makes of the whole,
and nothing else is ever opened in its place. Tiny random networks, saved and loaded as real ones are."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from avray.checkpoint import Content, save
from avray.codecs import codec_from_settings
from avray.codecs.base import decode_all
from avray.codecs.vocoder import Vocoder
from avray.errors import CheckpointError, MissingDependency
from tests.test_codecs_pretrained import in_pieces, noise

transformers = pytest.importorskip("transformers")
SIZES = {"upsample_initial_channel": 16, "resblock_kernel_sizes": [3, 5], "resblock_dilation_sizes": [[1, 3], [1, 3]],
         "initializer_range": 0.2}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("vocoders")
    torch.manual_seed(0)
    models = {"speech": transformers.SpeechT5HifiGan(transformers.SpeechT5HifiGanConfig(**SIZES)),
              "fast": transformers.FastSpeech2ConformerHifiGan(transformers.FastSpeech2ConformerHifiGanConfig(**SIZES))}
    for name, model in models.items():
        for value in model.parameters():  # as initialised, what it makes is next to nothing
            torch.nn.init.normal_(value, std=0.2 if value.ndim == 1 else 1.5 / value[0].numel() ** 0.5)
        model.mean.normal_(-2.0, 1.0)
        model.scale.uniform_(0.5, 2.0)
        model.save_pretrained(root / name)
    return {name: root / name for name in models}


def mel(samples: np.ndarray, **settings: Any) -> np.ndarray:
    extractor = transformers.SpeechT5FeatureExtractor(**settings)
    return extractor._extract_mel_features(samples)


@pytest.mark.parametrize("num_samples", [1, 300, 5000, 48_000, 256 * 200])
def test_frames_are_those_that_the_vocoder_learnt_to_take(folders: dict[str, Path], num_samples: int) -> None:
    codec = Vocoder(str(folders["speech"])).load()
    assert (codec.sample_rate_hz, codec.hop_samples, codec.width, codec.num_codebooks) == (16_000, 256, 80, 0)
    samples = noise(num_samples)
    [frames] = codec.encode_batch([samples])
    expected = mel(samples)
    assert len(frames) == -(-num_samples // 256) and len(expected) - len(frames) in (0, 1)
    np.testing.assert_allclose(10**frames, 10 ** expected[: len(frames)], rtol=1e-3, atol=1e-7)
    assert np.array_equal(frames, in_pieces(codec.stream(), samples, [700, 1, 5000]))


def test_a_folder_that_says_its_mel_settings_is_believed(folders: dict[str, Path], tmp_path: Path) -> None:
    said = {"sampling_rate": 22_050, "num_mel_bins": 80, "fmin": 0, "fmax": 8000, "mel_floor": 1e-5}
    for file in folders["fast"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    plain = Vocoder(str(tmp_path)).load()
    assert plain.sample_rate_hz == 22_050 and plain.mel.lowest_hz == 80.0
    before = Vocoder(str(tmp_path)).column_id()
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(said))
    config = Vocoder(str(tmp_path))
    assert config.column_id() != before
    assert (config.load().mel.lowest_hz, config.load().mel.highest_hz, config.load().mel.floor) == (0.0, 8000.0, 1e-5)
    with pytest.raises(ValueError, match="codec.lowest_hz = 50, but the vocoder's own files say 0"):
        Vocoder(str(tmp_path), lowest_hz=50).load()
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(said | {"num_mel_bins": 100}))
    with pytest.raises(ValueError, match="codec.bands"):
        Vocoder(str(tmp_path)).load()


@pytest.mark.parametrize("name", ["speech", "fast"])
def test_the_sound_is_what_transformers_makes_of_the_whole(folders: dict[str, Path], name: str) -> None:
    codec = Vocoder(str(folders[name])).load()
    latents = np.random.default_rng(0).normal(-2.0, 1.0, (150, 80)).astype(np.float32)
    kind = transformers.SpeechT5HifiGan if name == "speech" else transformers.FastSpeech2ConformerHifiGan
    with torch.no_grad():
        expected = kind.from_pretrained(folders[name]).eval()(torch.from_numpy(latents)).numpy()
    sound = decode_all(codec, latents)
    assert sound.shape == (150 * codec.hop_samples,) and sound.std() > 0.01
    np.testing.assert_allclose(sound, expected, atol=1e-5)
    assert np.array_equal(sound, in_pieces(codec.decoder(), latents, [1, 40, 7]))


def test_the_normalisation_of_its_config_counts(folders: dict[str, Path], tmp_path: Path) -> None:
    for file in folders["speech"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(settings | {"normalize_before": False}))
    latents = np.full((10, 80), -2.0, np.float32)
    with_, without = (decode_all(Vocoder(str(folder)).load(), latents) for folder in (folders["speech"], tmp_path))
    assert np.abs(with_ - without).max() > 1e-3


def test_what_is_no_vocoder_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(MissingDependency, match="codec.path = nobody/nothing|are not on this machine"):
        Vocoder("nobody/nothing").load()
    (tmp_path / "config.json").write_bytes((folders["speech"] / "config.json").read_bytes())
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(MissingDependency, match="pickled weights are not read"):
        Vocoder(str(tmp_path)).load()
    from safetensors.torch import load_file, save_file

    weights = load_file(folders["speech"] / "model.safetensors")
    save_file({key: value for key, value in weights.items() if key != "mean"}, tmp_path / "model.safetensors",
              {"format": "pt"})
    with pytest.raises(CheckpointError, match="1 weights are missing, mean"):
        Vocoder(str(tmp_path)).load()
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "encodec"}))
    with pytest.raises(ValueError, match="it holds a network of type encodec"):
        Vocoder(str(tmp_path)).load()


@pytest.mark.parametrize(("settings", "reason"), [
    ({"log": "log2"}, "codec.log"), ({"window_samples": 0}, "codec.window_samples"),
    ({"lowest_hz": 9000.0}, "cannot be"), ({"sample_rate_hz": 8000}, "codec.sample_rate_hz = 8000")])
def test_settings_that_cannot_be(folders: dict[str, Path], settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        codec_from_settings({"name": "vocoder", "path": str(folders["speech"]), **settings}).load()


def test_codes_are_learnt_from_its_frames(folders: dict[str, Path]) -> None:
    config = Vocoder(str(folders["speech"]), num_codebooks=2, cardinality=8, frames_per_centroid=4)
    frames = config.load().encode_batch([noise(20_000)])[0]
    codec = config.load("cpu", config.fit(frames))
    codes = codec.to_codes(torch.from_numpy(frames.T)[None])
    assert codes.shape == (1, 2, len(frames)) and codec.from_codes(codes).shape == (1, 80, len(frames))


def test_a_model_of_five_tasks_plays_through_it(folders: dict[str, Path], tmp_path: Path) -> None:
    """From embeddings of its frames to its sound, and with no other vocoder than the one it was trained with."""
    from avray.engine import Generator
    from avray.families.multitask import Multitask
    from avray.registry import family_settings
    from tests.test_multitask import built, rows_of

    family = Multitask(Vocoder(str(folders["speech"])), audio_width=80, width=32, num_layers=1, num_heads=2,
                       segment_s=0.4)
    rows = [row | ({"embedding": [[-4.0 + 0.1 * index] * 80]} if row["task"] == "audio" else {})
            for index, row in enumerate(rows_of())]
    model, fitted = built(family, rows)
    save(tmp_path / "run", 1, Content(model=model.state_dict(), family=family_settings(family), fitted=fitted))
    made = Generator.open(tmp_path / "run").generate("play low", task="audio").audio
    assert made.sample_rate_hz == 16_000 and made.samples.shape == (1, 256 * round(0.4 * 62.5))
    other = replace(family, codec=Vocoder(str(folders["fast"])))
    with pytest.raises(ValueError, match="this model was fitted with vocoder-"):
        other.build(fitted)
