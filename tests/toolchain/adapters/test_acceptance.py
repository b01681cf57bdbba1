"""The gate: which adapters are written. Against brute force, scipy, scikit-learn and torch."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.dummy import DummyClassifier, DummyRegressor
from sklearn.metrics import balanced_accuracy_score, log_loss, mean_squared_error
from torch import Tensor, nn

from regrow_toolchain.adapters import (
    FEWEST_GROUPS,
    SIGNIFICANCE,
    Adapted,
    Verdict,
    adapt,
    adapt_each,
)
from regrow_toolchain.adapters.acceptance import EXACT_BELOW, Evidence, judge, sign_flip_p_value
from regrow_toolchain.config import AdaptConfig
from regrow_toolchain.data import Dataset
from regrow_toolchain.models import Backbone
from regrow_toolchain.tasks import (
    CausalLm,
    Classification,
    Distillation,
    MetricLearning,
    Regression,
    Task,
)

# -- the test ------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", range(1, 13))
def test_p_is_the_share_of_all_sign_patterns(count: int) -> None:
    values = np.random.default_rng(count).normal(0.4, 1, count)
    patterns = np.array(list(itertools.product((1, -1), repeat=count)))
    wanted = np.mean(patterns @ values >= values.sum() - 1e-9)
    assert sign_flip_p_value(values) == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize("count", [6, 11, 14])
def test_p_is_scipys(count: int) -> None:
    values = np.random.default_rng(count).normal(0.3, 1, count)
    wanted = stats.permutation_test(
        (values,), np.sum, permutation_type="samples", alternative="greater", n_resamples=1 << 20,
        vectorized=False,
    ).pvalue  # fmt: skip
    assert sign_flip_p_value(values) == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize("count", [EXACT_BELOW, 40, 300])
def test_from_twenty_groups_p_is_drawn(count: int) -> None:
    """Against the exact distribution of integer sums, by convolution."""
    values = np.random.default_rng(count).integers(-8, 12, count)
    chances = np.ones(1)
    for value in np.abs(values):  # the sum of +-value, from -total to total
        step = np.zeros(2 * value + 1)
        step[0] += 0.5
        step[-1] += 0.5
        chances = np.convolve(chances, step)
    total = np.abs(values).sum()
    wanted = chances[total + values.sum() :].sum()
    found = sign_flip_p_value(values.astype(float))
    assert found == pytest.approx(wanted, abs=4 * math.sqrt(wanted * (1 - wanted) / 20_000) + 1e-4)
    assert found == sign_flip_p_value(values.astype(float))  # always the same draws


@pytest.mark.parametrize("size", [1e-9, 1.0, 1e5])
def test_fewer_than_six_groups_never_pass(size: float) -> None:
    assert FEWEST_GROUPS == 6
    assert sign_flip_p_value(np.full(FEWEST_GROUPS - 1, size)) == 2.0**-5 > SIGNIFICANCE
    assert sign_flip_p_value(np.full(FEWEST_GROUPS, size)) == 2.0**-6 < SIGNIFICANCE


def test_nothing_is_no_evidence() -> None:
    assert sign_flip_p_value(np.zeros(0)) == 1
    assert sign_flip_p_value(np.zeros(50)) == 1
    assert sign_flip_p_value(np.array([0.1] * 6 + [0.0])) == 2.0**-6  # a tie flips to itself
    assert sign_flip_p_value(np.full(30, -1.0)) == 1


def test_p_is_uniform_under_the_null_hypothesis() -> None:
    """Of losses that differ by chance alone, at most two in a hundred are told apart."""
    draw = np.random.default_rng(0)
    for count in (6, 12, 30):
        found = [sign_flip_p_value(draw.standard_t(3, count)) for _ in range(400)]
        assert np.mean(np.array(found) <= SIGNIFICANCE) <= 0.041  # 0.02, three standard errors


# -- the verdict ----------------------------------------------------------------------------------


def _evidence(
    adapted: list[tuple[float, float]],
    base: list[tuple[float, float]] | None,
    labels: list[int],
    **changes: object,
) -> Evidence:
    """(class, nats) of each sample, all different, held back together, no constant answer."""
    count = len(labels)
    one = Evidence(
        labels=np.array(labels),
        groups=np.arange(count),
        folds=np.zeros(count, np.int64),
        adapted=np.array(adapted, np.float32),
        base=None if base is None else np.array(base, np.float32),
        constants={},
    )
    return replace(one, **changes)  # type: ignore[arg-type]


def _judged(*arguments: object, **changes: object) -> Verdict:
    return judge(Classification(), _evidence(*arguments, **changes))  # type: ignore[arg-type]


_TEN = [0, 1] * 5


def _right(labels: list[int], nats: float, wrong: int = 0) -> list[tuple[float, float]]:
    return [
        (1 - y if i < wrong else y, nats + 0.01 * i) for i, y in enumerate(labels)
    ]  # nats differ: no ties


def test_lower_losses_at_equal_accuracy_improve() -> None:
    """Ten samples of which nine are right before and after: what the old rule refused."""
    found = _judged(_right(_TEN, 0.2, 1), _right(_TEN, 0.5, 1), _TEN)
    assert found.improves
    assert found.before == found.after == 0.9
    assert found.p_value == 2.0**-10
    assert (found.baseline, found.metric, found.groups) == ("base model", "balanced accuracy", 10)
    assert found.loss_before == pytest.approx(0.545)
    assert found.loss_after == pytest.approx(0.245)


def test_a_lower_score_does_not_improve_whatever_the_losses() -> None:
    assert not _judged(_right(_TEN, 0.2, 2), _right(_TEN, 0.5, 1), _TEN).improves


def test_equal_losses_do_not_improve_whatever_the_score() -> None:
    found = _judged(_right(_TEN, 0.5), _right(_TEN, 0.5, 3), _TEN)
    assert not found.improves
    assert found.p_value == 1


def test_accuracy_is_balanced() -> None:
    """Two of the rare class lost for five of the frequent one won: more right, and no gain."""
    labels = [0] * 18 + [1] * 2
    before = [(y, 1.0) for y in labels]
    before[:5] = [(1, 1.0)] * 5
    after = [(0, 0.1 + 0.01 * i) for i in range(20)]
    found = _judged(after, before, labels)
    assert found.p_value <= SIGNIFICANCE
    truth, answers = np.array(labels), np.array(before)[:, 0]
    assert found.before == pytest.approx(balanced_accuracy_score(truth, answers))
    assert found.after == 0.5
    assert not found.improves


def test_a_group_of_equal_samples_counts_once() -> None:
    """Forty samples that are five different ones are five."""
    labels = [0, 1, 0, 1, 0] * 8
    groups = np.tile(np.arange(5), 8)
    found = _judged(
        _right(labels, 0.1), _right(labels, 1.0), labels, groups=groups
    )  # fmt: skip
    assert (found.groups, found.p_value) == (5, 2.0**-5)
    assert not found.improves
    assert _judged(_right(labels, 0.1), _right(labels, 1.0), labels).improves


def test_the_group_is_its_mean() -> None:
    """One group of which half are better and half as much worse says nothing."""
    labels = [0] * 12
    after = [(0, 1.0 + (0.5 if i % 2 else -0.5)) for i in range(12)]
    found = _judged(after, [(0, 1.0)] * 12, labels, groups=np.arange(12) // 2)
    assert (found.groups, found.p_value) == (6, 1)


@pytest.mark.parametrize(("base", "wanted"), [(0.4, "base model"), (3.0, "class frequencies")])
def test_the_better_answer_is_compared_with(base: float, wanted: str) -> None:
    """A base model that is surely wrong is no baseline: frequencies alone beat it."""
    constants = {"class frequencies": np.array(_right(_TEN, 0.7), np.float32)}
    found = _judged(_right(_TEN, 0.6), _right(_TEN, base), _TEN, constants=constants)
    assert found.baseline == wanted
    assert found.improves == (wanted == "class frequencies")


def test_without_an_answer_of_its_own_the_constant_is_the_baseline() -> None:
    constants = {"class frequencies": np.array(_right(_TEN, 0.7), np.float32)}
    found = _judged(_right(_TEN, 0.6), None, _TEN, constants=constants)
    assert math.isnan(found.before)
    assert found.improves


def test_losses_that_are_no_numbers() -> None:
    """The adapter's count against it, the model's own for it, and both for neither."""
    nan = math.nan
    broken = [(-1, nan), *_right(_TEN, 0.1)[1:]]
    assert not _judged(broken, _right(_TEN, 0.5, 3), _TEN).improves
    assert _judged(_right(_TEN, 0.1), [(-1, nan)] * 10, _TEN).improves
    assert _judged(_right(_TEN, 0.1), [(-1, math.inf)] * 10, _TEN).improves
    assert not _judged([(-1, nan)] * 10, [(-1, nan)] * 10, _TEN).improves


# -- what tasks say -------------------------------------------------------------------------------


def _none(count: int) -> np.ndarray:
    return np.zeros(count, np.int64)


def test_classification_against_torch_and_scikit_learn() -> None:
    torch.manual_seed(0)
    task, logits, labels = Classification(0.3), torch.randn(50, 4), torch.randint(0, 4, (50,))
    found, truth = task.measure(logits, labels), labels.numpy()
    losses = nn.functional.cross_entropy(logits, labels, reduction="none")  # without smoothing
    assert task.sample_losses(found, truth, _none(50)) == pytest.approx(losses.numpy(), rel=1e-5)
    wanted = balanced_accuracy_score(truth, logits.argmax(1).numpy())
    assert task.gate_score(found, truth, _none(50)) == pytest.approx(wanted)
    train = np.array([0] * 7 + [1] * 2 + [2] + [3] * 5)
    frequencies, even = task.constants(train, truth).values()
    dummy = DummyClassifier(strategy="prior").fit(train[:, None], train)
    wanted = log_loss(truth, dummy.predict_proba(truth[:, None]), labels=[0, 1, 2, 3])
    assert frequencies[:, 1].mean() == pytest.approx(wanted, rel=1e-6)
    assert (frequencies[:, 0] == dummy.predict(truth[:, None])).all()
    assert even[:, 1] == pytest.approx(math.log(4))


def test_a_class_that_was_not_there_is_unlikely_but_possible() -> None:
    frequencies = Classification().constants(np.zeros(8, np.int64), np.array([0, 1]))
    assert frequencies["class frequencies"][:, 1] == pytest.approx([0, math.log(16)])


def test_a_class_that_the_model_does_not_know_is_missed() -> None:
    found = Classification().measure(torch.zeros(2, 3), torch.tensor([-1, 2]))
    assert found[:, 1] == pytest.approx([math.inf, math.log(3)])


def test_regression_and_features_against_scikit_learn_and_torch() -> None:
    draw = np.random.default_rng(0)
    train, labels = draw.normal(size=(9, 2)), draw.normal(size=(5, 2)).astype(np.float32)
    (found,) = Regression().constants(train, labels).values()
    dummy = DummyRegressor().fit(train, train)
    wanted = mean_squared_error(labels, dummy.predict(labels))
    assert Regression().sample_losses(found, labels, _none(5)).mean() == pytest.approx(wanted)
    (cosines,) = Distillation().constants(train.astype(np.float32), labels).values()
    mean = torch.tensor(train.mean(0), dtype=torch.float32).expand(5, 2)
    wanted = 1 - torch.cosine_similarity(mean, torch.from_numpy(labels))
    assert Distillation().sample_losses(cosines, labels, _none(5)) == pytest.approx(
        wanted.numpy(), abs=1e-6
    )


def test_language_models_are_judged_by_text() -> None:
    torch.manual_seed(0)
    logits, tokens = torch.randn(4, 6, 9), torch.randint(0, 9, (4, 6))
    tokens[1, 3:] = -100
    task = CausalLm()
    wanted = [
        nn.functional.cross_entropy(x[:-1], y[1:], ignore_index=-100).item()
        for x, y in zip(logits, tokens, strict=True)
    ]
    found = task.sample_losses(task.measure(logits, tokens), tokens.numpy(), _none(4))
    assert found == pytest.approx(wanted, rel=1e-5)
    assert task.constants(tokens.numpy(), tokens.numpy()) == {}


def test_embeddings_are_neighbours_within_their_fold() -> None:
    """Embeddings of two adapters, turned against each other, are never compared."""
    draw = np.random.default_rng(0)
    one, labels = draw.normal(size=(6, 3)).astype(np.float32), np.array([0, 0, 1, 1, 2, 2])
    one[1::2] = one[::2] + 0.01
    one /= np.linalg.norm(one, axis=1, keepdims=True)
    turned = one @ np.linalg.qr(draw.normal(size=(3, 3)))[0].astype(np.float32)
    folds, both = np.repeat([0, 1], 6), np.concatenate([one, turned])
    task, twice = MetricLearning(), np.tile(labels, 2)
    assert task.gate_score(both, twice, folds) == 1
    found = task.sample_losses(both, twice, folds)
    assert found[:6] == pytest.approx(found[6:], abs=1e-4)
    alone = task.losses(torch.from_numpy(one)[None], torch.from_numpy(labels)[None])[0]
    assert found[:6] == pytest.approx(alone.numpy(), abs=1e-5)


# -- adapters that learnt nothing, and that learnt something --------------------------------------


class _Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        blocks = [nn.Sequential(nn.Linear(12, 12), nn.Tanh()) for _ in range(2)]
        self.blocks, self.head = nn.ModuleList(blocks), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def _backbone() -> Backbone:
    return Backbone(_Model().eval(), "sha256:1", "custom", ("head",), ("a", "b", "c"), ())


_KNOWN, _OWN = ("a", "b"), ("yes", "no")


def _coins(kind: str, count: int, seed: int, names: tuple[str, ...]) -> Dataset:
    """Samples with labels that say nothing of them."""
    draw = np.random.default_rng([seed, 7])
    x = draw.normal(size=(count, 12)).astype(np.float32)
    if kind == "duplicates":
        x = x[draw.integers(0, count // 3, count)]
    labels = (draw.random(count) > (0.9 if kind == "unequal" else 0.5)).astype(np.int64)
    labels[0] = 1 - labels[1:].max()  # both are there
    return Dataset({"x": x}, labels, names)


def _rule(count: int, seed: int, names: tuple[str, ...]) -> Dataset:
    """Labels that follow from the samples: from the sign of the first value."""
    data = _coins("plain", count, seed, names)
    x = data.inputs["x"] * np.float32(0.5)
    x[:, 0] = 2 * data.labels - 1 + x[:, 0] / 2
    return replace(data, inputs={"x": x})


def _everybody(parts: list[Dataset]) -> Dataset:
    users = np.repeat([f"{i:03}" for i in range(len(parts))], [len(part) for part in parts])
    x = np.concatenate([part.inputs["x"] for part in parts])
    labels = np.concatenate([part.labels for part in parts])
    return Dataset({"x": x}, labels, parts[0].names, users=users)


def _adapted(parts: list[Dataset], **settings: object) -> list[Adapted]:
    config = replace(
        AdaptConfig(
            steps=30, batch_size=32, coefficient_dtype="fp32", users_at_once=300, head_lr=0.05
        ),
        **settings,  # type: ignore[arg-type]
    )
    return [done for _, done in adapt_each(_backbone(), _everybody(parts), config)]


@pytest.mark.slow
@pytest.mark.parametrize("names", [_KNOWN, _OWN])
@pytest.mark.parametrize("kind", ["plain", "duplicates", "unequal"])
@pytest.mark.parametrize("count", [12, 40, 260])  # folds, and from 250 on a part held back
def test_of_coins_at_most_one_in_twenty_is_written(
    kind: str, names: tuple[str, ...], count: int
) -> None:
    for method in ("nola", "head"):
        found = _adapted([_coins(kind, count, s, names) for s in range(200)], method=method)
        assert all((done.folds == 0) == (count == 260 and kind != "duplicates")
                   for done in found)  # fmt: skip
        assert sum(done.improves for done in found) <= 0.05 * len(found)


def test_of_a_few_coins_hardly_any_is_written() -> None:
    found = _adapted([_coins("plain", 16, s, _OWN) for s in range(20)], method="head")
    assert sum(done.improves for done in found) <= 2


@pytest.mark.parametrize("count", [24, 40, 260])
@pytest.mark.parametrize("names", [_KNOWN, _OWN])
def test_a_rule_is_learnt_and_written(names: tuple[str, ...], count: int) -> None:
    parts = [_rule(count, seed, names) for seed in range(4)]
    found = _adapted(parts, method="head", head="new", steps=60)
    assert sum(done.improves for done in found) >= 3
    done = next(done for done in found if done.improves)
    assert done.verdict is not None
    assert done.samples == (52 if count == 260 else count)
    assert done.verdict.groups == done.samples
    assert done.after > 0.7


def test_of_few_samples_all_train_the_adapter() -> None:
    """The result of five folds is what training on everything gives."""
    data = _rule(40, 0, _OWN)
    config = AdaptConfig(method="head", head="new", steps=20, coefficient_dtype="fp32")
    judged = adapt(_backbone(), data, config)
    whole = adapt(_backbone(), data, replace(config, holdout=0.0))
    assert judged.folds == 5
    assert judged.samples == 40
    one, other = judged.adapter.head, whole.adapter.head
    assert one is not None
    assert other is not None
    for mine, theirs in zip(one.layers, other.layers, strict=True):
        assert mine.weight == pytest.approx(theirs.weight, abs=2e-3)  # stored in fp16


def test_scores_are_those_of_adapters_that_did_not_see_the_sample() -> None:
    """Each fold by hand: trained on the others, scored on its own part."""
    from regrow_toolchain.adapters import applied
    from regrow_toolchain.data import fit_labels, fold_numbers
    from regrow_toolchain.training import predict

    backbone, data = _backbone(), _rule(30, 1, _KNOWN)
    config = AdaptConfig(method="lora", steps=10, lr=0.05, coefficient_dtype="fp32")
    done = adapt(backbone, data, config)
    data, _ = fit_labels(data, backbone.labels, "keep")
    folds, right, nats = fold_numbers(data, 5, config.seed), 0, []
    for fold in range(5):
        mine, rest = (data.take(np.flatnonzero(p)) for p in (folds == fold, folds != fold))
        alone = adapt(backbone, rest, replace(config, holdout=0.0))
        with applied(backbone.model, alone.adapter):
            logits = torch.from_numpy(predict(backbone.model, mine))
        right += int((logits.argmax(1).numpy() == mine.labels).sum())
        losses = nn.functional.cross_entropy(
            logits, torch.from_numpy(mine.labels), reduction="none"
        )
        nats += losses.tolist()
    assert done.after == right / 30
    assert done.verdict is not None
    assert done.verdict.loss_after == pytest.approx(np.mean(nats), rel=1e-3)


def test_every_task_can_be_judged() -> None:
    """Without a constant answer, or a base: nothing is missing that `judge` asks for."""
    labels = np.random.default_rng(0).normal(size=(8, 2)).astype(np.float32)
    tasks: list[Task] = [Regression(), Distillation()]
    for task in tasks:
        truth = torch.from_numpy(labels)
        evidence = Evidence(
            labels=labels, groups=np.arange(8), folds=_none(8), adapted=task.measure(truth, truth),
            base=task.measure(-truth, truth), constants=task.constants(labels[::2], labels),
        )  # fmt: skip
        assert judge(task, evidence).improves
        worse = replace(evidence, adapted=task.measure(-truth, truth), base=evidence.adapted)
        assert not judge(task, worse).improves
