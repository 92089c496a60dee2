"""Speech encoders of transformers as columns, from tiny checkpoints saved to disk."""

import numpy as np
import pytest
import torch

from avray.encoders.hidden_states import HiddenStates
from avray.errors import MissingDependency


@pytest.fixture(scope="module", params=["wav2vec2", "hubert"])
def folder(request, tmp_path_factory):
    from transformers import HubertConfig, HubertModel, Wav2Vec2Config, Wav2Vec2Model

    config, model = {"wav2vec2": (Wav2Vec2Config, Wav2Vec2Model), "hubert": (HubertConfig, HubertModel)}[request.param]
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
                 conv_dim=(8,) * 7, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2)
    folder = tmp_path_factory.mktemp("hidden") / request.param
    model(config(**sizes)).save_pretrained(folder)
    return folder


def sound(seconds, seed=0):
    return np.random.default_rng(seed).normal(0, 0.1, round(seconds * 16_000)).astype(np.float32)


def test_frames_are_those_of_transformers(folder):
    from transformers import AutoModel

    network = HiddenStates(str(folder)).load("cpu")
    assert (network.sample_rate_hz, network.frame_rate_hz, network.width) == (16_000, 50.0, 16)
    samples = sound(1.0)
    frames, = network.encode_batch([samples])
    assert frames.shape == (50, 16)
    padded = np.pad((samples - samples.mean()) / np.sqrt(samples.var() + 1e-7), (40, 40))
    with torch.no_grad():
        model = AutoModel.from_pretrained(folder).eval()
        states = model(torch.from_numpy(padded.astype(np.float32))[None], output_hidden_states=True).hidden_states
    np.testing.assert_allclose(frames, states[-1][0], atol=1e-5)
    first, = HiddenStates(str(folder), layer=1).load("cpu").encode_batch([samples])
    np.testing.assert_allclose(first, states[1][0], atol=1e-5)


def test_a_stream_is_the_whole(folder):
    network = HiddenStates(str(folder)).load("cpu")
    samples = sound(47.3)
    whole, = network.encode_batch([samples])
    assert len(whole) == -(-len(samples) // 320)
    stream = network.stream()
    pieces = [stream.push(piece) for piece in np.array_split(samples, [7, 160_000, 160_001, 500_000])]
    np.testing.assert_array_equal(np.concatenate([*pieces, stream.finish()]), whole)


def test_its_name_is_that_of_its_weights(folder, tmp_path):
    import shutil

    shutil.copytree(folder, tmp_path / "copy")
    one, two = HiddenStates(str(folder)), HiddenStates(str(tmp_path / "copy"))
    assert one.column_id() == two.column_id() != HiddenStates(str(folder), layer=1).column_id()


def test_what_cannot_be_is_named(folder, tmp_path):
    from transformers import GPT2Config, GPT2Model

    with pytest.raises(ValueError, match="has 2 layers"):
        HiddenStates(str(folder), layer=3).load("cpu")
    with pytest.raises(MissingDependency, match=r"family\.encoder\.path"):
        HiddenStates(str(tmp_path / "nothing")).column_id()
    GPT2Model(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=9)).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(ValueError, match="does not read samples"):
        HiddenStates(str(tmp_path / "gpt2")).load("cpu")
