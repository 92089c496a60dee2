import dataclasses

import pytest
import torch
from torch import nn

from avray.cli import TRAIN, compose
from avray.data.cluster import Needs
from avray.registry import family_from_settings
from avray.train.memory import count_parameters, estimate
from avray.train.parallel import recompute_activations
from avray.train.trainer import needs


def test_a_run_is_counted_out_with_one_cpu_to_spare():
    settings = compose(TRAIN, ["data.embed_workers=3", "data.embed_num_gpus=0.5", "trainer.num_workers=2",
                               "trainer.use_gpu=true", "trainer.cpus_per_worker=4"])
    plan = needs(settings, pools=2)
    assert plan.cpus == 2 * 3 * 1 + 2 * 4 + 1
    assert plan.gpus == 2 * 3 * 0.5 + 2
    assert needs(settings, pools=2, trials=2).cpus == 2 * 14 + 1


def test_a_run_that_can_never_be_scheduled_is_refused_with_the_cure():
    plan = Needs(pools=1, embed_workers=2, trainers=2)
    assert plan.refusal({"CPU": 5.0}) is None
    assert "needs 5 logical CPUs" in (plan.refusal({"CPU": 4.0}) or "")
    refusal = Needs(pools=1, trainers=1, trainer_gpus=1).refusal({"CPU": 8.0}) or ""
    assert "needs 1 logical GPUs" in refusal and "lower trainer.num_workers" in refusal


def test_workers_that_may_be_fewer_are_counted_so():
    settings = compose(TRAIN, ["trainer.num_workers=[2,8]", "trainer.max_failures=3"])
    plan = needs(settings, pools=1)
    assert plan.cpus == 1 + 8 + 1 and plan.refusal({"CPU": 4.0}) is None
    assert "2 trainers of 1 CPU" in (plan.refusal({"CPU": 3.0}) or "")


@pytest.mark.parametrize(("given", "words"), [
    (["trainer.num_workers=[2,8]"], "needs trainer.max_failures above 0"),
    (["trainer.num_workers=[8,2]", "trainer.max_failures=1"], r"trainer.num_workers=\[8,2\] must be the fewest"),
    (["trainer.num_workers=[0,2]", "trainer.max_failures=1"], "trainer.min_workers must be at least 1"),
    (["trainer.num_workers=[2,4]", "trainer.max_failures=1", "trainer.cpus_per_worker=0.5"], "must be a whole number"),
    (["trainer.num_workers=[1,2,3]"], "trainer.num_workers must be a"),
])
def test_a_fewest_and_a_most_that_cannot_be(given, words):
    with pytest.raises(ValueError, match=words):
        compose(TRAIN, given)


class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3)])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def test_recomputed_activations_give_the_same_gradient_and_the_same_names():
    torch.manual_seed(0)
    plain, again = Layers(), Layers()
    again.load_state_dict(plain.state_dict())
    recompute_activations(again)
    x = torch.randn(4, 8)
    for model in (plain, again):
        model(x).square().sum().backward()
    assert list(plain.state_dict()) == list(again.state_dict())
    for a, b in zip(plain.parameters(), again.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


def codec_lm(*overrides):
    """The family, with what fitting would give, and one batch like those of training."""
    import numpy as np

    from avray.family import Fitted

    settings = compose(TRAIN, ["experiment=codec_lm", "codec=spectral", *overrides])
    family = family_from_settings(settings.family)
    cardinality = 1024
    fitted = Fitted({}, {"codec": family.codec.column_id(), "cardinality": cardinality, "frame_rate_hz": 75.0})
    frames = round(family.segment_s * 75)
    rows = [{"id": str(i), "weight": 1.0, "audio.codes": np.zeros((frames, family.num_codebooks), np.uint16)}
            for i in range(settings.trainer.batch_size // settings.trainer.accumulate)]
    return family, fitted, family.collate(rows, fitted), settings.trainer


def test_the_original_codec_lm_fits_16_gb_by_the_estimate():
    family, fitted, batch, trainer = codec_lm()
    memory = estimate(family, fitted, batch, trainer)
    assert memory.weights == 4 * count_parameters(family, fitted) == 4 * 12_213_504
    assert memory.optimizer == 2 * memory.weights and memory.ema == 0
    assert memory.total < 16e9, str(memory)


@dataclasses.dataclass(frozen=True)
class Named:
    """Stands for an encoder whose weights are not at hand."""

    name: str

    def column_id(self):
        return self.name


def test_the_original_audio_gpt2_fits_8_gb_by_the_estimate():
    import numpy as np

    from avray.family import Fitted

    settings = compose(TRAIN, ["experiment=audio_gpt2"])
    family = family_from_settings(settings.family)
    base = {"model_type": "gpt2", "n_embd": 1024, "n_layer": 24, "n_head": 16}
    arrays = {"mean": np.zeros(768, np.float32), "scale": np.ones(768, np.float32)}
    fitted = Fitted(arrays, {"features": "wav2vec2", "width": 768, "base": base, "tokens": {"kind": "bytes"}})
    family = dataclasses.replace(family, encoder=Named("wav2vec2"))
    assert settings.trainer.batch_size == settings.trainer.accumulate, "one window at a time"
    row = {"id": "", "weight": 1.0, "text": "w" * 200, "audio.features": np.zeros((1000, 768), np.float32)}
    memory = estimate(family, fitted, family.collate([row], fitted), settings.trainer)
    assert memory.weights == 4 * 359_811_072
    assert memory.total < 8e9, str(memory)


def test_recomputing_saves_memory_by_the_estimate():
    whole = codec_lm()
    saving = codec_lm("trainer.activation_checkpointing=true")
    assert estimate(*saving).activations < 0.5 * estimate(*whole).activations
