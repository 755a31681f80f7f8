"""examples/digits learns real digits, and its picture is a picture."""

import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import train
from chart import GLYPHS, PANEL_HEIGHT, PANEL_WIDTH, Panel, charts_png, draw_panel, encode_png, ticks

SEED = 7


def decoded(png: bytes) -> np.ndarray:
    """Pixels (height, width, 3) of an unfiltered 8-bit RGB file, with every checksum verified."""
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    chunks: dict[bytes, bytes] = {}
    position = 8
    while position < len(png):
        length, name = struct.unpack_from(">I4s", png, position)
        data = png[position + 8 : position + 8 + length]
        assert struct.unpack_from(">I", png, position + 8 + length)[0] == zlib.crc32(name + data)
        chunks[name] = data
        position += 12 + length
    width, height = struct.unpack_from(">II", chunks[b"IHDR"])
    rows = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(height, 1 + width * 3)
    assert not rows[:, 0].any()
    return rows[:, 1:].reshape(height, width, 3)


def test_the_data_are_all_1797_images_and_none_is_in_both_parts():
    learned, held_out = train.load(train.DATA, np.random.default_rng(SEED))
    assert len(learned.labels) + len(held_out.labels) == 1797
    assert len(held_out.labels) == 449
    assert set(learned.labels) == set(held_out.labels) == set(range(10))
    # In this data set no two images are equal, so sharing one would show here.
    assert not {row.tobytes() for row in learned.images} & {row.tobytes() for row in held_out.images}


def test_the_gradients_are_the_slopes_of_the_loss():
    random = np.random.default_rng(SEED)
    learned, _ = train.load(train.DATA, random)
    batch = train.Split(learned.images[:16], learned.labels[:16])
    layers = train.new_layers(8, random)
    step = 1e-6
    for array, gradient in zip(layers.all(), train.gradients(layers, batch), strict=True):
        index = np.unravel_index(np.abs(gradient).argmax(), gradient.shape)
        array[index] += step
        above, _ = train.evaluate(layers, batch)
        array[index] -= 2 * step
        below, _ = train.evaluate(layers, batch)
        array[index] += step
        assert gradient[index] == pytest.approx((above - below) / (2 * step), rel=1e-4)


def test_a_shifted_image_moves_by_at_most_one_pixel_and_keeps_its_ink():
    image = np.zeros((200, 8, 8))
    image[:, 3, 4] = 1
    moved = train.shifted(image.reshape(200, 64), np.random.default_rng(SEED)).reshape(200, 8, 8)
    assert (moved.sum(axis=(1, 2)) == 1).all()
    rows, columns = moved.any(axis=0).nonzero()
    assert sorted(set(rows)) == [2, 3, 4]
    assert sorted(set(columns)) == [3, 4, 5]


def test_a_few_epochs_read_nine_of_ten_unseen_digits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("DANTE_OUTPUT", str(tmp_path / "results"))
    train.main(["--epochs", "8", "--hidden-units", "64", "--seed", str(SEED)])
    metrics = json.loads((tmp_path / "results" / "metrics.json").read_text())
    assert metrics["accuracy"] >= 0.9
    assert len(metrics["train_loss"]) == metrics["epochs"] == 8
    with np.load(tmp_path / "results" / "weights.npz") as weights:
        layers = train.Layers(**weights)
    _, held_out = train.load(train.DATA, np.random.default_rng(SEED))
    assert train.evaluate(layers, held_out)[1] == metrics["accuracy"]
    picture = decoded((tmp_path / "results" / "learning_curve.png").read_bytes())
    assert picture.shape == (PANEL_HEIGHT, 2 * PANEL_WIDTH, 3)
    printed = capsys.readouterr().out.splitlines()
    assert [line for line in printed if line.startswith("epoch   8/8")]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.0, 0.25, [0.0, 0.05, 0.10, 0.15, 0.20, 0.25]),
        (0.93, 1.0, [0.92, 0.94, 0.96, 0.98, 1.0]),
        (3.0, 3.0, [3.0]),
        (1, 80, [0, 20, 40, 60, 80]),
    ],
)
def test_ticks_are_round_and_enclose_the_values(low: float, high: float, expected: list[float]):
    found = ticks(low, high)
    assert found[: len(expected)] == pytest.approx(expected)
    assert found[0] <= low
    assert found[-1] >= high
    assert len(found) >= 2


def test_a_png_holds_exactly_the_pixels_it_was_given():
    image = np.random.default_rng(SEED).random((3, 5, 3))
    assert (decoded(encode_png(image)) == np.round(image * 255)).all()


def test_a_falling_curve_is_painted_from_the_upper_left_to_the_lower_right():
    panel = draw_panel(Panel("loss", "epoch", {"train": [1.0, 0.5, 0.0]}))
    blue = (np.abs(panel - np.asarray((0.145, 0.388, 0.922))).sum(axis=2) < 0.05).nonzero()
    inside = blue[0] > 60
    rows, columns = blue[0][inside], blue[1][inside]
    assert np.corrcoef(rows, columns)[0, 1] > 0.99


def test_one_epoch_alone_can_be_drawn():
    assert decoded(charts_png([Panel("loss", "epoch", {"train": [0.5]})])).shape == (PANEL_HEIGHT, PANEL_WIDTH, 3)


@pytest.mark.parametrize("character", GLYPHS)
def test_each_glyph_fills_its_box(character: str):
    assert [len(row) for row in GLYPHS[character].split("/")] == [5] * 9
