"""The expander in standard operators gives the runtime's bits."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator

from regrow_export import build_expander
from regrow_export.methods import adapter_inputs
from regrow_export.methods.fourierft import _draws
from regrow_export.methods.registry import BUILDERS
from regrow_export.slots import expansion_feeds
from regrow_format.adapter import Target
from regrow_format.basis import BasisCache, Role, sign_bits
from regrow_format.errors import UsageError
from regrow_format.methods import METHODS, get_method

# Sizes that share a group, sizes that do not, and none that fills its last block.
TARGETS = (
    Target("block.0.key", 24, 40),
    Target("block.0.up", 24, 100),
    Target("block.1.down", 100, 24),
    Target("block.1.key", 24, 40),
)
SMALL = (Target("a", 10, 7), Target("b", 5, 7))


def _run(model: onnx.ModelProto, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    import onnxruntime as ort

    session = ort.InferenceSession(model.SerializeToString())
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, inputs), strict=True))


def _expected(adapter) -> dict[str, np.ndarray]:
    return expansion_feeds(get_method(adapter.method).expand(adapter, BasisCache()))


def _check_bits(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert found[name].dtype == np.float32
        np.testing.assert_array_equal(found[name].view(np.uint32), value.view(np.uint32), name)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("storage", ["int8", "int4", "int2"])
def test_integer_codes_expand_to_the_same_bits(make_adapter, storage, shared):
    adapter = make_adapter(TARGETS, storage=storage, shared=shared, k=70, l=33)
    model = build_expander(adapter.config, TARGETS, storage)
    _check_bits(_run(model, adapter_inputs(adapter)), _expected(adapter))


@pytest.mark.parametrize("storage", ["int8", "int4", "int2", "fp16"])
@pytest.mark.parametrize("method", ["vera", "lora", "ia3", "ssf", "bitfit"])
def test_every_scaled_method_expands_to_the_same_bits(make_adapter, method, storage):
    # One multiply and no sum: this is so for floats too.
    adapter = make_adapter(TARGETS, method=method, storage=storage)
    model = build_expander(adapter.config, TARGETS, storage, method)
    _check_bits(_run(model, adapter_inputs(adapter)), _expected(adapter))


@pytest.mark.parametrize("storage", ["int8", "int4", "fp16"])
@pytest.mark.parametrize("seed", [0, 777, 2**64 - 1])
def test_fourier_deltas_agree_to_rounding(make_adapter, storage, seed):
    targets = (*TARGETS, Target("tall", 2000, 3))
    adapter = make_adapter(targets, method="fourierft", storage=storage, seed=seed, n=300)
    model = build_expander(adapter.config, targets, storage, "fourierft")
    found, expected = _run(model, adapter_inputs(adapter)), _expected(adapter)
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert found[name].shape == value.shape
        np.testing.assert_allclose(found[name], value, rtol=0, atol=1e-6 * np.abs(value).max())


def test_fourier_places_may_fill_the_grid(make_adapter):
    target = (Target("a", 5, 4), Target("b", 4, 5), Target("c", 1, 20))
    for count in (1, 2, 20):
        adapter = make_adapter(target, method="fourierft", n=count)
        model = build_expander(adapter.config, target, "int8", "fourierft")
        found = _run(model, adapter_inputs(adapter))
        for name, value in _expected(adapter).items():
            np.testing.assert_allclose(found[name], value, rtol=0, atol=1e-6 * np.abs(value).max())


def test_enough_words_are_drawn_for_different_places():
    assert _draws(1, 10) == 1
    # n ln(N / (N - n)) would do on the average: 1000.8, 693.1 and 7485 of these.
    assert 1100 < _draws(1000, 768 * 768) < 1200
    assert 693 < _draws(500, 1000) < 1100
    assert 7485 < _draws(1000, 1000) < 60000
    with pytest.raises(UsageError, match="n must be well below the 589824 places of a layer"):
        _draws(768 * 768, 768 * 768)
    with pytest.raises(UsageError, match="must have from n = 11 to"):
        _draws(11, 10)


def test_every_method_has_a_builder():
    assert set(BUILDERS) == set(METHODS)


def test_one_graph_serves_every_seed_and_coefficient(make_adapter):
    model = build_expander(make_adapter(TARGETS).config, TARGETS, "int8")
    for draw, seed in enumerate((0, 1, 2**32, 2**64 - 1)):
        adapter = make_adapter(TARGETS, seed=seed, draw=draw)
        _check_bits(_run(model, adapter_inputs(adapter)), _expected(adapter))


def test_codes_at_their_bounds_do_not_saturate(make_adapter):
    adapter = make_adapter(SMALL, k=1000, l=1000)
    for part in adapter.coefficients.values():
        part.values[:] = -127
    model = build_expander(adapter.config, SMALL, "int8")
    _check_bits(_run(model, adapter_inputs(adapter)), _expected(adapter))


@pytest.mark.parametrize("shared", [True, False])
def test_onnx_reference_gives_the_same_bits(make_adapter, shared):
    adapter = make_adapter(SMALL, k=3, l=2, rank=2, shared=shared)
    evaluator = ReferenceEvaluator(build_expander(adapter.config, SMALL, "int8"))
    found = dict(
        zip(evaluator.output_names, evaluator.run(None, adapter_inputs(adapter)), strict=True)
    )
    _check_bits(found, _expected(adapter))


@pytest.mark.parametrize("method", ["vera", "lora", "ia3", "ssf", "bitfit", "fourierft"])
def test_onnx_reference_expands_every_method(make_adapter, method):
    adapter = make_adapter(SMALL, method=method)
    evaluator = ReferenceEvaluator(build_expander(adapter.config, SMALL, "int8", method))
    values = evaluator.run(None, adapter_inputs(adapter))
    found, expected = dict(zip(evaluator.output_names, values, strict=True)), _expected(adapter)
    if method != "fourierft":
        return _check_bits(found, expected)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=0, atol=1e-6 * np.abs(value).max())


@pytest.mark.parametrize("storage", ["fp32", "fp16"])
@pytest.mark.parametrize("shared", [True, False])
def test_float_coefficients_agree_to_rounding(make_adapter, storage, shared):
    adapter = make_adapter(TARGETS, storage=storage, shared=shared)
    found = _run(build_expander(adapter.config, TARGETS, storage), adapter_inputs(adapter))
    for name, value in _expected(adapter).items():
        np.testing.assert_allclose(found[name], value, rtol=0, atol=1e-6 * np.abs(value).max())


def test_the_expander_has_static_shapes_and_standard_operators(make_adapter):
    for method in ("fourierft", "vera", "lora", "ia3", "ssf", "bitfit", "nola"):
        config = make_adapter(TARGETS, method=method).config
        model = build_expander(config, TARGETS, "int8", method)
        _check_model(model)
    shapes = {
        o.name: [d.dim_value for d in o.type.tensor_type.shape.dim] for o in model.graph.output
    }
    assert shapes["block.0.up.adapter_A"] == [1, 24, 4]
    assert shapes["block.0.up.adapter_B"] == [1, 4, 100]


def _check_model(model):
    onnx.checker.check_model(model, full_check=True)
    assert {node.domain for node in model.graph.node} == {""}
    assert model.ir_version <= 10  # what ONNX Runtime 1.20 reads
    assert not any("Random" in node.op_type for node in model.graph.node)
    for value in model.graph.output:
        assert all(d.dim_value for d in value.type.tensor_type.shape.dim)


def test_the_first_signs_are_those_of_the_definition(make_adapter):
    # One coefficient of 1 and a scale of 1: the factor is the basis vector itself.
    target = (Target("x", 40, 1),)
    adapter = make_adapter(target, k=1, l=1, rank=1, seed=0)
    inputs = adapter_inputs(adapter)
    inputs["alpha"][:], inputs["alpha.scale"][:] = 1, 1
    found = _run(build_expander(adapter.config, target, "int8"), inputs)["x.adapter_A"].ravel()
    signs = "".join("+" if value > 0 else "-" for value in found)
    assert signs == "+-+-+-++---+-++++++--+---++--++-+-++---+"
    bits = np.unpackbits(sign_bits(0, Role.NOLA_A, 1, 40), bitorder="little")
    np.testing.assert_array_equal(found > 0, bits == 1)


def test_unknown_names_are_refused(make_adapter):
    config = make_adapter(SMALL).config
    with pytest.raises(UsageError, match="storage must be one of"):
        build_expander(config, SMALL, "int9")
    with pytest.raises(UsageError, match=r"method must be one of nola, .* for a graph, got 'dora'"):
        build_expander(config, SMALL, "fp32", "dora")
