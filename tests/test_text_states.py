"""A frozen text encoder of transformers, from tiny checkpoints: as a column, and in instruct."""

import dataclasses

import numpy as np
import pytest
import torch

from avray.data.cache import Cache
from avray.data.embed import Embedder
from avray.data.plan import make_shard
from avray.data.rows import example_row
from avray.encoders.text_states import TextStates
from avray.engine import Engine
from avray.errors import MissingDependency
from avray.family import Options, Request
from avray.media import Audio, write_audio
from avray.nn.conditioning import AdapterConfig
from avray.registry import family_from_settings, family_settings
from tests.test_instruct import TINY, built, drain
from tests.tiny_codec import RATE_HZ


@pytest.fixture(scope="module", params=["bert", "t5"])
def folder(request, tmp_path_factory):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast, T5Config, T5EncoderModel

    folder = tmp_path_factory.mktemp("text") / request.param
    torch.manual_seed(0)
    if request.param == "bert":
        sizes = dict(hidden_size=12, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
        BertModel(BertConfig(vocab_size=64, **sizes)).save_pretrained(folder)
    else:
        T5EncoderModel(T5Config(vocab_size=64, d_model=12, d_kv=4, d_ff=16, num_layers=1, num_heads=2)).save_pretrained(
            folder)
    tokens = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "bell": 2, "drum": 3}, unk_token="[UNK]"))
    tokens.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokens, unk_token="[UNK]").save_pretrained(folder)
    return folder


def test_a_text_reads_alike_alone_and_in_company(folder):
    network = TextStates(str(folder), max_tokens=3).load("cpu")
    first, second = network.encode_batch(["a bell", "a drum a drum a drum"])
    assert first.shape == (2, 12) and second.shape == (3, 12) and network.width == 12
    np.testing.assert_array_equal(network.encode_batch(["a bell"])[0], first)


def test_a_folder_that_holds_none_is_refused(tmp_path):
    with pytest.raises(MissingDependency, match=r"family\.text_encoder\.path"):
        TextStates("no/where").load("cpu")
    with pytest.raises(MissingDependency, match=r"family\.text_encoder\.path"):
        TextStates(str(tmp_path)).load("cpu")


def test_instruct_reads_through_it_from_the_cache_and_live(folder, tmp_path):
    encoder = TextStates(str(folder))
    family = dataclasses.replace(TINY, tasks=("text_to_audio", "speech"), text_encoder=encoder,
                                 adapter=AdapterConfig("cross_attention"))
    samples = np.random.default_rng(0).normal(0, 0.1, (1, RATE_HZ)).astype(np.float32)
    write_audio(tmp_path / "a.wav", Audio(samples, RATE_HZ))
    given = {"id": "a", "audio": str(tmp_path / "a.wav"), "start_s": 0.0, "duration_s": 1.0}
    examples = family.segment([{**given, "text": "a bell"}, {**given, "id": "b", "text": "a drum", "task": "speech"}])
    assert set(examples[0].units) == {"output", "text", "instruction"}
    assert set(examples[1].units) == {"output", "instruction"}, "what is spoken is read letter by letter"
    shard, cache = make_shard(examples, {given["audio"]: "hash"}), Cache(str(tmp_path / "cache"))
    columns = family.columns(None)
    for column in columns:
        Embedder(column, cache).ensure(shard)
    rows = [example_row(shard, example, cache, columns) for example in shard.examples]
    fitted = family.fit(iter(rows))
    model = built(family, fitted)
    batch = family.collate(rows, fitted)
    assert batch["text"].shape == (2, 2, 12) and batch["spoken"].shape == (2, 6)
    engine = Engine(family, model, fitted)
    live = engine.row(Request(text="a bell", task="text_to_audio"))
    np.testing.assert_array_equal(live["text.states"], rows[0]["text.states"])
    options = Options(seconds=0.4)
    made = [drain(engine, engine.submit(Request(text=text, options=options)))[0] for text in ("a bell", "a drum")]
    assert len(made[0]) == 400 and not np.array_equal(*made)
    with pytest.raises(ValueError, match=r"family\.text_encoder is not the one"):
        dataclasses.replace(family, text_encoder=None).build(fitted)


def test_its_settings_are_plain_values(folder):
    from avray.codecs.spectral import Spectral

    family = dataclasses.replace(TINY, codec=Spectral(), text_encoder=TextStates(str(folder)))
    assert family_from_settings(family_settings(family)) == family
