"""Real clips and sounds beside the demo's rows, embedded by default and by pretrained networks, to playable files."""

import json

import pytest
import soundfile
import torch

from avray.cli import GENERATE, TRAIN, compose
from avray.data.demo_tasks import task_rows
from avray.media import probe_video
from avray.registry import family_from_settings

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.realdata, pytest.mark.timeout(900)]

SMALL = ["family=multitask", "family.num_layers=1", "family.width=32", "family.num_heads=2", "trainer.max_steps=3",
         "trainer.batch_size=8", "trainer.num_samples=2", "trainer.validate_every_steps=3", "data.embed_num_cpus=0.5",
         "trainer.cpus_per_worker=0.5", "data.fit_rows=400"]


@pytest.fixture(scope="module")
def rows(test_data, tmp_path_factory):
    """Rows by file of four clips and ten sounds, and of the demo those of some prompts."""
    root = test_data.resolve()
    sounds = sorted((root / "env" / "esc10").rglob("*.ogg"))[::24][:10]
    clips = sorted((root / "video").glob("*.mp4"))
    assert len(sounds) == 10 and len(clips) == 4
    real = [{"task": "audio", "instruction": "Play", "input": path.parent.name, "audio": str(path)} for path in sounds]
    real += [{"task": "video", "instruction": "Show", "input": path.stem, "video": str(path)} for path in clips]
    for index, row in enumerate(real):
        row["split"] = "validation" if index in (0, len(real) - 1) else "train"
    folder = tmp_path_factory.mktemp("rows")
    demo = task_rows()[:100]
    (folder / "mixed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in real + demo))
    files = real + [row for row in demo if row["embedding"] is None]
    (folder / "files.jsonl").write_text("".join(json.dumps(row) + "\n" for row in files))
    return folder, root


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    from transformers import VideoMAEConfig, VideoMAEModel, Wav2Vec2Config, Wav2Vec2Model

    folder = tmp_path_factory.mktemp("networks")
    torch.manual_seed(0)
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    Wav2Vec2Model(Wav2Vec2Config(**small, conv_dim=(16,) * 7, num_conv_pos_embeddings=4,
                                 num_conv_pos_embedding_groups=2)).save_pretrained(folder / "ears")
    VideoMAEModel(VideoMAEConfig(**small, image_size=32, patch_size=16, num_frames=4)).save_pretrained(folder / "eyes")
    return folder


@pytest.mark.parametrize("path", ["default", "pretrained"])
def test_real_clips_and_sounds_train_and_generate(ray_session, tmp_path, rows, networks, path):
    from avray.generation.one import generate
    from avray.train.trainer import train

    folder, root = rows
    given = [f"data.path={folder / 'mixed.jsonl'}"]
    if path == "pretrained":
        given = [f"data.path={folder / 'files.jsonl'}", f"family.encoder={{path: {networks / 'ears'}}}",
                 f"family.video_encoder={{path: {networks / 'eyes'}}}", "family.audio_width=16",
                 "family.video_width=16"]
    settings = compose(TRAIN, [*SMALL, *given, f"data.allowed_roots=[{root}]", f"data.cache={tmp_path / 'cache'}",
                               f"run.dir={tmp_path / 'run'}"])
    summary = train(settings, family_from_settings(settings.family))
    assert summary["rows"]["rejected"] == summary["rows"]["examples_rejected"] == 0
    for task, prompt, suffix in (("audio", "Play", "wav"), ("video", "Show", "mp4")):
        generate(compose(GENERATE, [f"checkpoint={tmp_path / 'run'}", f"task={task}", f"prompt={prompt}",
                                    f"output={tmp_path / f'out.{suffix}'}"]))
    assert soundfile.info(tmp_path / "out.wav").duration == pytest.approx(2.0)
    video = probe_video(str(tmp_path / "out.mp4"))
    assert (video.num_frames, video.width, video.frame_rate_hz) == (20, 64, 10.0)
