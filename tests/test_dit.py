"""The diffusion transformer and what conditions it: masks, absence, and what may be worked out beforehand."""

import dataclasses

import pytest
import torch

from avray.nn.conditioning import Adapter, AdapterConfig, AlignedEncoder, Tokens, init_conditioning, stretched
from avray.nn.dit import Conditions, DiT, DiTConfig

CONFIG = DiTConfig(width=16, num_layers=4, num_heads=2, mlp_ratio=2.0)
CHANNELS, TIME, TEXT = 6, 11, 5


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def network(config=CONFIG):
    """With every weight away from 0, so that each path counts."""
    made = DiT(config, CHANNELS)
    generator = torch.Generator().manual_seed(0)
    made.init(generator)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    return made.eval()


def conditions(rows=2, text=TEXT, aligned=True, time=TIME):
    return Conditions(noise(rows, text, 16, seed=1), torch.ones(rows, text, dtype=torch.bool), noise(rows, 16, seed=2),
                      noise(rows, time, 16, seed=3) if aligned else None)


@pytest.mark.parametrize("patch", [1, 2, 3])
@pytest.mark.parametrize("adaln", ["full", "single"])
def test_what_is_masked_changes_nothing(patch, adaln):
    made = network(dataclasses.replace(CONFIG, patch=patch, adaln=adaln))
    asked, levels = conditions(1), torch.tensor([0.4])
    x = noise(1, TIME, CHANNELS)
    alone = made(x, levels, asked)
    wide = torch.nn.functional.pad
    longer = TIME + 2 * patch
    padded = Conditions(wide(asked.tokens, (0, 0, 0, 3), value=9.0), wide(asked.token_valid, (0, 3)), asked.summary,
                        wide(asked.aligned, (0, 0, 0, 2 * patch)))
    valid = torch.arange(longer)[None] < TIME
    beside = made(wide(x, (0, 0, 0, 2 * patch)), levels, padded, valid)
    torch.testing.assert_close(beside[:, :TIME], alone, rtol=1e-4, atol=1e-5)


def test_one_token_alone_is_what_attention_gives():
    made, asked, levels = network(), conditions(text=1), torch.tensor([0.3, 0.8])
    masked = Conditions(torch.cat([asked.tokens, noise(2, 4, 16)], 1), torch.tensor([[True] + [False] * 4] * 2),
                        asked.summary, asked.aligned)
    x = noise(2, TIME, CHANNELS)
    torch.testing.assert_close(made(x, levels, masked), made(x, levels, asked), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(made(x, levels, masked.compact()), made(x, levels, asked))


def test_every_condition_is_heard():
    made, x, levels, asked = network(), noise(2, TIME, CHANNELS), torch.tensor([0.3, 0.8]), conditions()
    plain = made(x, levels, asked)
    for name in ("tokens", "summary", "aligned"):
        other = dataclasses.replace(asked, **{name: getattr(asked, name) + 0.5})
        assert (made(x, levels, other) - plain).abs().max() > 1e-3, name
    assert (made(x, levels + 0.1, asked) - plain).abs().max() > 1e-3
    assert (made(x, levels, dataclasses.replace(asked, aligned=None)) - plain).abs().max() > 1e-3


def test_a_new_network_foresees_silence():
    """From anywhere its direction leads to 0, of the sound, in one step; at the lowest levels it stays finite."""
    made = DiT(CONFIG, CHANNELS)
    made.init(torch.Generator().manual_seed(0))
    x, levels = noise(2, TIME, CHANNELS), torch.tensor([0.1, 0.9])
    torch.testing.assert_close(made(x, levels, conditions()), x / levels[:, None, None])
    assert made(x, torch.zeros(2), conditions()).isfinite().all()


@pytest.mark.parametrize("patch", [1, 3])
def test_what_is_heard_may_pass_to_the_exit(patch):
    """A gate of 1 leads to the very sound, of 0 nowhere else than without it; every bit passes, whatever the patch."""
    made = DiT(dataclasses.replace(CONFIG, patch=patch), CHANNELS, has_heard=True)
    made.init(torch.Generator().manual_seed(0))
    x, levels, heard = noise(2, TIME, CHANNELS), torch.tensor([0.1, 0.9]), noise(2, TIME, CHANNELS, seed=4)
    asked = dataclasses.replace(conditions(), heard=heard)
    torch.testing.assert_close(made(x, levels, asked), x / levels[:, None, None])
    torch.nn.init.ones_(made.keep.bias)
    torch.testing.assert_close(x - levels[:, None, None] * made(x, levels, asked), heard)
    assert asked.compact().heard is heard


@pytest.mark.parametrize("wrong", [{"num_layers": 3}, {"num_heads": 5}, {"adaln": "zero"}, {"width": 0},
                                   {"dropout": 1.0}])
def test_bad_sizes_are_refused_by_name(wrong):
    with pytest.raises(ValueError, match=f"family.network.{next(iter(wrong))}"):
        DiTConfig(**wrong)


def test_tokens_are_stretched_over_their_frames():
    tokens = Tokens(torch.arange(1.0, 4.0)[None, :, None].repeat(2, 1, 1),
                    torch.tensor([[True] * 3, [True, True, False]]))
    made = stretched(tokens, torch.tensor([[1.0, 2.0, 1.0], [1.0, 1.0, 7.0]]), torch.tensor([8, 4]), 10)[..., 0]
    assert made[0].tolist() == [1, 1, 2, 2, 2, 2, 3, 3, 0, 0]
    assert made[1].tolist() == [1, 1, 2, 2, 0, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("name", ["prefix", "cross_attention", "plain"])
def test_adapters_hear_the_instruction_or_not(name):
    adapter = Adapter(AdapterConfig(name), 16, 2)
    init_conditioning(adapter, torch.Generator().manual_seed(0))
    content = Tokens(noise(2, 3, 16), torch.ones(2, 3, dtype=torch.bool))
    made = [adapter.text(content, Tokens(noise(2, 4, 16, seed=seed), torch.ones(2, 4, dtype=torch.bool)))
            for seed in (5, 6)]
    assert made[0].values.shape[1] == (7 if name == "prefix" else 3)
    same = torch.equal(made[0].values[:, -3:], made[1].values[:, -3:])
    assert same == (name == "plain")


def test_what_lies_in_time_may_be_absent():
    encoder = AlignedEncoder({"notes": 3, "sound": 2}, 8)
    init_conditioning(encoder, torch.Generator().manual_seed(0))
    frames = {"notes": noise(2, 7, 3), "sound": noise(2, 9, 2)}
    there = {"notes": torch.tensor([True, False]), "sound": torch.tensor([False, False])}
    lengths = torch.tensor([5, 4])
    made = encoder(frames, there, lengths, 5)
    assert made.shape == (2, 5, 8)
    torch.testing.assert_close(made[1], encoder.absent.expand(5, -1))
    torch.testing.assert_close(made[0], encoder({"notes": frames["notes"]}, {"notes": there["notes"]}, lengths, 5)[0])
    one = {"notes": frames["notes"][1:]}
    before = encoder(one, {"notes": torch.tensor([True])}, lengths[1:], 4)
    after = encoder(one, {"notes": torch.tensor([True])}, lengths[1:], 7)
    torch.testing.assert_close(after[:, :4], before)
