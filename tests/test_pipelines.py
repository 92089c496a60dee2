"""The commands' own functions, on real files through the shared Ray: prepare, train, resume, evaluate, generate."""

import json
import shutil
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import ray
import soundfile
import torch

from avray.checkpoint import Checkpoint, newest
from avray.cli import EVALUATE, GENERATE, PREPARE, TRAIN, compose
from avray.errors import CheckpointError, DataError, TrainingFailed, WorkerFailed
from avray.media import Video, write_video
from avray.registry import family_from_settings

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]

CONTINUATION = ["family.segment_s=0.4", "family.num_layers=1", "family.num_heads=4", "family.feed_forward=32"]
CODEC_LM = ["family=codec_lm", "family.segment_s=0.4", "family.num_layers=1", "family.num_heads=2", "family.width=32",
            "family.num_codebooks=2", "family.context=128", "codec.cardinality=16", "codec.num_codebooks=2",
            "codec.frames_per_centroid=8"]
AUDIO_GPT2 = ["family=audio_gpt2", "family.segment_s=4", "family.overlap_s=1", "family.num_layers=1",
              "family.num_heads=2", "family.width=32", "family.stem_layers=1", "family.context=16",
              "family.augment.speed=0.1"]
INSTRUCT = ["family=instruct", "family.network.width=16", "family.network.num_layers=2", "family.network.num_heads=2",
            "family.text_layers=1", "family.text_heads=2", "family/adapter=prefix", "family.num_steps=2"]
MULTITASK = ["family=multitask", "family.segment_s=0.4", "family.num_layers=1", "family.num_heads=2", "family.width=32",
             "family.head=flow", "data.fit_rows=400"]
SILENT, WIDE = "trainer.num_samples=0", "trainer.cpus_per_worker=4.5"
FAMILIES = {"continuation": CONTINUATION, "codec_lm": CODEC_LM, "audio_gpt2": AUDIO_GPT2, "instruct": INSTRUCT,
            "multitask": MULTITASK}


@pytest.fixture(scope="module")
def wavs(tmp_path_factory):
    """12 recordings of 3 s, gliding tones."""
    folder = tmp_path_factory.mktemp("wavs")
    time_s = np.arange(3 * 16_000) / 16_000
    for index in range(12):
        pitch = 200 * 1.1**index * (1 + 0.1 * time_s)
        soundfile.write(folder / f"tone{index}.wav", 0.3 * np.sin(2 * np.pi * pitch * time_s), 16_000)
    return folder


@pytest.fixture(scope="module")
def spoken(wavs, tmp_path_factory):
    """The same with a word beside each."""
    folder = tmp_path_factory.mktemp("spoken")
    for path in wavs.iterdir():
        shutil.copy(path, folder)
        (folder / f"{path.stem}.txt").write_text("low" if int(path.stem.removeprefix("tone")) < 6 else "high")
    return folder


@pytest.fixture(scope="module")
def tasks(wavs, tmp_path_factory):
    """The recordings and a clip as rows of the five-task model, and rows with numbers or text alone."""
    folder = tmp_path_factory.mktemp("tasks")
    frames = np.random.default_rng(0).integers(0, 255, (20, 32, 32, 3), np.uint8)
    write_video(folder / "clip.mp4", Video(frames, 10.0))
    rows = []
    for index in range(12):
        shutil.copy(wavs / f"tone{index}.wav", folder)
        rows += [{"task": "audio", "instruction": "Play", "input": f"{index}", "audio": f"tone{index}.wav"},
                 {"task": "audio", "instruction": "Play", "input": f"x{index}", "embedding": [-index / 12] * 128},
                 {"task": "video", "instruction": "Show", "input": f"{index}", "embedding": [index / 12] * 256},
                 {"task": "text", "instruction": "Say", "input": f"{index}", "output": f"{index} {index}"},
                 {"task": "code", "instruction": "Add", "input": f"{index}", "output": f"x + {index}"},
                 {"task": "image", "instruction": "Draw", "input": f"{index}", "output": f"<a {index}>"}]
    rows.append({"task": "video", "instruction": "Show", "input": "clip", "video": "clip.mp4"})
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "rows.jsonl").write_bytes(lines.encode("utf-16"))
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def settings(wavs, cache, run_dir, *overrides, family="continuation"):
    return compose(TRAIN, [
        f"data.path={wavs}", f"data.cache={cache}", f"run.dir={run_dir}", "data.embed_num_cpus=0.5",
        "trainer.cpus_per_worker=0.5", "trainer.max_steps=6", "trainer.batch_size=6", "trainer.validate_every_steps=3",
        "trainer.num_samples=1", "trainer.checkpoint_every_steps=2", "trainer.log_every_steps=1",
        "trainer.sample_every_steps=6", *FAMILIES[family], *overrides])


def run(settings):
    from avray.train.trainer import train

    return train(settings, family_from_settings(settings.family))


def weights(run_dir):
    return Checkpoint.open(Path(run_dir) / "last").weights("model")


def same(a, b):
    return set(a) == set(b) and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("family", ["continuation", "codec_lm", "audio_gpt2", "instruct"])
def test_every_verb(ray_session, tmp_path, wavs, spoken, family):
    """prepare → train → resume → evaluate → generate, from nothing."""
    writes, reads = family == "audio_gpt2", family == "instruct"
    made, prompts = "txt" if writes else "wav", wavs
    wavs = spoken if writes or reads else wavs
    if reads:
        prompts = tmp_path / "prompts.jsonl"
        prompts.write_text("".join(f'{{"id": "tone{index}", "text": "low"}}\n' for index in range(12)))
    from avray.data.prepare import check, prepare_all
    from avray.evaluation.evaluate import evaluate
    from avray.generation.many import generate_many
    from avray.generation.one import generate

    cache = tmp_path / "cache"
    common = [f"data.path={wavs}", f"data.cache={cache}", "data.embed_num_cpus=0.5"]
    prepare = compose(PREPARE, [*common, *FAMILIES[family], f"run.dir={tmp_path / 'prepare'}"])
    assert ("nothing was encoded" in check(prepare) and not cache.exists()) or not list(cache.glob("shards/*"))
    assert " computed now, 0 rejected" in prepare_all(prepare, family_from_settings(prepare.family))
    assert "(0 computed now" in prepare_all(prepare, family_from_settings(prepare.family))

    whole = settings(wavs, cache, tmp_path / "whole", "data.mode=prepared", family=family)
    summary = run(whole)
    written = json.loads((tmp_path / "whole" / "summary.json").read_text())
    assert summary == written
    assert written["steps"] == 6 and written["best_validation_loss"] > 0 and written["baselines"]
    examples = written["rows"]["examples"]
    assert written["rows"] == {"used": 12, "rejected": 0, "examples": examples, "examples_rejected": 0}
    assert (tmp_path / "whole" / "metrics.csv").exists() and list((tmp_path / "whole" / "tensorboard").glob("events*"))
    for step in (0, 6):
        assert len(list((tmp_path / "whole" / "samples" / f"step-{step:08d}").glob(f"*.generated.{made}"))) == 1

    run(settings(wavs, cache, tmp_path / "cut", SILENT, "trainer.stop_at_step=4", family=family))
    run(settings(wavs, cache, tmp_path / "cut", SILENT, "resume=true", family=family))
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))

    report = evaluate(compose(EVALUATE, [f"checkpoint={tmp_path / 'whole' / 'best'}", f"data.cache={cache}",
                                         f"run.dir={tmp_path / 'report'}", "num_samples=2"]))
    assert report["validation_loss"] == pytest.approx(written["best_validation_loss"], rel=1e-4)
    assert report["baselines"] == pytest.approx(written["baselines"], rel=1e-4)
    if family == "codec_lm":
        bits = report["metrics"]["bits_per_token"]
        assert bits == pytest.approx(report["validation_loss"] / np.log(2), rel=1e-3)
        assert {"bits_per_token_codebook_2", "token_accuracy", "frechet_distance_codec_latents", "level_error_db",
                "silence_fraction"} <= set(report["metrics"])
        assert "latents of spectral" in (tmp_path / "report" / "report.html").read_text()
    if writes:
        assert {"wer", "cer", "bleu", "rouge_l", "perplexity_per_word", "perplexity_per_word_without_audio"} \
            == set(report["metrics"])
        assert report["metrics"]["perplexity_per_word"] == pytest.approx(np.exp(report["terms"]["per_word"]), rel=1e-3)
    assert (tmp_path / "report" / "report.html").exists()
    assert writes or (tmp_path / "report" / "spectrograms.png").exists()

    if reads:
        assert {"duration_within_10_percent", "pitch_error_cents"} <= set(report["metrics"])

    said = generate(compose(GENERATE, [f"checkpoint={tmp_path / 'whole'}",
                                       "prompt=low" if reads else f"audio={prompts / 'tone3.wav'}",
                                       "max_tokens=5" if writes else "seconds=1",
                                       f"output={tmp_path / f'out.{made}'}"]))
    assert ("characters" if writes else "1.00 s at 24000 Hz") in said
    assert (tmp_path / f"out.{made}").exists()
    assert writes or soundfile.info(tmp_path / "out.wav").frames == 24_000

    many = compose(GENERATE, [f"checkpoint={tmp_path / 'whole'}", f"data.path={prompts}", "data.max_samples=3",
                              *([] if writes else ["seconds=0.4"]), f"output={tmp_path / 'many'}", "slots=2"])
    assert "3 of 3 results" in generate_many(many)
    (tmp_path / "many" / f"tone1.{made}").unlink()
    before = (tmp_path / "many" / f"tone0.{made}").stat().st_mtime_ns
    assert "(1 made now)" in generate_many(many)
    assert (tmp_path / "many" / f"tone0.{made}").stat().st_mtime_ns == before


def test_a_run_is_never_overwritten_or_resumed_by_accident(ray_session, tmp_path, wavs, cache):
    run(settings(wavs, cache, tmp_path / "run", SILENT, "trainer.max_steps=1"))
    with pytest.raises(ValueError, match="already holds a run .* resume=true, or give another run.dir"):
        run(settings(wavs, cache, tmp_path / "run"))
    with pytest.raises(CheckpointError, match="has no complete checkpoint"):
        run(settings(wavs, cache, tmp_path / "none", "resume=true"))


class KillsItsController:
    """A hook that kills the controller of its group before the second validation, once."""

    def __init__(self, folder):
        self.done = Path(folder) / "killed"

    def on_validation_start(self, loop):
        if loop.step and not self.done.exists():
            self.done.touch()
            killed = [one for one in psutil.Process().parent().children() if "TrainController" in one.cmdline()[0]]
            assert killed
            for one in killed:
                one.kill()
            time.sleep(60)  # until this worker's end, which its owner's is


def test_a_lost_controller_is_a_failure_like_another(ray_session, tmp_path, wavs, cache):
    """There is no room for two groups: what the first had reserved has to be given back."""
    hook = f"trainer.hooks=[{{_target_: {__name__}.KillsItsController, folder: {tmp_path}}}]"
    with pytest.raises(WorkerFailed, match="workers was lost, with trainer.max_failures = 0: go on by resume=true"):
        run(settings(wavs, cache, tmp_path / "run", SILENT, WIDE, hook))
    (tmp_path / "killed").unlink()
    summary = run(settings(wavs, cache, tmp_path / "again", SILENT, WIDE, hook, "trainer.max_failures=1"))
    assert summary["steps"] == 6 and (tmp_path / "killed").exists()
    run(settings(wavs, cache, tmp_path / "run", SILENT, WIDE, "resume=true"))
    assert same(weights(tmp_path / "run"), weights(tmp_path / "again"))


def test_dry_run_does_everything_once(ray_session, tmp_path, wavs, cache):
    summary = run(settings(wavs, cache, tmp_path / "run", "dry_run=true"))
    assert summary["steps"] == 1
    assert summary["memory_bytes"]["weights"] == 4 * summary["parameters"]
    assert summary["memory_bytes"]["activations"] > 0
    assert list((tmp_path / "run" / "samples").rglob("*.generated.wav"))


def test_the_board_keeps_every_message_in_order(ray_session):
    from avray.train.board_actor import open_board

    board, taken = open_board(), []
    for number in range(2000):
        board.tell.remote("figures", number)
        if number % 50 == 0:
            taken += ray.get(board.take.remote())
    taken += ray.get(board.take.remote())
    assert taken == [("figures", number) for number in range(2000)]


def test_prepared_mode_refuses_what_is_not_prepared(ray_session, tmp_path, wavs):
    with pytest.raises(DataError, match="the cache lacks .* run pipelines/prepare.py"):
        run(settings(wavs, tmp_path / "cache", tmp_path / "run", "data.mode=prepared"))


def test_a_learning_rate_that_explodes_ends_with_a_sentence_and_keeps_the_last_checkpoint(
        ray_session, tmp_path, wavs, cache):
    with pytest.raises(TrainingFailed, match="not finite at step"):
        run(settings(wavs, cache, tmp_path / "run", SILENT, f"+trainer.hooks=[{{_target_: {__name__}.Explode}}]"))
    assert Checkpoint.open(newest(tmp_path / "run"))


class Explode:
    def on_validation_end(self, loop):
        with torch.no_grad():
            next(loop.model.parameters()).fill_(float("nan")) if loop.step == 3 else None


def test_media_that_cannot_be_decoded_are_counted_and_the_threshold_stops_the_run(ray_session, tmp_path, wavs):
    import shutil

    folder = tmp_path / "wavs"
    shutil.copytree(wavs, folder)
    flac = folder / "broken.flac"
    samples, rate = soundfile.read(folder / "tone0.wav")
    soundfile.write(flac, samples, rate)
    content = bytearray(flac.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 2000] = b"\xff" * 2000  # the header is good, the middle is not
    flac.write_bytes(content)
    with pytest.raises(DataError, match="could not be decoded, over data.max_reject_fraction"):
        run(settings(folder, tmp_path / "cache", tmp_path / "run", SILENT))
    summary = run(settings(folder, tmp_path / "cache", tmp_path / "run2", SILENT, "data.max_reject_fraction=0.5"))
    assert summary["rows"]["examples_rejected"] > 0
    rejects = [json.loads(line) for line in (tmp_path / "run2" / "rejects.jsonl").read_text().splitlines()]
    assert rejects and all("broken" in reject["source"] for reject in rejects)


def test_the_five_tasks_through_every_verb(ray_session, tmp_path, tasks, cache):
    """check → prepare → train → resume → evaluate → generate: numbers, recordings and a clip, one of them broken."""
    from avray.data.prepare import check, prepare_all
    from avray.evaluation.evaluate import evaluate
    from avray.generation.many import generate_many
    from avray.generation.one import generate

    rows = tasks / "rows.jsonl"
    common = [f"data.path={rows}", f"data.cache={cache}", "data.embed_num_cpus=0.5"]
    prepare = compose(PREPARE, [*common, *MULTITASK, f"run.dir={tmp_path / 'prepare'}"])
    family = family_from_settings(prepare.family)
    assert "nothing was encoded" in check(prepare, family)
    checked = json.loads((tmp_path / "prepare" / "summary.json").read_text())
    assert checked["tasks"]["audio"] == 24 and checked["dimensions"] == {"audio: 128 numbers": 12,
                                                                          "video: 256 numbers": 12}
    assert " 0 rejected)" in prepare_all(prepare, family)

    whole = run(settings(rows, cache, tmp_path / "whole", "trainer.num_samples=6", family="multitask"))
    assert whole["steps"] == 6 and set(whole["baselines"]) == {"simple"} and whole["rows"]["used"] == 73
    made = {path.suffix for path in (tmp_path / "whole" / "samples" / "step-00000006").glob("*.generated.*")}
    assert made and made <= {".wav", ".mp4", ".txt"}
    run(settings(rows, cache, tmp_path / "cut", SILENT, "trainer.stop_at_step=4", family="multitask"))
    run(settings(rows, cache, tmp_path / "cut", SILENT, "resume=true", family="multitask"))
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))

    report = evaluate(compose(EVALUATE, [f"checkpoint={tmp_path / 'whole' / 'best'}", f"data.cache={cache}",
                                         f"run.dir={tmp_path / 'report'}", "num_samples=6", "split=all"]))
    assert {"text_perplexity", "code_accuracy", "audio_cosine", "video_retrieval_top_5",
            "video_mean_embedding_mse"} <= set(report["metrics"])
    for task, suffix in (("audio", "wav"), ("video", "mp4"), ("text", "txt")):
        out, numbers = tmp_path / f"out.{suffix}", tmp_path / f"{task}.json"
        beside = [] if task == "text" else [f"embedding={numbers}"]
        generate(compose(GENERATE, [f"checkpoint={tmp_path / 'whole'}", f"task={task}", "prompt=Play 3", "count=100",
                                    "temperature=0.7", f"output={out}", *beside]))
        assert out.exists() and (task == "text" or json.loads(numbers.read_text())["task"] == task)
    many = compose(GENERATE, [f"checkpoint={tmp_path / 'whole'}", f"data.path={rows}", "data.max_samples=6",
                              f"output={tmp_path / 'many'}", "slots=2"])
    assert "6 of 6 results" in generate_many(many)

    bad = tasks / "bad.jsonl"
    bad.write_text(rows.read_bytes().decode("utf-16") + json.dumps({"task": "audio", "embedding": [0.0] * 120}) + "\n")
    with pytest.raises(DataError, match="bad.jsonl line 74: the embedding has 120 numbers, and audio has 128"):
        run(settings(bad, cache, tmp_path / "bad", family="multitask"))
