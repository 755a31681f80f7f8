"""Train a small classifier on real handwritten digits, with NumPy and nothing else.

A network with one hidden layer learns the 8x8 images of digits.csv.gz (see README.md) by mini-batch gradient
descent; a quarter of the images is held out and only ever used to measure. Writes to $DANTE_OUTPUT, or to ./output:

    weights.npz          the trained layers
    metrics.json         accuracy, loss and accuracy per epoch, seconds
    learning_curve.png   the same as a picture
"""

import argparse
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from chart import Panel, charts_png
from numpy.typing import NDArray

type Floats = NDArray[np.float64]
type Labels = NDArray[np.int64]

DATA = Path(__file__).resolve().parent / "digits.csv.gz"
SIDE, CLASSES, DARKEST = 8, 10, 16
HELD_OUT_FRACTION = 0.25


class Split(NamedTuple):
    """Images (n, 64) with pixels 0..1, and the digits (n,) they show."""

    images: Floats
    labels: Labels


@dataclass(slots=True)
class Layers:
    """The network: 64 pixels -> hidden units (ReLU) -> 10 classes (softmax)."""

    hidden_weights: Floats
    hidden_bias: Floats
    output_weights: Floats
    output_bias: Floats

    def all(self) -> list[Floats]:
        """The arrays themselves, in a fixed order."""
        return [self.hidden_weights, self.hidden_bias, self.output_weights, self.output_bias]


class Epoch(NamedTuple):
    """What one pass over the training images led to; loss is the mean cross-entropy in nats."""

    train_loss: float
    train_accuracy: float
    test_loss: float
    test_accuracy: float


def load(path: Path, random: np.random.Generator) -> tuple[Split, Split]:
    """Read the data set and split it at random into (train, held out).

    Each row of the file is 64 pixels 0..16 and the digit.
    """
    rows = np.loadtxt(path, delimiter=",", dtype=np.int64)
    rows = rows[random.permutation(len(rows))]
    images, labels = rows[:, :-1] / DARKEST, rows[:, -1]
    held_out = int(len(rows) * HELD_OUT_FRACTION)
    return Split(images[held_out:], labels[held_out:]), Split(images[:held_out], labels[:held_out])


def new_layers(hidden_units: int, random: np.random.Generator) -> Layers:
    """Random weights scaled for ReLU. Source: He et al., "Delving Deep into Rectifiers", ICCV 2015, eq. 10."""
    pixels = SIDE * SIDE
    return Layers(
        hidden_weights=random.normal(0, np.sqrt(2 / pixels), (pixels, hidden_units)),
        hidden_bias=np.zeros(hidden_units),
        output_weights=random.normal(0, np.sqrt(2 / hidden_units), (hidden_units, CLASSES)),
        output_bias=np.zeros(CLASSES),
    )


def forward(layers: Layers, images: Floats) -> tuple[Floats, Floats]:
    """Hidden activations (n, hidden) and class probabilities (n, 10)."""
    hidden = np.maximum(images @ layers.hidden_weights + layers.hidden_bias, 0)
    logits = hidden @ layers.output_weights + layers.output_bias
    logits -= logits.max(axis=1, keepdims=True)
    odds = np.exp(logits)
    return hidden, odds / odds.sum(axis=1, keepdims=True)


def gradients(layers: Layers, batch: Split) -> list[Floats]:
    """Derivatives of the batch's mean cross-entropy, in the order of Layers.all()."""
    hidden, error = forward(layers, batch.images)
    error[np.arange(len(batch.labels)), batch.labels] -= 1
    error /= len(batch.labels)
    hidden_error = (error @ layers.output_weights.T) * (hidden > 0)
    return [batch.images.T @ hidden_error, hidden_error.sum(axis=0), hidden.T @ error, error.sum(axis=0)]


def evaluate(layers: Layers, split: Split) -> tuple[float, float]:
    """(mean cross-entropy, fraction classified correctly)."""
    _, probabilities = forward(layers, split.images)
    likelihood = probabilities[np.arange(len(split.labels)), split.labels]
    correct = probabilities.argmax(axis=1) == split.labels
    return float(-np.log(np.maximum(likelihood, 1e-12)).mean()), float(correct.mean())


def shifted(images: Floats, random: np.random.Generator) -> Floats:
    """The images (n, 64), each moved by -1, 0 or 1 pixel both ways; what moves in is white.

    People do not write in the middle of the box; seeing the digits moved makes the network care less where they are.
    """
    count = len(images)
    padded = np.pad(images.reshape(count, SIDE, SIDE), ((0, 0), (1, 1), (1, 1)))
    rows = random.integers(0, 3, (count, 1, 1)) + np.arange(SIDE)[None, :, None]
    columns = random.integers(0, 3, (count, 1, 1)) + np.arange(SIDE)[None, None, :]
    return padded[np.arange(count)[:, None, None], rows, columns].reshape(count, -1)


def batches(train: Split, size: int, random: np.random.Generator) -> Iterator[Split]:
    """The images as they are and once shifted, in random order."""
    images = np.concatenate([train.images, shifted(train.images, random)])
    labels = np.concatenate([train.labels, train.labels])
    order = random.permutation(len(labels))
    for start in range(0, len(order), size):
        chosen = order[start : start + size]
        yield Split(images[chosen], labels[chosen])


def train_network(
    layers: Layers, train: Split, test: Split, *, epochs: int, random: np.random.Generator
) -> Iterator[Epoch]:
    """Improve `layers` in place and yield the scores after each epoch.

    Stochastic gradient descent with momentum 0.9; the learning rate falls to zero along half a cosine.
    """
    velocities = [np.zeros_like(array) for array in layers.all()]
    for epoch in range(epochs):
        learning_rate = 0.015 * (1 + np.cos(np.pi * epoch / epochs)) / 2
        for batch in batches(train, 32, random):
            for index, gradient in enumerate(gradients(layers, batch)):
                velocities[index] = 0.9 * velocities[index] - learning_rate * gradient
                layers.all()[index][...] += velocities[index]
        yield Epoch(*evaluate(layers, train), *evaluate(layers, test))


def write_results(folder: Path, layers: Layers, history: list[Epoch], seconds: float) -> None:
    """Write the three files that the job is for."""
    folder.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(
        folder / "weights.npz",
        hidden_weights=layers.hidden_weights,
        hidden_bias=layers.hidden_bias,
        output_weights=layers.output_weights,
        output_bias=layers.output_bias,
    )
    curves = {name: [round(getattr(epoch, name), 6) for epoch in history] for name in Epoch._fields}
    metrics = {"accuracy": history[-1].test_accuracy, "epochs": len(history), "seconds": round(seconds, 3), **curves}
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    panels = [
        Panel("loss", "epoch", {"train": curves["train_loss"], "held out": curves["test_loss"]}),
        Panel(
            "accuracy", "epoch", {"train": curves["train_accuracy"], "held out": curves["test_accuracy"]}, percent=True
        ),
    ]
    (folder / "learning_curve.png").write_bytes(charts_png(panels))


def main(arguments: list[str] | None = None) -> None:
    """Train, telling of each epoch as it ends, and write the results."""
    parser = argparse.ArgumentParser(description="Train a classifier on handwritten digits.")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--hidden-units", type=int, default=512)
    parser.add_argument("--seed", type=int, default=1998)
    options = parser.parse_args(arguments)
    if options.epochs < 1 or options.hidden_units < 1:
        parser.error("--epochs and --hidden-units must be at least 1")
    started = time.monotonic()
    random = np.random.default_rng(options.seed)
    train, test = load(DATA, random)
    print(f"{len(train.labels)} digits to learn from, {len(test.labels)} held out", flush=True)
    history: list[Epoch] = []
    layers = new_layers(options.hidden_units, random)
    for epoch in train_network(layers, train, test, epochs=options.epochs, random=random):
        history.append(epoch)
        print(
            f"epoch {len(history):3}/{options.epochs}  loss {epoch.train_loss:.4f}  "
            f"held-out loss {epoch.test_loss:.4f}  accuracy {epoch.test_accuracy:.2%}",
            flush=True,
        )
    seconds = time.monotonic() - started
    folder = Path(os.environ.get("DANTE_OUTPUT", "output"))
    write_results(folder, layers, history, seconds)
    print(f"accuracy {history[-1].test_accuracy:.4f} on held-out digits after {seconds:.1f} s", flush=True)
    print(f"wrote weights.npz, metrics.json and learning_curve.png to {folder}", flush=True)


if __name__ == "__main__":
    main()
