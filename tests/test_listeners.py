"""Figures by networks given for them: a recogniser of our own, a CLAP of random weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import avray
from avray.engine import Generated
from avray.evaluation.evaluate import measure_by_task
from avray.evaluation.listeners import given_metrics
from avray.family import Options
from avray.media import Audio
from avray.metrics.text import cer, wer
from avray.train.samples import Answer
from tests.serving import INSTRUCT, save_audio_gpt2, save_continuation

RANDOM = np.random.default_rng(0)
SOUNDS = [Audio(RANDOM.normal(0, 0.1, (1, 24_000)).astype(np.float32), 24_000) for _ in range(4)]
TEXTS = ["a bell", "two drums and a bell"]


def answers() -> list[Answer]:
    return [Answer(text, None, target, Generated(made, 0, Options()), {"task": "text_to_audio", "text": text})
            for text, target, made in zip(TEXTS, (SOUNDS[0], None), SOUNDS[2:], strict=True)]


def test_what_a_recogniser_hears_in_both(tmp_path: Path) -> None:
    save_audio_gpt2(tmp_path / "ears")
    found = measure_by_task(INSTRUCT, answers(), given_metrics(str(tmp_path / "ears"), None, "cpu"))["text_to_audio"]
    heard = [str(avray.load(tmp_path / "ears").generate(audio=sound).media) for sound in SOUNDS]
    assert found["wer_of_generated"] == wer(TEXTS, heard[2:]) and found["cer_of_generated"] == cer(TEXTS, heard[2:])
    assert found["wer_of_target"] == wer(TEXTS[:1], heard[:1]) and found["cer_of_target"] == cer(TEXTS[:1], heard[:1])


def test_a_recogniser_that_writes_nothing(tmp_path: Path) -> None:
    save_continuation(tmp_path / "ears")
    with pytest.raises(ValueError, match="ears writes no text: give a checkpoint of audio_gpt2"):
        measure_by_task(INSTRUCT, answers(), given_metrics(str(tmp_path / "ears"), None, "cpu"))


def test_how_near_a_clap_finds_them(tmp_path: Path) -> None:
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import ClapConfig, ClapFeatureExtractor, ClapModel, PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<pad>": 0, "<unk>": 1, "a": 2, "bell": 3, "drums": 4}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", pad_token="<pad>").save_pretrained(tmp_path)
    ClapFeatureExtractor(feature_size=64, truncation="rand_trunc").save_pretrained(tmp_path)
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    torch.manual_seed(0)
    ClapModel(ClapConfig(
        text_config={**small, "vocab_size": 8, "max_position_embeddings": 32, "pad_token_id": 0},
        audio_config={"hidden_size": 16, "patch_embeds_hidden_size": 8, "depths": [1, 1], "num_attention_heads": [2, 2],
                      "num_hidden_layers": 2, "window_size": 4, "patch_stride": [4, 4]},
        projection_dim=8)).save_pretrained(tmp_path)
    found = measure_by_task(INSTRUCT, answers(), given_metrics(None, str(tmp_path), "cpu"))["text_to_audio"]
    assert -1 <= found["clap_similarity"] <= 1
