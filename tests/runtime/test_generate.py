"""Text token by token through the cache, beside the same model computed whole in NumPy."""

from __future__ import annotations

import re
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from expansions import flat

from regrow_format.basis import BasisCache
from regrow_format.methods import get_method
from regrow_format.philox import philox4x32
from regrow_runtime import Generation, RegrowError, Target, UsageError
from regrow_runtime.generate import choose

LM_TARGETS = (Target("value", 8, 8),)
PROMPTS = ([3, 1, 4], [1, 5, 9, 2, 6], [7])


class Watched:
    """A bundle for a conversation, which keeps what the graph is fed."""

    def __init__(self, bundle):
        self.manifest, self.adapter_feeds = bundle.manifest, bundle.adapter_feeds
        self.bundle, self.fed = bundle, []

    def run_graph(self, names, feeds):
        self.fed.append(feeds)
        return self.bundle.run_graph(names, feeds)


@pytest.fixture
def adapters(lm, make_adapter):
    """Three, resident in `lm` as a, b and c; their expansions by name, None for the base."""
    found = {None: None}
    for draw, name in enumerate("abc"):
        adapter = make_adapter("lora", draw=draw, targets=LM_TARGETS)
        lm.load(adapter, name=name)
        found[name] = flat(get_method("lora").expand(adapter, BasisCache()))
    return found


@pytest.fixture
def greedy(lm_logits):
    """greedy(prompt, count, expansion): the likeliest tokens, the whole text computed for each."""

    def call(prompt, count, expansion=None, stop=(12,)):
        ids = list(prompt)
        for _ in range(count):
            ids.append(int(lm_logits(ids, expansion)[-1].argmax()))
            if ids[-1] in stop:
                break
        return ids[len(prompt) :]

    return call


def test_greedy_is_the_likeliest_token_each_time(lm, greedy):
    for prompt in PROMPTS:
        made = lm.generate(prompt, max_new_tokens=8)
        assert made.tokens[0].tolist() == greedy(prompt, 8)
        assert made.first_token_ms > 0
        assert made.tokens_per_s > 0
        assert made.recomputed == 0


def test_prompts_of_different_lengths_in_one_batch(lm, greedy, adapters):
    """Each gets what it would get alone, with an adapter of its own, and ends by itself."""
    made = lm.generate(PROMPTS, max_new_tokens=12, stop=(2, 12), adapters=["a", None, "c"])
    wanted = [
        greedy(prompt, 12, adapters[name], stop=(2, 12))
        for prompt, name in zip(PROMPTS, ("a", None, "c"), strict=True)
    ]
    assert [row.tolist() for row in made.tokens] == wanted
    assert len({len(row) for row in wanted}) > 1


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_by_a_tokenizer_is_taken_off(lm, side):
    ids = np.zeros((3, 6), dtype=np.int64)
    mask = np.zeros_like(ids)
    for row, prompt in enumerate(PROMPTS):
        part = slice(-len(prompt), None) if side == "left" else slice(len(prompt))
        ids[row, part], mask[row, part] = prompt, 1
    made = lm.generate(ids, attention_mask=mask, max_new_tokens=6)
    plain = lm.generate(PROMPTS, max_new_tokens=6)
    for one, other in zip(made.tokens, plain.tokens, strict=True):
        np.testing.assert_array_equal(one, other)


def test_run_needs_no_more_than_ids(lm, lm_logits):
    """The runtime feeds the empty past, and makes the mask and the positions."""
    found = lm.run({"input_ids": [PROMPTS[1]]})
    assert list(found) == ["logits"]
    np.testing.assert_allclose(found["logits"][0], lm_logits(PROMPTS[1]), rtol=1e-4, atol=1e-5)
    padded = lm.run({"input_ids": [[0, 0, 0, 7], [3, 1, 4, 1]],
                     "attention_mask": [[0, 0, 0, 1], [1, 1, 1, 1]]})  # fmt: skip
    np.testing.assert_allclose(padded["logits"][0, -1:], lm_logits([7]), rtol=1e-4, atol=1e-5)
    with pytest.raises(UsageError, match="input_ids must be of shape"):
        lm.run({"input_ids": [3, 1]})
    with pytest.raises(UsageError, match="inputs must have input_ids, got"):
        lm.run({"attention_mask": [[1]]})


# -- a conversation ------------------------------------------------------------------------------


def test_a_conversation_goes_on_where_it_ended(lm, greedy):
    chat = lm.chat(stop=())
    first = chat.generate([3, 1, 4], max_new_tokens=4).tokens[0].tolist()
    made = chat.generate([5, 5], max_new_tokens=4)
    assert made.tokens[0].tolist() == greedy([3, 1, 4, *first, 5, 5], 4, stop=())
    assert made.recomputed == 0
    assert chat.ids[0].tolist() == [3, 1, 4, *first, 5, 5, *made.tokens[0].tolist()]


def test_a_conversation_of_several_that_end_apart(lm, greedy):
    chat = lm.chat(stop=(2, 12))
    first = chat.generate(PROMPTS, max_new_tokens=5).tokens
    more = ([8, 8], [10], [11, 3, 3])
    made = chat.generate(more, max_new_tokens=5).tokens
    for row, prompt in enumerate(PROMPTS):
        told = [*prompt, *first[row].tolist(), *more[row]]
        assert made[row].tolist() == greedy(told, 5, stop=(2, 12))


def test_a_swap_makes_the_cache_new(lm, greedy, adapters):
    """What the other adapter left in the cache would change the answer: it is computed again."""
    watched, other = Watched(lm), Watched(lm)
    chat = Generation(watched, stop=())
    lm.swap("a")
    first = chat.generate([3, 1, 4], max_new_tokens=4).tokens[0].tolist()
    assert first == greedy([3, 1, 4], 4, adapters["a"], stop=())
    stale = watched.fed[-1]["past.0.value"]
    lm.swap("b")
    made = chat.generate([5], max_new_tokens=6)
    told = [3, 1, 4, *first, 5]
    assert made.tokens[0].tolist() == greedy(told, 6, adapters["b"], stop=())
    assert made.recomputed == len(told) - 2  # the last token made was not yet in the cache
    Generation(other, stop=()).generate(told, max_new_tokens=6)
    kept, fresh = (seen.fed[-1]["past.0.value"] for seen in (watched, other))
    np.testing.assert_allclose(kept, fresh, rtol=1e-4, atol=1e-6)
    assert np.abs(stale - kept[:, :, : stale.shape[2]]).max() > 0.01
    assert chat.generate([5], max_new_tokens=1).recomputed == 0


@pytest.mark.parametrize("change", ["to the base", "same name, other adapter"])
def test_other_swaps_that_make_the_cache_new(lm, greedy, adapters, make_adapter, change):
    chat = lm.chat(stop=())
    lm.swap("a")
    chat.generate([3], max_new_tokens=3)
    if change == "to the base":
        lm.swap(None)
        expansion = None
    else:
        lm.swap(make_adapter("lora", draw=2, targets=LM_TARGETS), name="a")
        expansion = adapters["c"]
    told = [*chat.ids[0].tolist(), 5]
    made = chat.generate([5], max_new_tokens=4)
    assert made.recomputed == 3
    assert made.tokens[0].tolist() == greedy(told, 4, expansion, stop=())


def test_adapters_by_sample_are_watched_too(lm, adapters, make_adapter):
    chat = lm.chat(adapters=["a", "b"], stop=())
    chat.generate([[1], [2]], max_new_tokens=2)
    lm.swap("c")  # of no concern to these two
    assert chat.generate([[1], [2]], max_new_tokens=2).recomputed == 0
    lm.load(make_adapter("lora", draw=7, targets=LM_TARGETS), name="b")
    assert chat.generate([[1], [2]], max_new_tokens=2).recomputed == 5
    lm.unload("a")
    with pytest.raises(UsageError, match=r"adapter must be resident \(b, c\), got 'a'"):
        chat.generate([[1], [2]], max_new_tokens=2)


def test_a_text_under_way_keeps_its_adapter(lm, greedy, adapters):
    """Others swap between its tokens, on this thread and on three more."""
    stop, names = threading.Event(), ["a", "b", "c", None]

    def churn(_):
        while not stop.is_set():
            for name in names:
                lm.swap(name)

    def write(_):
        for _ in range(40):
            made = lm.generate([3, 1, 4], max_new_tokens=12, stop=()).tokens[0].tolist()
            assert made in wanted
        return True

    wanted = [greedy([3, 1, 4], 12, adapters[name], stop=()) for name in names]
    assert len({tuple(one) for one in wanted}) == 4
    lm.swap("a")
    taken = []
    for tokens in lm.chat(stop=()).stream([3, 1, 4], max_new_tokens=12):
        lm.swap("b")
        taken.append(int(tokens[0]))
    assert taken == wanted[0]
    with ThreadPoolExecutor(6) as pool:
        churners = [pool.submit(churn, i) for i in range(3)]
        try:
            assert all(pool.map(write, range(3)))
        finally:
            stop.set()
        for churner in churners:
            churner.result()


def test_leaving_off_early_loses_nothing(lm, greedy):
    chat = lm.chat(stop=())
    for index, _tokens in enumerate(chat.stream([3, 1, 4], max_new_tokens=10)):
        if index == 3:
            break
    told = [3, 1, 4, *greedy([3, 1, 4], 4, stop=()), 6]
    assert chat.generate([6], max_new_tokens=3).tokens[0].tolist() == greedy(told, 3, stop=())


def test_a_prompt_that_fails_is_not_remembered(lm, greedy):
    chat = lm.chat(stop=())
    chat.generate([3], max_new_tokens=2)
    with pytest.raises(RegrowError, match="model must take these inputs"):
        chat.generate([99], max_new_tokens=2)
    told = [3, *greedy([3], 2, stop=()), 4]
    assert chat.generate([4], max_new_tokens=3).tokens[0].tolist() == greedy(told, 3, stop=())


def test_tokens_are_told_as_they_come(lm):
    seen = []
    made = lm.generate(PROMPTS, max_new_tokens=9, stop=(2, 12), on_tokens=seen.append)
    table = np.stack(seen, axis=1)
    assert table.dtype == np.int64
    for row, tokens in zip(table, made.tokens, strict=True):
        np.testing.assert_array_equal(row[row >= 0], tokens)
        assert (row[len(tokens) :] == -1).all()


def test_the_context_bounds_a_text(lm):
    assert len(lm.generate([1] * 20, stop=()).tokens[0]) == 4
    assert len(lm.generate([1] * 20, max_new_tokens=99, stop=()).tokens[0]) == 4
    with pytest.raises(UsageError, match="room in the model's context of 24 tokens, got 24"):
        lm.generate([1] * 24)


# -- sampling ------------------------------------------------------------------------------------


def test_the_same_seed_is_the_same_text(lm):
    texts = {
        tuple(lm.generate([3, 1, 4], temperature=2.0, seed=seed, stop=()).tokens[0].tolist())
        for seed in (0, 1, 2, 0, 1, 2)
    }
    assert len(texts) == 3


def test_a_sample_in_the_first_row_is_drawn_as_alone(lm):
    """Padding and company change nothing; equal prompts in other rows have draws of their own."""
    options = {"temperature": 2.0, "seed": 5, "stop": (), "max_new_tokens": 8}
    alone = lm.generate([3, 1], **options).tokens[0]
    together = lm.generate([[3, 1], [3, 1], [9, 9, 9, 9]], **options).tokens
    np.testing.assert_array_equal(together[0], alone)
    assert together[1].tolist() != alone.tolist()


def test_shares_of_drawn_tokens_are_the_probabilities():
    """20,000 draws: each share within five standard errors, and its mean square (chi-square)."""
    probabilities = np.array([0.05, 0.4, 0.02, 0.25, 0.28])
    logits = np.tile(np.log(probabilities).astype(np.float32), (20_000, 1))
    drawn = choose(logits, np.zeros(20_000, dtype=np.int64), 1, 1.0, 1.0)
    counts = np.bincount(drawn, minlength=5)
    expected = 20_000 * probabilities
    assert ((counts - expected) ** 2 / expected).sum() < 18.5  # 4 degrees, p = 0.001
    sharper = probabilities**2 / (probabilities**2).sum()  # temperature 0.5
    counts = np.bincount(choose(logits, np.arange(20_000), 2, 0.5, 1.0), minlength=5)
    assert ((counts - 20_000 * sharper) ** 2 / (20_000 * sharper)).sum() < 18.5


@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.01, {1}), (0.39, {1}), (0.41, {1, 4}), (0.9, {1, 3, 4}), (1.0, None)]
)
def test_top_p_keeps_the_fewest_that_reach_it(top_p, kept):
    probabilities = np.array([0.05, 0.4, 0.02, 0.25, 0.28])
    logits = np.tile(np.log(probabilities).astype(np.float32), (3000, 1))
    drawn = choose(logits, np.arange(3000), 3, 1.0, top_p)
    assert set(drawn.tolist()) == (kept or set(range(5)))


def test_draws_are_philox_of_seed_place_and_row():
    """Golden: inversion of (2^26 · ⌊w0 / 32⌋ + ⌊w1 / 64⌋) / 2^53, words at (place, row, 5, 0)."""
    place, rows = np.array([7, 7, 9]), np.arange(3)
    words = philox4x32(place, rows, 5, 0, (11, 0)).astype(np.uint64)
    draws = ((words[:, 0] >> 5) * 2**26 + (words[:, 1] >> 6)) / 2**53
    logits = np.zeros((3, 1000), dtype=np.float32)  # equal ones in the order of ids
    np.testing.assert_array_equal(
        choose(logits, place, 11, 1.0, 1.0), np.floor(draws * 1000).astype(int)
    )


def test_extreme_logits():
    logits = np.array([[-np.inf, 1e38, -1e38], [0, -np.inf, -np.inf]], dtype=np.float32)
    for temperature in (1e-300, 1.0, 1e300):
        drawn = choose(logits, np.zeros(2, int), 0, temperature, 0.9)
        assert drawn.tolist() == [1, 0] or temperature == 1e300
    with pytest.raises(RegrowError, match="logits must be numbers, got NaN"):
        choose(np.array([[0, np.nan]], dtype=np.float32), np.zeros(1, int), 0, 1.0, 1.0)


# -- refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"temperature": -1.0}, "temperature must be a number from 0, got -1.0"),
        ({"temperature": float("nan")}, "temperature must be a number from 0, got nan"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1, got 0.0"),
        ({"seed": -1}, "seed must be an integer from 0"),
        ({"adapters": ["a"]}, "adapter must be resident"),
        ({"adapters": [None, None]}, "adapters must be one per sample"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"attention_mask": [[1, 1]]}, "attention_mask must be as input_ids"),
        ({"attention_mask": [[0]]}, "input_ids must be at least one integer per sample"),
    ],
)
def test_settings_that_do_not_serve(lm, settings, match):
    with pytest.raises(UsageError, match=match):
        lm.generate([3], **settings)


@pytest.mark.parametrize("ids", [[], [[]], [[1], []], [0.5], [[[1]]], 3, "text",
                                 np.zeros((0, 3), int)])  # fmt: skip
def test_ids_that_are_none(lm, ids):
    with pytest.raises(UsageError, match="input_ids must be at least one integer per sample, got"):
        lm.generate(ids)


def test_a_conversation_keeps_its_number_of_samples(lm):
    chat = lm.chat()
    chat.generate([[1], [2]], max_new_tokens=1)
    with pytest.raises(UsageError, match="of the conversation's 2 samples, got 1"):
        chat.generate([1])


def test_a_model_without_a_cache(bundle):
    with pytest.raises(UsageError, match="must have a key-value cache to generate text, got none"):
        bundle.generate([1])


def test_the_documents_example(lm_folder, make_adapter, tmp_path, monkeypatch, capsys):
    text = (Path(__file__).parents[2] / "docs" / "generate.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    make_adapter("lora", targets=LM_TARGETS).save(tmp_path / "user.safetensors")
    shutil.copytree(lm_folder, tmp_path / "bundle")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "docs/generate.md", "exec"), {})  # noqa: S102
    assert "tokens/s" in capsys.readouterr().out
