"""From outputs to labels and probabilities."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from regrow_inputs.predictions import answer, mean_embeddings, softmax, top_answers, top_labels
from regrow_runtime import RegrowError, UsageError


def test_answers():
    logits = np.array([[0.0, np.log(3), -np.inf], [5.0, 4.0, 3.0]], dtype=np.float32)
    found = softmax(logits)
    np.testing.assert_allclose(found[0], [0.25, 0.75, 0.0], rtol=1e-6)
    np.testing.assert_allclose(found.sum(axis=1), 1, rtol=1e-6)
    labels = [best[0][0] for best in top_labels(logits, "abc")]
    assert labels == ["b", "a"]
    assert top_labels(logits, "abc")[0][0][1] == pytest.approx(0.75)
    with pytest.raises(UsageError, match=r"logits must be \[samples, 2\], got \[2, 3\]"):
        top_labels(logits, "ab")
    for value in (np.nan, np.inf):
        logits[1, 0] = value
        with pytest.raises(RegrowError, match="finite, got NaN or infinity for sample 1"):
            top_labels(logits, "abc")
    with pytest.raises(RegrowError, match="for sample 0"):
        top_labels(np.full((1, 3), -np.inf, np.float32), "abc")


def test_the_best_few():
    logits = np.log(np.array([[0.1, 0.6, 0.3]], np.float32))
    (found,) = top_labels(logits, "abc", 2)
    assert [label for label, _ in found] == ["b", "c"]
    assert found[1][1] == pytest.approx(0.3)
    assert len(top_labels(logits, "abc", 9)[0]) == 3


def test_classes_that_an_adapter_does_not_have():
    logits = np.array([[1.0, 2.0, -np.inf]], np.float32)
    assert [label for label, _ in top_labels(logits, "ab", 5)[0]] == ["b", "a"]
    with pytest.raises(UsageError, match=r"must be \[samples, 2\], got \[1, 3\]"):
        top_labels(np.zeros((1, 3), np.float32), "ab")


def _bundle(outputs: dict, labels: tuple[str, ...], folder: Path, **config: object):
    """As much of one as `answer` sees."""
    (folder / "config.json").write_text(json.dumps(config))
    return SimpleNamespace(
        active=None, labels=lambda: labels, run_all=lambda feeds: outputs, folder=folder,
        manifest=SimpleNamespace(labels=labels),
    )  # fmt: skip


def test_answers_of_a_bundle(tmp_path):
    logits = np.array([[0.0, 2.0], [3.0, 1.0]], np.float32)
    for name in ("logits", "output"):  # a plain module's only output
        bundle = _bundle({name: logits}, ("no", "yes"), tmp_path)
        assert [label for label, _ in answer(bundle, {})] == ["yes", "no"]
        assert top_answers(bundle, {})[0][0][1] == pytest.approx(1 / (1 + np.exp(-2)))


def test_labels_that_exclude_nothing(tmp_path):
    logits = np.array([[2.0, 2.0]], np.float32)
    bundle = _bundle(
        {"logits": logits}, ("a", "b"), tmp_path, problem_type="multi_label_classification"
    )
    assert [share for _, share in top_answers(bundle, {})[0]] == pytest.approx([0.880797] * 2)


def test_a_model_of_one_output_gives_its_value(tmp_path):
    bundle = _bundle({"logits": np.array([[7.5]], np.float32)}, ("score",), tmp_path)
    assert answer(bundle, {}) == [("score", 7.5)]


@pytest.mark.parametrize(
    ("outputs", "labels"),
    [
        ({"logits": np.zeros((1, 4, 2))}, ("a", "b")),
        ({"last_hidden_state": np.zeros((1, 2)), "pooled": np.zeros((1, 2))}, ("a", "b")),
        ({"logits": np.zeros((1, 2))}, ()),
    ],
)
def test_models_that_are_no_classifiers(tmp_path, outputs, labels):
    with pytest.raises(UsageError, match="model must be a classifier with labels, got outputs"):
        answer(_bundle(outputs, labels, tmp_path), {})


def test_a_swap_in_between_is_noticed(tmp_path):
    """Labels are those of the adapter that ran."""
    bundle = _bundle({}, ("a", "b"), tmp_path)
    runs = []

    def run_all(feeds):
        runs.append(bundle.active)
        bundle.active, bundle.labels = "user", lambda: ("x", "y")
        return {"logits": np.array([[0.0, 1.0]], np.float32)}

    bundle.run_all = run_all
    assert answer(bundle, {})[0][0] == "y"
    assert runs == [None, "user"]


def test_mean_embeddings():
    states = np.array([[[3.0, 0.0], [0.0, 4.0], [9.0, 9.0]]], np.float32)
    mask = np.array([[1, 1, 0]])
    np.testing.assert_allclose(mean_embeddings(states, mask), [[0.6, 0.8]], rtol=1e-6)
    assert np.isfinite(mean_embeddings(np.zeros((1, 2, 2), np.float32))).all()
