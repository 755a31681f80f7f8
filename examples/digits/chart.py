"""Line charts as PNG files with NumPy and the standard library: enough for a learning curve, and nothing to install."""

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
from numpy.typing import NDArray

type Image = NDArray[np.float64]
"""Shape (height, width, 3), red green blue, each 0..1."""

type Colour = tuple[float, float, float]

BACKGROUND: Colour = (1.0, 1.0, 1.0)
PANEL: Colour = (0.973, 0.976, 0.984)
GRID: Colour = (0.867, 0.882, 0.906)
AXIS: Colour = (0.420, 0.447, 0.502)
TEXT: Colour = (0.122, 0.161, 0.216)
CURVE_COLOURS: Sequence[Colour] = ((0.145, 0.388, 0.922), (0.918, 0.345, 0.047), (0.086, 0.639, 0.290))

PANEL_WIDTH, PANEL_HEIGHT = 480, 380
MARGIN_LEFT, MARGIN_RIGHT, MARGIN_TOP, MARGIN_BOTTOM = 74, 22, 52, 62
GLYPH_WIDTH, GLYPH_HEIGHT, TEXT_SCALE = 5, 9, 2
TICKS_WANTED = 5

# Five columns, nine rows (seven above the base line, two below), row by row from the top.
GLYPHS = {
    " ": "...../...../...../...../...../...../...../...../.....",
    "%": "##..#/##..#/...#./..#../.#.../#..##/#..##/...../.....",
    "-": "...../...../...../.###./...../...../...../...../.....",
    ".": "...../...../...../...../...../.##../.##../...../.....",
    "0": ".###./#...#/#..##/#.#.#/##..#/#...#/.###./...../.....",
    "1": "..#../.##../..#../..#../..#../..#../.###./...../.....",
    "2": ".###./#...#/....#/...#./..#../.#.../#####/...../.....",
    "3": ".###./#...#/....#/..##./....#/#...#/.###./...../.....",
    "4": "...#./..##./.#.#./#..#./#####/...#./...#./...../.....",
    "5": "#####/#..../####./....#/....#/#...#/.###./...../.....",
    "6": "..##./.#.../#..../####./#...#/#...#/.###./...../.....",
    "7": "#####/....#/...#./..#../..#../.#.../.#.../...../.....",
    "8": ".###./#...#/#...#/.###./#...#/#...#/.###./...../.....",
    "9": ".###./#...#/#...#/.####/....#/...#./.##../...../.....",
    "a": "...../...../.###./....#/.####/#...#/.####/...../.....",
    "b": "#..../#..../#.##./##..#/#...#/#...#/####./...../.....",
    "c": "...../...../.###./#...#/#..../#...#/.###./...../.....",
    "d": "....#/....#/.##.#/#..##/#...#/#...#/.####/...../.....",
    "e": "...../...../.###./#...#/#####/#..../.###./...../.....",
    "f": "..##./.#..#/.#.../###../.#.../.#.../.#.../...../.....",
    "g": "...../...../.####/#...#/#...#/#...#/.####/....#/.###.",
    "h": "#..../#..../#.##./##..#/#...#/#...#/#...#/...../.....",
    "i": "..#../...../.##../..#../..#../..#../.###./...../.....",
    "j": "...#./...../..##./...#./...#./...#./...#./#..#./.##..",
    "k": "#..../#..../#..#./#.#../##.../#.#../#..#./...../.....",
    "l": ".##../..#../..#../..#../..#../..#../.###./...../.....",
    "m": "...../...../##.#./#.#.#/#.#.#/#.#.#/#.#.#/...../.....",
    "n": "...../...../#.##./##..#/#...#/#...#/#...#/...../.....",
    "o": "...../...../.###./#...#/#...#/#...#/.###./...../.....",
    "p": "...../...../####./#...#/#...#/##..#/#.##./#..../#....",
    "q": "...../...../.##.#/#..##/#...#/#...#/.####/....#/....#",
    "r": "...../...../#.##./##..#/#..../#..../#..../...../.....",
    "s": "...../...../.####/#..../.###./....#/####./...../.....",
    "t": ".#.../.#.../###../.#.../.#.../.#..#/..##./...../.....",
    "u": "...../...../#...#/#...#/#...#/#..##/.##.#/...../.....",
    "v": "...../...../#...#/#...#/#...#/.#.#./..#../...../.....",
    "w": "...../...../#...#/#...#/#.#.#/#.#.#/.#.#./...../.....",
    "x": "...../...../#...#/.#.#./..#../.#.#./#...#/...../.....",
    "y": "...../...../#...#/#...#/#...#/#...#/.####/....#/.###.",
    "z": "...../...../#####/...#./..#../.#.../#####/...../.....",
}


@dataclass(frozen=True, slots=True)
class Panel:
    """One chart: curves over the same x = 1, 2, 3...

    title: lower-case letters, digits and `. % -`, which is what the font has.
    curves: label -> one value per x; all of one length, at least one.
    percent: whether the y axis shows fractions as per cent.
    """

    title: str
    x_label: str
    curves: dict[str, Sequence[float]]
    percent: bool = False


def ticks(low: float, high: float, wanted: int = TICKS_WANTED) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart), from at or below `low` to at or above `high`."""
    span = max(high - low, 1e-9)
    power = 10.0 ** np.floor(np.log10(span / wanted))
    step = next(power * factor for factor in (1, 2, 5, 10, 20) if span / (power * factor) <= wanted)
    first, last = int(np.floor(low / step + 1e-9)), int(np.ceil(high / step - 1e-9))
    return [float(index * step) for index in range(first, max(last, first + 1) + 1)]


def blend(image: Image, top: int, left: int, coverage: NDArray[np.float64], colour: Colour) -> None:
    """Paint `colour` over `image` with its corner at (top, left); coverage is 0..1 per pixel, cut at the border."""
    row, column = max(top, 0), max(left, 0)
    patch = coverage[row - top :, column - left :]
    area = image[row : row + patch.shape[0], column : column + patch.shape[1]]
    alpha = patch[: area.shape[0], : area.shape[1], None]
    area *= 1 - alpha
    area += alpha * np.asarray(colour)


def draw_rectangle(image: Image, top: int, left: int, height: int, width: int, colour: Colour) -> None:
    """Fill whole pixels."""
    blend(image, top, left, np.ones((height, width)), colour)


def draw_line(image: Image, points: Sequence[tuple[float, float]], colour: Colour, width: float) -> None:
    """A smooth line through (x, y) points, with round joints.

    The coverage of a pixel follows from its distance to the nearest segment, so the line is anti-aliased, and the
    joints are not painted twice.
    """
    rows, columns = np.mgrid[0 : image.shape[0], 0 : image.shape[1]].astype(np.float64)
    nearest: NDArray[np.float64] = np.full(rows.shape, np.inf)
    reach = int(width) + 2
    for (x0, y0), (x1, y1) in zip(points, points[1:] or points, strict=False):
        top, bottom = int(min(y0, y1)) - reach, int(max(y0, y1)) + reach + 1
        left, right = int(min(x0, x1)) - reach, int(max(x0, x1)) + reach + 1
        box = np.s_[max(top, 0) : bottom, max(left, 0) : right]
        dx, dy = x1 - x0, y1 - y0
        length_squared = dx * dx + dy * dy or 1.0
        along = np.clip(((columns[box] - x0) * dx + (rows[box] - y0) * dy) / length_squared, 0, 1)
        distance = np.hypot(columns[box] - x0 - along * dx, rows[box] - y0 - along * dy)
        nearest[box] = np.minimum(nearest[box], distance)
    coverage: NDArray[np.float64] = np.clip(width / 2 + 0.5 - nearest, 0, 1)
    blend(image, 0, 0, coverage, colour)


def text_width(text: str) -> int:
    """Pixels from the first column of ink to the last."""
    return (len(text) * (GLYPH_WIDTH + 1) - 1) * TEXT_SCALE


def draw_text(image: Image, top: int, left: int, text: str, colour: Colour = TEXT) -> None:
    """Write `text`; raises KeyError for a character that the font lacks."""
    for index, character in enumerate(text):
        rows = [[float(dot == "#") for dot in row] for row in GLYPHS[character].split("/")]
        coverage = np.asarray(rows).repeat(TEXT_SCALE, axis=0).repeat(TEXT_SCALE, axis=1)
        blend(image, top, left + index * (GLYPH_WIDTH + 1) * TEXT_SCALE, coverage, colour)


def draw_panel(panel: Panel) -> Image:
    """The chart alone, PANEL_HEIGHT by PANEL_WIDTH."""
    image = np.tile(np.asarray(BACKGROUND), (PANEL_HEIGHT, PANEL_WIDTH, 1))
    width, height = PANEL_WIDTH - MARGIN_LEFT - MARGIN_RIGHT, PANEL_HEIGHT - MARGIN_TOP - MARGIN_BOTTOM
    bottom = MARGIN_TOP + height
    draw_rectangle(image, MARGIN_TOP, MARGIN_LEFT, height, width, PANEL)
    values = [value for curve in panel.curves.values() for value in curve]
    count = max(len(curve) for curve in panel.curves.values())
    y_ticks = ticks(min(values), max(values))
    y_low, y_high = y_ticks[0], y_ticks[-1]
    # Every tick stands on a whole epoch inside the panel; the curve itself runs from edge to edge.
    x_ticks = sorted({1, *(int(tick) for tick in ticks(1, count) if tick == int(tick) and 1 < tick <= count)})

    def x_of(epoch: float) -> float:
        return MARGIN_LEFT + (epoch - 1) / max(count - 1, 1) * (width - 1)

    def y_of(value: float) -> float:
        return bottom - 1 - (value - y_low) / (y_high - y_low) * (height - 1)

    decimals = _decimals(y_ticks[1] - y_ticks[0], percent=panel.percent)
    for tick in y_ticks:
        row = round(y_of(tick))
        draw_rectangle(image, row, MARGIN_LEFT, 1, width, GRID)
        label = f"{tick * 100:.{decimals}f}%" if panel.percent else f"{tick:.{decimals}f}"
        draw_text(image, row - 3 * TEXT_SCALE, MARGIN_LEFT - 10 - text_width(label), label)
    for tick in x_ticks:
        column = round(x_of(tick))
        draw_rectangle(image, MARGIN_TOP, column, height, 1, GRID)
        draw_text(image, bottom + 10, column - text_width(str(tick)) // 2, str(tick))
    draw_rectangle(image, bottom - 1, MARGIN_LEFT, 2, width, AXIS)
    draw_rectangle(image, MARGIN_TOP, MARGIN_LEFT, height, 2, AXIS)
    legend = MARGIN_LEFT + width
    for (label, curve), colour in reversed(list(zip(panel.curves.items(), CURVE_COLOURS, strict=False))):
        draw_line(image, [(x_of(index), y_of(value)) for index, value in enumerate(curve, 1)], colour, 2.4)
        legend -= text_width(label)
        draw_text(image, 22, legend, label)
        draw_line(image, [(legend - 30, 29), (legend - 10, 29)], colour, 4)
        legend -= 52
    draw_text(image, 22, MARGIN_LEFT, panel.title)
    draw_text(
        image, PANEL_HEIGHT - 26, MARGIN_LEFT + (width - text_width(panel.x_label)) // 2, panel.x_label, colour=AXIS
    )
    return image


def _decimals(step: float, *, percent: bool) -> int:
    """Digits after the point that tell neighbouring ticks apart."""
    shown = step * 100 if percent else step
    return max(0, -int(np.floor(np.log10(shown) + 1e-9)))


def encode_png(image: Image) -> bytes:
    """An 8-bit RGB file. Source: W3C, PNG Specification (Third Edition), sections 5 and 11."""
    pixels = np.round(np.clip(image, 0, 1) * 255).astype(np.uint8)
    height, width = cast("tuple[int, int]", pixels.shape[:2])
    # Each row starts with its filter type, 0 = none.
    rows = np.concatenate([np.zeros((height, 1), np.uint8), pixels.reshape(height, width * 3)], axis=1)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows.tobytes(), 9)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )


def charts_png(panels: Sequence[Panel]) -> bytes:
    """The panels side by side, as the bytes of a PNG file."""
    return encode_png(np.concatenate([draw_panel(panel) for panel in panels], axis=1))
