"""SpeechTokenizer through a small network in the shape of its package, and through the package where it is at hand."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from avray.codecs.base import Codes, decode_all
from avray.codecs.pretrained import Pretrained
from avray.errors import CheckpointError, MissingDependency
from tests.decoding import in_pieces

CONFIG = {"sample_rate": 16_000, "strides": [8, 5, 4, 2], "n_q": 3, "dimension": 8, "codebook_size": 16}
MODEL = '''
import numpy as np
import torch
from torch import nn


class Recurrent(nn.LSTM):
    def forward(self, x):
        return super().forward(x.transpose(1, 2))[0].transpose(1, 2)


class Layer(nn.Module):
    def __init__(self, size, width):
        super().__init__()
        self.register_buffer("codebook", torch.zeros(size, width))


class SpeechTokenizer(nn.Module):
    def __init__(self, config):
        super().__init__()
        width, hop = config["dimension"], int(np.prod(config["strides"]))
        self.sample_rate, self.n_q, self.downsample_rate = config["sample_rate"], config["n_q"], np.int64(hop)
        convolution = torch.nn.utils.weight_norm(nn.Conv1d(1, width, hop, hop))
        self.encoder = nn.Sequential(convolution, Recurrent(width, width // 2, batch_first=True, bidirectional=True))
        self.decoder = nn.Sequential(Recurrent(width, width, batch_first=True), nn.ConvTranspose1d(width, 1, hop, hop))
        self.quantizer = nn.Module()
        self.quantizer.vq = nn.Module()
        self.quantizer.vq.layers = nn.ModuleList(Layer(config["codebook_size"], width) for _ in range(self.n_q))
'''


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A checkpoint of the package's form; the package in reach."""
    package = tmp_path / "package" / "speechtokenizer"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "model.py").write_text(MODEL)
    monkeypatch.syspath_prepend(str(package.parent))
    for name in ("speechtokenizer", "speechtokenizer.model"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    from speechtokenizer.model import SpeechTokenizer

    torch.manual_seed(0)
    model = SpeechTokenizer(CONFIG)
    for stage, layer in enumerate(model.quantizer.vq.layers):
        layer.codebook.normal_(0, 0.2 * 0.7**stage)
    weights = tmp_path / "weights"
    weights.mkdir()
    torch.save(model.state_dict(), weights / "SpeechTokenizer.pt")
    (weights / "config.json").write_text(json.dumps(CONFIG))
    yield weights
    for name in ("speechtokenizer", "speechtokenizer.model"):
        sys.modules.pop(name, None)


def noise(seconds: float) -> np.ndarray:
    return np.random.default_rng(0).normal(0, 0.2, round(16_000 * seconds)).astype(np.float32)


@pytest.mark.filterwarnings("ignore")
def test_codes_and_sound(folder):
    codec = Pretrained("speechtokenizer", path=str(folder)).load()
    assert (codec.sample_rate_hz, codec.frame_rate_hz, codec.num_codebooks, codec.cardinality) == (16_000, 50.0, 3, 16)
    samples = noise(50.007)
    latents = codec.encode_batch([samples])[0]
    assert latents.shape == (2501, 8)
    np.testing.assert_allclose(in_pieces(codec.stream(), samples, [33_333]), latents, atol=1e-6)
    with torch.no_grad():
        whole = codec.model.encoder(torch.from_numpy(np.pad(samples, (0, 2501 * 320 - len(samples))))[None, None])[0].T
    codes, expected = (codec.to_codes(torch.from_numpy(np.array(x.T))[None])[0] for x in (latents, whole))
    assert (codes == expected).float().mean() >= 0.999 and len(codes.unique()) > 8
    sound = decode_all(codec, latents)
    assert sound.shape == (2501 * 320,)
    np.testing.assert_array_equal(in_pieces(codec.decoder(), latents, [77]), sound)


@pytest.mark.filterwarnings("ignore")
def test_the_first_codebook_alone(folder):
    config = Pretrained("speechtokenizer", path=str(folder))
    samples = noise(3)
    one, all_ = (Codes(config, k).load("cpu").encode_batch([samples])[0] for k in (1, 3))
    assert one.shape == (150, 1) and np.array_equal(one, all_[:, :1])
    assert Pretrained("speechtokenizer", path=str(folder), num_codebooks=1).load().num_codebooks == 1


@pytest.mark.filterwarnings("ignore")
def test_what_is_missing_is_named(folder, monkeypatch):
    (folder / "SpeechTokenizer.pt").rename(folder / "other.bin")
    with pytest.raises(MissingDependency, match=r"config.json and one .pt file"):
        Pretrained("speechtokenizer", path=str(folder)).load()
    torch.save({"encoder.0.bias": torch.zeros(8)}, folder / "wrong.pt")
    with pytest.raises(CheckpointError, match="not the weights of a SpeechTokenizer"):
        Pretrained("speechtokenizer", path=str(folder)).load()
    monkeypatch.setitem(sys.modules, "speechtokenizer", None)
    monkeypatch.delitem(sys.modules, "speechtokenizer.model")
    with pytest.raises(MissingDependency, match=r"pip install 'avray\[speechtokenizer\]'"):
        Pretrained("speechtokenizer", path=str(folder)).load()


@pytest.mark.slow
@pytest.mark.skipif("AVRAY_TEST_SPEECHTOKENIZER" not in os.environ, reason="names no copy of speechtokenizer")
def test_the_package_itself(tmp_path):
    """PyPI's speechtokenizer, installed without its dependencies: equal codes, and sound within a ten-thousandth."""
    script = Path(__file__).with_name("own_speechtokenizer.py")
    subprocess.run([sys.executable, script, os.environ["AVRAY_TEST_SPEECHTOKENIZER"], tmp_path], check=True)
    made = np.load(tmp_path / "own.npz")
    assert made["ours"].shape == made["theirs"].shape == (4, 1000)
    assert np.mean(made["ours"] == made["theirs"]) >= 0.999 and len(np.unique(made["theirs"])) == 32
    assert np.array_equal(made["first"], made["theirs"][:1])
    assert np.abs(made["decoded"] - made["expected"]).max() < 1e-4 * np.abs(made["expected"]).max()
