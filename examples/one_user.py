"""From a dense model to a user's adapter on the device, with the library instead of the commands.

    python examples/one_user.py [--small]

Trains its own dense model on scikit-learn's digits, so that nothing is downloaded; put your own
Hugging Face directory and data in the two marked places. The user writes white on black.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np

from regrow import (
    AdaptConfig,
    Bundle,
    CompressConfig,
    InputReader,
    adapt,
    compress,
    export,
    load_backbone,
    load_data,
    save_backbone,
)
from regrow_toolchain.demo import DenseRecipe, load_digits, new_model, save_dense, train_dense


def make_inputs(folder: Path, epochs: int) -> None:
    """A dense model's directory and two .npz files, as you would have them already."""
    digits = load_digits(users=1)
    images, labels = digits.users[0]
    np.savez(folder / "train.npz", images=digits.train[0], labels=digits.train[1])
    np.savez(folder / "user.npz", images=255 - images, labels=labels)
    np.savez(folder / "test.npz", images=255 - digits.test[0], labels=digits.test[1])
    model = new_model(seed=0)
    save_dense(model, folder / "untrained")
    data = load_data(folder / "train.npz", load_backbone(folder / "untrained"))
    train_dense(model, data, DenseRecipe(epochs=epochs), seed=0)
    save_dense(model, folder / "dense")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="a minute less, and worse results")
    small = parser.parse_args().small
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_inputs(folder, epochs=4 if small else 36)

        dense = load_backbone(folder / "dense")  # your model's directory
        train = load_data(folder / "train.npz", dense)  # your data
        config = CompressConfig(ratio=2, epochs=2 if small else 14, lr=2e-3)
        compressed = compress(dense, train, config)
        backbone = save_backbone(compressed.backbone, folder / "backbone")
        print(f"dense {compressed.dense_score:.1%}, compressed {compressed.score:.1%}")

        user = load_data(folder / "user.npz", backbone)
        done = adapt(
            backbone, user, AdaptConfig(steps=40 if small else 180, coefficient_dtype="int4")
        )
        size = done.adapter.save(folder / "user.safetensors")
        print(f"adapter of {size} bytes: {done.before:.1%} before, {done.after:.1%} after")

        export(backbone, folder / "bundle")

        # From here on there is no torch: this is what an application on the device does.
        bundle = Bundle.open(folder / "bundle")
        test = np.load(folder / "test.npz")
        inputs = InputReader.from_bundle(bundle).images(list(test["images"]))
        for adapter in (None, folder / "user.safetensors"):
            cost = bundle.swap(adapter)
            right = bundle.run(inputs)["logits"].argmax(axis=1) == test["labels"]
            print(f"{cost.kind:6} {cost.total_ms:6.2f} ms to swap, accuracy {right.mean():.1%}")


if __name__ == "__main__":
    main()
