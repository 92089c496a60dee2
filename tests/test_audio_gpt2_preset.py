"""The original's configuration end to end: ``experiment=audio_gpt2`` over tiny networks saved to disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from avray.checkpoint import Checkpoint
from avray.cli import EVALUATE, GENERATE, PREPARE, TRAIN, compose, without_aliases
from avray.data.manifest import load_manifest
from avray.registry import family_from_settings
from tests.test_manifest import sound

WORDS = ("no", "yes", "go")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GPT-2 with its tokeniser and Wav2Vec2, as transformers saves them."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, Wav2Vec2Config, Wav2Vec2Model

    folder = tmp_path_factory.mktemp("weights")
    vocabulary = {word: index for index, word in enumerate(("<|endoftext|>", "?", *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, "?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", unk_token="?").save_pretrained(
        folder / "gpt2")
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(vocab_size=5, n_positions=512, n_embd=16, n_layer=2, n_head=2, bos_token_id=0,
                               eos_token_id=0)).save_pretrained(folder / "gpt2")
    Wav2Vec2Model(Wav2Vec2Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
                                 conv_dim=(16, 16), conv_stride=(20, 16), conv_kernel=(20, 16),
                                 num_feat_extract_layers=2, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2)
                  ).save_pretrained(folder / "wav2vec2")
    return folder


def test_the_preset_is_the_originals() -> None:
    settings = compose(TRAIN, ["experiment=audio_gpt2", "data.path=/nowhere"])
    family, trainer = settings.family, settings.trainer
    assert (family["base"], family["encoder"]["path"], family["listen"], family["stem"]) \
        == ("gpt2-medium", "facebook/wav2vec2-base", "last", "linear")
    assert (family["segment_s"], family["overlap_s"]) == (20.0, 5.0)
    assert (trainer.max_epochs, trainer.batch_size, trainer.accumulate, trainer.clip_norm) == (3, 16, 16, 1.0)
    optimizer = trainer.optimizer
    assert (optimizer.name, optimizer.lr, optimizer.weight_decay, trainer.schedule.name, trainer.precision) \
        == ("adamw", 5e-5, 0.01, "linear", "bf16")


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("adapt", ["all", "lora"])
def test_prepare_train_evaluate_generate(ray_session: Any, tmp_path: Path, weights: Path, adapt: str) -> None:
    """In the original's words where it has its own. With adapters the base is on disk once."""
    from avray.data.prepare import prepare_all
    from avray.evaluation.evaluate import evaluate
    from avray.generation.one import generate
    from avray.train.trainer import train

    (tmp_path / "texts").mkdir()
    for index in range(12):
        sound(tmp_path / f"wavs/talk{index}.wav", 1.5, seed=index)
        (tmp_path / f"texts/talk{index}.txt").write_text(WORDS[index % 3])
    common = ["experiment=audio_gpt2", f"family.base={weights / 'gpt2'}", f"family.tokenizer={weights / 'gpt2'}",
              f"family.encoder.path={weights / 'wav2vec2'}", f"family.adapt={adapt}",
              f"data.cache={tmp_path / 'cache'}", "data.embed_num_cpus=0.5"]
    words = without_aliases(PREPARE, [f"--audio_dir={tmp_path / 'wavs'}", "--transcripts_dir", str(tmp_path / "texts"),
                                      "--output_file", str(tmp_path / "out.pt"), "--verbose"])
    prepared = compose(PREPARE, [*common, *words, f"chunks_dir={tmp_path / 'chunks'}",
                                 f"run.dir={tmp_path / 'prepare'}"])
    said = prepare_all(prepared, family_from_settings(prepared.family))
    assert "12 examples" in said and "12 vectors" in said and "12 chunks" in said
    again = load_manifest(tmp_path / "out.pt", texts=str(tmp_path / "chunks"))
    assert [len(row["embedding"]) for row in again.rows] == [16] * 12 and not again.rejects
    assert {row["id"]: row["text"] for row in again.rows} == {f"talk{i}": WORDS[i % 3] for i in range(12)}

    settings = compose(TRAIN, [*common, f"data.path={tmp_path / 'wavs'}", f"data.texts={tmp_path / 'texts'}",
                               f"run.dir={tmp_path / 'run'}", "trainer.cpus_per_worker=0.5", "trainer.num_samples=1"])
    train(settings, family_from_settings(settings.family))
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert (summary["epochs"], summary["steps"]) == (3, 3) and summary["best_validation_loss"] > 0

    checkpoint = Checkpoint.open(tmp_path / "run/last")
    bases = list((tmp_path / "run/checkpoints").glob("base-*"))
    assert len(bases) == (adapt == "lora") and ("base" in checkpoint.manifest) == (adapt == "lora")
    assert any(name.startswith("base.transformer") for name in checkpoint.weights("model"))
    if adapt == "lora":
        assert (checkpoint.path / "model.safetensors").stat().st_size < bases[0].stat().st_size

    report = evaluate(compose(EVALUATE, [f"checkpoint={tmp_path / 'run'}", f"data.cache={tmp_path / 'cache'}",
                                         f"run.dir={tmp_path / 'report'}", "num_samples=2"]))
    assert {"wer", "cer", "bleu", "rouge_l"} <= set(report["metrics"])
    asked = without_aliases(GENERATE, ["--model_path", str(tmp_path / "run"), "--input_text", "yes", "--audio_file",
                                       str(tmp_path / "wavs/talk3.wav"), "max_tokens=4", "beams=2",
                                       f"output={tmp_path / 'said.txt'}"])
    assert "characters" in generate(compose(GENERATE, asked)) and (tmp_path / "said.txt").exists()
