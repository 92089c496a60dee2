"""Codecs with weights: tiny random networks, saved and loaded as real ones are, against transformers on whole files."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from avray.codecs import CODEC_NAMES, codec_from_settings
from avray.codecs.base import Codes, Latents, decode_all
from avray.codecs.bfloat16 import check_convolutions
from avray.codecs.pretrained import Pretrained
from avray.errors import CheckpointError, MissingDependency
from tests.decoding import in_pieces, side_by_side

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")


def encodec_24khz() -> torch.nn.Module:
    return transformers.EncodecModel(transformers.EncodecConfig(
        num_filters=4, hidden_size=16, upsampling_ratios=[4, 2], codebook_size=32, target_bandwidths=[60.0, 120.0]))


def encodec_48khz() -> torch.nn.Module:
    return transformers.EncodecModel(transformers.EncodecConfig(
        num_filters=4, hidden_size=16, upsampling_ratios=[4, 2], codebook_size=32, target_bandwidths=[120.0],
        sampling_rate=48_000, audio_channels=2, normalize=True, chunk_length_s=0.025, overlap=0.01,
        norm_type="time_group_norm", use_causal_conv=False))


def mimi() -> torch.nn.Module:
    return transformers.MimiModel(transformers.MimiConfig(
        num_filters=4, hidden_size=16, upsampling_ratios=[4, 2], codebook_size=32, codebook_dim=8, num_quantizers=4,
        vector_quantization_hidden_dimension=8, num_hidden_layers=2, intermediate_size=32, num_attention_heads=2,
        num_key_value_heads=2, head_dim=8, sliding_window=20, upsample_groups=16, layer_scale_initial_scale=0.5))


def dac(sample_rate_hz: int, ratios: list[int]) -> torch.nn.Module:
    model = transformers.DacModel(transformers.DacConfig(
        encoder_hidden_size=16, downsampling_ratios=ratios, decoder_hidden_size=32, n_codebooks=3, codebook_size=32,
        codebook_dim=4, sampling_rate=sample_rate_hz))
    with torch.no_grad():  # as initialised, its output is too small to tell anything by
        for weight in model.parameters():
            weight.mul_(5 if weight.dim() == 3 else 1)
    return model


def xcodec() -> torch.nn.Module:
    acoustic = {"encoder_hidden_size": 32, "downsampling_ratios": [8, 5, 4, 2], "upsampling_ratios": [8, 5, 4, 2],
                "decoder_hidden_size": 32, "hidden_size": 64, "model_type": "dac"}
    semantic = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64,
                "conv_dim": [16] * 7, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2,
                "model_type": "hubert"}
    return transformers.XcodecModel(transformers.XcodecConfig(
        acoustic_model_config=acoustic, semantic_model_config=semantic, codebook_size=32, target_bandwidths=[1.0]))


NETWORKS = {
    "encodec_24khz": encodec_24khz,
    "encodec_48khz": encodec_48khz,
    "mimi": mimi,
    "dac_16khz": lambda: dac(16_000, [2, 4]),
    "dac_24khz": lambda: dac(24_000, [2, 5]),
    "xcodec": xcodec,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint of each kind."""
    root = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    for kind, create in NETWORKS.items():
        model = create().eval()
        for key, value in model.named_buffers():
            if key.endswith(("embed", "embed_sum")):
                value.normal_(0, 0.3)
        if kind.startswith("encodec"):
            place_codebooks(model)
        model.save_pretrained(root / kind)
    return {kind: root / kind for kind in NETWORKS}


@torch.no_grad()
def place_codebooks(model: torch.nn.Module) -> None:
    """About where latents are, each finer than the last: as initialised, all frames are nearly equal and give one
    code, or lie half-way between two."""
    for key, weight in model.named_parameters():
        weight.mul_(3 if key.endswith("original0") else 1)
    heard = torch.from_numpy(noise(1_200, seed=9))[None, None].expand(1, model.config.audio_channels, -1)
    latents = model.encoder(heard)[0].T
    for stage, layer in enumerate(model.quantizer.layers):
        spread = torch.randn_like(layer.codebook.embed) * latents.std(0) * 0.8**stage
        layer.codebook.embed.copy_(spread + (latents.mean(0) if stage == 0 else 0))


def noise(num_samples: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.2, num_samples).astype(np.float32)


@torch.no_grad()
def whole_file(name: str, folder: Path, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Latents and codes of transformers itself, stock and on the whole recording."""
    kinds = {"encodec": transformers.EncodecModel, "mimi": transformers.MimiModel, "xcodec": transformers.XcodecModel}
    model = kinds.get(name.split("_")[0], transformers.DacModel).from_pretrained(folder).eval()
    heard = torch.from_numpy(samples)[None, None]
    if name.startswith("encodec"):
        return model.encoder(heard)[0].numpy(), model.encode(heard, bandwidth=120.0).audio_codes[0, 0].numpy()
    if name == "mimi":
        return model.encoder(heard).latents[0].numpy(), model.encode(heard).audio_codes[0].numpy()
    if name == "xcodec":
        return np.zeros(0), model.encode(heard).audio_codes[0].numpy()
    return model.encoder(heard)[0].numpy(), model.encode(heard).audio_codes[0].numpy()


@pytest.mark.parametrize("name", ["encodec_24khz", "mimi", "dac_16khz", "dac_24khz", "xcodec"])
def test_blocks_give_what_the_whole_file_gives(name: str, folders: dict[str, Path]) -> None:
    codec = Pretrained(name, path=str(folders[name])).load()
    lengths = [num_frames * codec.hop_samples for num_frames in (3, 40, 700)]
    for samples, latents in zip(map(noise, lengths), codec.encode_batch([*map(noise, lengths)]), strict=True):
        expected, expected_codes = whole_file(name, folders[name], samples)
        codes = codec.to_codes(torch.from_numpy(latents.T)[None])[0].numpy()
        assert latents.shape == (len(samples) / codec.hop_samples, codec.width)
        assert codes.shape == expected_codes.shape and np.mean(codes == expected_codes) >= 0.999
        if len(expected):
            assert np.abs(latents.T - expected).max() < 3e-6 * np.abs(expected).max()
    assert codes.max() < codec.cardinality and len(np.unique(codes)) > codec.cardinality / 2


def test_encodec_ends_within_a_frame_as_transformers_does(folders: dict[str, Path]) -> None:
    codec = Pretrained("encodec_24khz", path=str(folders["encodec_24khz"])).load()
    recordings = [noise(n) for n in (4_001, 1, 7, 2_300, 9, 8, 805, 4_800)]
    for samples, latents in zip(recordings, codec.encode_batch(recordings), strict=True):
        expected, _ = whole_file("encodec_24khz", folders["encodec_24khz"], samples)
        np.testing.assert_allclose(latents.T, expected, atol=3e-6 * np.abs(expected).max())


@pytest.mark.parametrize("name", ["encodec_24khz", "mimi", "dac_16khz", "dac_24khz", "xcodec"])
def test_decoding_in_blocks_gives_what_the_whole_gives(name: str, folders: dict[str, Path]) -> None:
    codec = Pretrained(name, path=str(folders[name])).load()
    model = getattr(transformers, {"encodec_24khz": "EncodecModel", "mimi": "MimiModel", "xcodec": "XcodecModel"}
                    .get(name, "DacModel")).from_pretrained(folders[name]).eval()
    codes = torch.randint(0, 32, (1, 3, 200), generator=torch.Generator().manual_seed(0))
    decoded = decode_all(codec, codec.from_codes(codes)[0].T.numpy())
    with torch.no_grad():
        stock = model.decode(codes[None], [None]) if name == "encodec_24khz" else model.decode(audio_codes=codes)
    expected = stock.audio_values.flatten().numpy()
    assert decoded.shape == (200 * codec.hop_samples,) and len(decoded) - len(expected) in (0, 2)
    np.testing.assert_allclose(decoded[: len(expected)], expected, atol=3e-5 * np.abs(expected).max())


@pytest.mark.parametrize("name", NETWORKS)
@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sizes=st.lists(st.integers(1, 3_000), min_size=1, max_size=4), num_samples=st.integers(0, 6_000))
def test_pieces_joined_are_the_whole(name: str, folders: dict[str, Path], sizes: list[int], num_samples: int) -> None:
    codec = Pretrained(name, path=str(folders[name]), num_codebooks=3).load()
    samples = noise(num_samples)
    whole = codec.encode_batch([noise(900, seed=1), samples])[1]
    assert whole.shape == (-(-num_samples // codec.hop_samples), codec.width)
    sizes = [max(size, num_samples // 50 + 1) for size in sizes]
    np.testing.assert_allclose(in_pieces(codec.stream(), samples, sizes), whole, atol=1e-5)
    decoded = decode_all(codec, whole)
    assert decoded.shape == (len(whole) * codec.hop_samples,)
    np.testing.assert_array_equal(in_pieces(codec.decoder(), whole, sizes), decoded)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_requests_decoded_together_sound_as_alone(name: str, folders: dict[str, Path], device: str) -> None:
    codec = Pretrained(name, path=str(folders[name])).load(device)
    lengths = (90, 37, 90, 12, 61)
    latents = [codec.encode_batch([noise(length * codec.hop_samples, seed)])[0] for seed, length in enumerate(lengths)]
    alone = [decode_all(codec, one) for one in latents]
    for one, beside in zip(alone, side_by_side(codec, latents), strict=True):
        np.testing.assert_array_equal(beside, one)
    codec.decode_rows = 3  # not on a CPU, whose vector loops round the odd elements at their ends otherwise
    for one, beside in zip(alone, side_by_side(codec, latents), strict=True):
        np.testing.assert_allclose(beside, one, atol=1e-3 * np.abs(one).max())


def test_48khz_chunks_are_those_of_transformers(folders: dict[str, Path]) -> None:
    codec = Pretrained("encodec_48khz", path=str(folders["encodec_48khz"])).load()
    model = transformers.EncodecModel.from_pretrained(folders["encodec_48khz"]).eval()
    samples = noise(3_000)
    chunk, whole = codec.encode_batch([samples[:1_200], samples])
    np.testing.assert_allclose(whole[:148], chunk[:148], atol=1e-5)
    codes = codec.to_codes(torch.from_numpy(chunk.T)[None])
    with torch.no_grad():
        stock = model.encode(torch.from_numpy(samples[:1_200])[None, None].expand(1, 2, -1), bandwidth=120.0)
        decoded = model.decode(stock.audio_codes[:1], stock.audio_scales[:1]).audio_values[0].mean(0).numpy()
    np.testing.assert_array_equal(codes[0, 1:], stock.audio_codes[0, 0])
    assert np.exp(chunk[:, -1]) == pytest.approx(float(stock.audio_scales[0]))
    quantised = codec.from_codes(codes)[0].T.numpy()
    assert np.abs(quantised[:, -1] - chunk[:, -1]).max() <= 20.5 / 31 / 2 + 1e-6
    quantised[:, -1] = chunk[:, -1]
    np.testing.assert_allclose(decode_all(codec, quantised), decoded, atol=1e-5)
    assert codec.from_codes(codes[:, :1]).shape == (1, 17, 150)


@pytest.mark.parametrize("name", NETWORKS)
def test_bfloat16_comes_near(name: str, folders: dict[str, Path]) -> None:
    samples = noise(6_400)
    exact, near = (Pretrained(name, path=str(folders[name]), dtype=dtype).load() for dtype in ("float32", "bfloat16"))
    latents = [codec.encode(torch.from_numpy(samples)[None]).numpy() for codec in (exact, near)]
    assert latents[1].dtype == np.float32
    assert 0 < np.abs(latents[0] - latents[1]).max() < 0.1 * np.abs(latents[0]).max()
    sound = [decode_all(codec, latents[0][0].T) for codec in (exact, near)]
    assert np.abs(sound[0] - sound[1]).mean() < 0.1 * np.abs(sound[0]).mean()


def test_wrong_convolutions_in_bfloat16_are_refused() -> None:
    class Wrong(torch.nn.Conv1d):
        def forward(self, heard: torch.Tensor) -> torch.Tensor:
            return super().forward(heard) * (0.9 if heard.dtype == torch.bfloat16 else 1)

    with pytest.raises(ValueError, match="wrong on this CPU; take float32"):
        check_convolutions(torch.nn.Sequential(Wrong(32, 4, 3)).bfloat16())
    right = torch.nn.Sequential(torch.nn.Conv1d(32, 4, 3), torch.nn.ConvTranspose1d(4, 2, 4, stride=2)).bfloat16()
    check_convolutions(right)
    assert {weight.dtype for weight in right.parameters()} == {torch.bfloat16}


def test_codes_in_a_column(folders: dict[str, Path]) -> None:
    config = codec_from_settings({"name": "encodec_24khz", "path": str(folders["encodec_24khz"])})
    encoder = Codes(config, 2)
    assert pickle.loads(pickle.dumps(encoder)) == encoder != Codes(config, 1)
    network, samples = encoder.load("cpu"), noise(5_003)
    whole = network.encode_batch([samples])[0]
    assert whole.dtype == np.uint16 and whole.shape == (626, 2)
    assert np.mean(in_pieces(network.stream(), samples, [700, 30]) == whole) >= 0.999


def test_what_names_a_column(folders: dict[str, Path], tmp_path: Path) -> None:
    """The weights, wherever they lie, and the precision; not how many codebooks there are to be."""
    here, there = folders["encodec_24khz"], tmp_path / "elsewhere"
    there.mkdir()
    for file in here.iterdir():
        (there / file.name).write_bytes(file.read_bytes())
    ids = [Latents(Pretrained("encodec_24khz", path=str(folder), dtype=dtype, num_codebooks=books)).column_id()
           for folder, dtype, books in [(here, "float32", None), (there, "float32", 2), (there, "bfloat16", None)]]
    assert ids[0] == ids[1] != ids[2]
    transformers.EncodecModel.from_pretrained(here).apply(
        lambda module: module.bias.data.add_(1) if isinstance(module, torch.nn.Conv1d) else None).save_pretrained(there)
    assert Pretrained("encodec_24khz", path=str(there)).column_id() != ids[0]


def test_how_many_codebooks(folders: dict[str, Path]) -> None:
    path = str(folders["encodec_24khz"])
    assert Pretrained("encodec_24khz", path=path).load().num_codebooks == 8
    assert Pretrained("encodec_24khz", path=path, bandwidth_kbps=30.0).load().num_codebooks == 2
    codec = Pretrained("encodec_24khz", path=path, num_codebooks=3).load()
    with pytest.raises(ValueError, match="4 codebooks asked for, but the codec has 3"):
        codec.to_codes(torch.zeros(1, 16, 5), 4)
    with pytest.raises(ValueError, match="has 8 codebooks, but 9 are asked for"):
        Pretrained("encodec_24khz", path=path, num_codebooks=9).load()
    with pytest.raises(ValueError, match="one codebook takes 15 kbps"):
        Pretrained("encodec_24khz", path=path, bandwidth_kbps=3.0).load()
    with pytest.raises(ValueError, match="say the same thing"):
        Pretrained("encodec_24khz", num_codebooks=1, bandwidth_kbps=3.0)


def test_absent_weights_name_the_fix(folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for name in CODEC_NAMES[1:]:
        with pytest.raises(MissingDependency, match=r"not on this machine: set codec.path .* or codec.download=true"):
            codec_from_settings({"name": name}).load()
    with pytest.raises(MissingDependency, match="does not exist: set codec.path"):
        Pretrained("mimi", path=str(tmp_path / "nothing")).column_id()
    with pytest.raises(MissingDependency, match="takes a config.json"):
        Pretrained("mimi", path=str(tmp_path)).load()


def test_wrong_weights_are_told(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds a network of type mimi, not dac"):
        Pretrained("dac_24khz", path=str(folders["mimi"])).load()
    with pytest.raises(ValueError, match="works at 48000 Hz: give the name of that one"):
        Pretrained("encodec_24khz", path=str(folders["encodec_48khz"])).load()
    with pytest.raises(ValueError, match="codec.dtype = float16"):
        Pretrained("mimi", dtype="float16")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="nothing to fit"):
        Pretrained("mimi").fit(np.zeros((3, 512)))
    from safetensors.torch import load_file, save_file

    source = folders["encodec_24khz"]
    (tmp_path / "config.json").write_text((source / "config.json").read_text())
    weights = load_file(source / "model.safetensors")
    del weights["encoder.layers.0.conv.bias"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"1 weights are missing, encoder.layers.0.conv.bias"):
        Pretrained("encodec_24khz", path=str(tmp_path)).load()
    (tmp_path / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="cannot be read"):
        Pretrained("encodec_24khz", path=str(tmp_path)).load()


def test_a_pickle_is_refused(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"encoder.model.0.conv.conv.weight_g": Trap()}, tmp_path / "trap.th")
    torch.save({"something": torch.zeros(3)}, tmp_path / "other.th")
    (tmp_path / "noise.th").write_bytes(b"not a checkpoint")
    for name in ("trap", "other", "noise"):
        with pytest.raises(CheckpointError, match=f"{name}.th"):
            Pretrained("encodec_24khz", path=str(tmp_path / f"{name}.th")).load()
    assert not (tmp_path / "ran").exists()
    with pytest.raises(ValueError, match="hold EnCodec, not mimi"):
        Pretrained("mimi", path=str(tmp_path / "trap.th")).load()


@pytest.mark.slow
@pytest.mark.skipif("AVRAY_TEST_ENCODEC" not in os.environ, reason="AVRAY_TEST_ENCODEC names no copy of encodec")
def test_metas_own_checkpoints(tmp_path: Path) -> None:
    """PyPI's encodec, installed without its dependencies, against ours, from the ``.th`` files it saves."""
    script = Path(__file__).with_name("meta_encodec.py")
    subprocess.run([sys.executable, script, os.environ["AVRAY_TEST_ENCODEC"], tmp_path], check=True)
    for name in ("encodec_24khz", "encodec_48khz"):
        theirs = np.load(tmp_path / f"{name.removeprefix('encodec_')}.npz")
        codec = Pretrained(name, path=str(tmp_path / f"{name.removeprefix('encodec_')}.th"), bandwidth_kbps=6.0).load()
        added = codec.num_codebooks - len(theirs["codes"])
        latents = codec.encode_batch([theirs["samples"]])[0]
        codes = codec.to_codes(torch.from_numpy(latents.T)[None])
        ours = latents.T[: codec.width - added]
        assert ours.shape == theirs["latents"].shape
        assert np.abs(ours - theirs["latents"]).max() < 1e-5 * np.abs(ours).max()
        assert np.mean(codes[0, added:].numpy() == theirs["codes"]) >= 0.999
        assert len(np.unique(theirs["codes"])) > 50
        quantised = codec.from_codes(codes)[0].T.numpy()
        quantised[:, codec.width - added :] = latents[:, codec.width - added :]
        decoded = decode_all(codec, quantised)[: len(theirs["samples"])]
        np.testing.assert_allclose(decoded, theirs["decoded"][: len(decoded)], atol=1e-4 * np.abs(decoded).max())
