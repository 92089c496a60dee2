"""The page, its pictures and its links, read back."""

import re
from html.parser import HTMLParser

import numpy as np
import pytest
import soundfile
from PIL import Image

from avray.evaluation.report import ReportExample, write_report
from avray.media import Audio, Video
from avray.metrics.pictures import (
    comparison_png,
    curve_png,
    mel_spectrogram_db,
    spectrogram_png,
    spectrogram_rgb,
)
from avray.metrics.spectral import mel

RATE = 16_000


def sine(frequency_hz: float, seconds: float = 0.5, amplitude: float = 0.1, rate: int = RATE) -> Audio:
    time_s = np.arange(int(seconds * rate)) / rate
    return Audio((amplitude * np.sin(2 * np.pi * frequency_hz * time_s)).astype(np.float32)[None], rate)


class Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.sources += [value for name, value in attributes if name in ("src", "href")]


def read(path) -> Links:
    links = Links()
    links.feed(path.read_text(encoding="utf-8"))
    return links


SUMMARY = {
    "family": "continuation", "validation_loss": 0.5, "baselines": {"repeat": 0.9, "mean": 0.4},
    "metrics": {"log_spectral_distance_db": 12.345, "frechet": float("nan")}, "parameters": 859_520,
    "rows": {"used": 10, "rejected": 0}, "checkpoint": None,
}


def test_report_links_to_what_it_wrote(tmp_path):
    examples = [
        ReportExample("songs/a b.wav#3", sine(300), sine(400), sine(500, 0.25), {"wer": 0.25}),
        ReportExample("songs/a b.wav#3", None, None, Audio(np.zeros((1, 0), np.float32), RATE)),
        ReportExample("<script>alert(1)</script>", "say <b>this</b>", None, sine(600)),
        ReportExample("clip", "a ball", None, Video(np.zeros((4, 16, 16, 3), np.uint8), 8.0)),
        ReportExample("text", None, "wanted", "given & taken"),
    ]
    path = write_report(tmp_path / "run", SUMMARY, examples, title="A & B",
                        curves={"validation": [(0, 1.0), (9, 0.5)]},
                        details={"frechet": {"embedding": "spectral", "num_generated": 1200}})
    links, page = read(path), path.read_text(encoding="utf-8")
    assert path == tmp_path / "run" / "report.html"
    assert "script" not in links.tags and "b" not in links.tags
    assert all((path.parent / source).is_file() for source in links.sources)
    assert not any(source.startswith(("/", "..")) for source in links.sources)
    assert len(set(links.sources)) == len(links.sources) == 2 + 4 + 1
    samples, rate = soundfile.read(path.parent / "samples" / "000-songs_a_b.wav_3.generated.wav")
    assert rate == RATE and len(samples) == 4000
    for text in ("empty: nothing to play", "given &amp; taken", "say &lt;b&gt;this", "A &amp; B", "859,520",
                 "wer 0.25", "embedding spectral, num generated 1,200", "<td class=n>12.35</td>",
                 "<td class=n>nan</td>"):
        assert text in page, text


def test_losses_are_ranked_beside_the_baselines(tmp_path):
    page = write_report(tmp_path, SUMMARY, []).read_text(encoding="utf-8")
    rows = re.findall(r"<tr[^>]*><td>([^<]+)</td><td class=n>([^<]+)</td><td>([^<]*)</td></tr>", page)
    assert rows == [("baseline: mean", "0.4", "the model is 25.0 % above"), ("this model", "0.5", ""),
                    ("baseline: repeat", "0.9", "the model is 44.4 % below")]
    assert not (tmp_path / "samples").exists() and not (tmp_path / "spectrograms.png").exists()
    assert "Validation loss" not in write_report(tmp_path, {"metrics": {"a": 1.0}}, []).read_text()


def test_spectrogram_shows_the_tone_where_it_is():
    bands = mel_spectrogram_db(sine(1000)).mean(axis=0)
    assert bands.argmax() == pytest.approx(97 * mel(1000) / mel(RATE / 2) - 1, abs=1)
    assert bands.max() == pytest.approx(-20, abs=3)
    np.testing.assert_allclose(mel_spectrogram_db(sine(1000, amplitude=0)), -100, atol=1e-3)
    assert len(mel_spectrogram_db(sine(1000, seconds=600))) <= 4001


def test_pictures_have_their_size_and_content(tmp_path):
    loud, quiet = spectrogram_rgb(sine(1000)), spectrogram_rgb(sine(1000, amplitude=1e-4))
    assert loud.shape == quiet.shape == (300, 800, 3) and loud.dtype == np.uint8
    assert loud.astype(int).sum() > quiet.astype(int).sum()
    spectrogram_png(tmp_path / "one.png", sine(1000), "a tone")
    assert Image.open(tmp_path / "one.png").size == (800, 300)
    nothing = Audio(np.zeros((2, 0), np.float32), RATE)
    broken = Audio(np.full((1, 99), np.nan, np.float32), RATE)
    rows = [("a", sine(300), sine(400), sine(500, rate=24_000)), ("b", "costs $5_2", None, nothing),
            ("c" * 99, None, broken, "text")]
    comparison_png(tmp_path / "page.png", rows)
    assert Image.open(tmp_path / "page.png").size == (1300, 580)
    comparison_png(tmp_path / "narrow.png", [("a", None, sine(400), sine(500))])
    assert Image.open(tmp_path / "narrow.png").size[0] == 900
    with pytest.raises(ValueError, match="at least one row"):
        comparison_png(tmp_path / "none.png", [])


def test_curves(tmp_path):
    train = [(0, 5.0), (1, float("nan")), (2, 0.01)]
    curve_png(tmp_path / "a.png", {"train": train, "empty": []}, {"mean": 0.4})
    curve_png(tmp_path / "b.png", {})
    assert Image.open(tmp_path / "a.png").size == Image.open(tmp_path / "b.png").size == (800, 450)
