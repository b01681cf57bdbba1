"""What is refused, in which words, and that nothing is left behind."""

from __future__ import annotations

import resource
import signal
import sys
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch

import regrow_export.validation.parity
from regrow_export import ExportConfig, ExportRequest, ExportSource, export_bundle, slot_targets
from regrow_export.validation import partitions
from regrow_format.adapter import Target
from regrow_format.errors import MismatchError, RegrowError, UsageError


@pytest.fixture
def refused(plain, plain_inputs, tmp_path, asked):
    """refused(message, source=..., **options): the export fails so and leaves an empty folder."""

    def call(match, *, error=UsageError, source=plain, **options):
        with pytest.raises(error, match=match) as caught:
            export_bundle(source, tmp_path / "b", asked(**{"inputs": plain_inputs, **options}))
        assert list(tmp_path.iterdir()) == []
        return caught.value

    return call


@pytest.mark.parametrize(
    ("names", "match"),
    [
        (["poled"], "path of a linear layer, got 'poled'; near: pooled"),
        (["zzz"], "path of a linear layer, got 'zzz'; there are 7 linear layers"),
        (["stem", "stem"], "named once, got 'stem' twice"),
        (["pair", "pair.up"], "must not lie inside another, got 'pair.up' inside 'pair'"),
        (["fc"], "must be a target or the head, got 'fc' as both"),
        ("stem", "targets must be a list of names, got the string 'stem'"),
        (["idle"], "got no trace of idle; drop them from the targets"),
    ],
)
def test_targets_that_cannot_be(refused, names, match):
    error = RegrowError if names == ["idle"] else UsageError
    refused(match, targets=names, error=error)


def test_requests_that_make_no_sense(refused, plain, adapter_for):
    adapter = adapter_for(plain, ["stem"])
    refused("mode must be one of swappable, merged, seeded, got 'fast'", mode="fast")
    refused("adapter must be given for mode seeded, got none", mode="seeded")
    refused("targets must be left out for mode merged", mode="merged", targets=["stem"])
    refused("targets must be the adapter's", mode="merged", adapter=adapter, targets=["pair"])
    refused("targets must name at least one layer", source=replace(plain, head=()))
    refused(
        "head must name nn.Linear layers, got 'fcc'; near: fc", source=replace(plain, head=("fcc",))
    )


def test_an_adapter_of_another_model_is_refused_with_every_finding(refused, plain, make_adapter):
    targets = (Target("other", 3, 3), Target("stem", 6, 17))
    adapter = replace(make_adapter(targets), backbone_id=plain.backbone_id)
    error = refused("adapter must fit", error=MismatchError, mode="seeded", adapter=adapter)
    assert len(error.findings) == 2
    assert error.findings[0].startswith("other: no such linear layer")
    assert error.findings[1] == "stem: in, out must be (6, 16), got (6, 17)"


def test_an_adapter_of_another_backbone_is_refused_in_one_line(refused, make_adapter):
    adapter = replace(make_adapter((Target("other", 3, 3),)), backbone_id="sha256:cd")
    error = refused("adapter must be of this backbone", error=MismatchError, mode="seeded",
                    adapter=adapter)  # fmt: skip
    assert "\n" not in str(error)


def test_a_head_that_does_not_fit_is_refused(refused, plain, adapter_for, with_head):
    adapter = adapter_for(plain, ["stem"])
    for widths, match in (
        ({"classifier": (16, 5)}, r"head must have the layers \['fc'\], got \['classifier'\]"),
        ({"fc": (12, 5)}, "head fc: in must be 16, got 12"),
    ):
        bad = with_head(adapter, widths)
        refused(match, error=MismatchError, mode="merged", adapter=bad)


def test_an_existing_output_needs_force(plain, plain_inputs, tmp_path):
    out = tmp_path / "b"
    out.mkdir()
    (out / "mine.txt").write_text("keep me")
    for force in (False, True):  # a folder that regrow did not write is never replaced
        with pytest.raises(UsageError, match="must be a new path"):
            export_bundle(
                plain,
                out,
                ExportRequest(ExportConfig(targets=["stem"]), inputs=plain_inputs),
                force=force,
            )
    assert (out / "mine.txt").read_text() == "keep me"
    (out / "manifest.json").write_text('{"backbone_id": ""}')
    export_bundle(
        plain, out, ExportRequest(ExportConfig(targets=["stem"]), inputs=plain_inputs), force=True
    )
    assert not (out / "mine.txt").exists()
    assert (out / "manifest.json").is_file()


@pytest.mark.parametrize("error", [RegrowError("they differ"), KeyboardInterrupt()])
def test_a_failing_check_keeps_the_old_bundle(plain, plain_inputs, tmp_path, monkeypatch, error):
    out = tmp_path / "b"
    out.mkdir()
    (out / "manifest.json").write_text('{"backbone_id": ""}')

    def fail(*_args):
        raise error

    monkeypatch.setattr(regrow_export.validation.parity, "compare", fail)
    with pytest.raises(type(error)):
        export_bundle(
            plain,
            out,
            ExportRequest(ExportConfig(targets=["stem"]), inputs=plain_inputs),
            force=True,
        )
    assert [path.name for path in tmp_path.rglob("*")] == ["b", "manifest.json"]


def test_outputs_beyond_the_tolerance_are_refused():
    compare = regrow_export.validation.parity.compare
    one = np.ones(3, dtype=np.float32)
    assert compare(one, one, "base") == 0
    with pytest.raises(RegrowError, match="base: ONNX Runtime and torch must agree within rtol"):
        compare(one, one + np.float32(0.01), "base")
    with pytest.raises(RegrowError, match="must agree"):
        compare(one, one * np.nan, "base")
    with pytest.raises(RegrowError, match=r"shape must be \[2\], got \[3\]"):
        compare(one, one[:2], "base")


def test_a_slot_without_effect_is_refused(tmp_path):
    class Masked(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.masked = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)

        def forward(self, x):
            return self.used(x) + 0.0 * self.masked(x)

    source = ExportSource(Masked().eval(), "custom", "sha256:00")
    inputs = {"x": np.ones((2, 4), dtype=np.float32)}
    with pytest.raises(RegrowError, match=r"slot masked \(low_rank\) must change"):
        export_bundle(
            source,
            tmp_path / "b",
            ExportRequest(ExportConfig(targets=["used", "masked"]), inputs=inputs),
        )
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_does_not_keep_the_batch_first_is_refused(tmp_path):
    class TokensFirst(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(4, 4)

        def forward(self, x):  # (batch, 5, 4)
            return self.layer(x.transpose(0, 1)).transpose(0, 1)

    source = ExportSource(TokensFirst().eval(), "custom", "sha256:00")
    inputs = {"x": np.ones((2, 5, 4), dtype=np.float32)}
    with pytest.raises(RegrowError, match="see the samples of the batch first"):
        export_bundle(
            source, tmp_path / "b", ExportRequest(ExportConfig(targets=["layer"]), inputs=inputs)
        )
    assert list(tmp_path.iterdir()) == []


def test_models_that_are_not_ready(refused, plain, vit):
    training = replace(plain, model=torch.nn.Sequential(torch.nn.Linear(2, 2)), head=())
    refused("must be in eval mode", source=training, targets=["0"])
    half = replace(plain, model=torch.nn.Sequential(torch.nn.Linear(2, 2)).half().eval(), head=())
    refused(r"must be float32, got 0.weight in float16; call model.float\(\)", source=half)
    refused("inputs must be given for a model that is not from transformers", inputs=None)
    refused("inputs must be arguments of forward: x, gate", inputs={"y": np.ones((2, 2))})
    refused(
        "task must be one that optimum exports for vit, got 'text-generation'",
        source=replace(vit, task="text-generation"), inputs=None,
    )  # fmt: skip
    refused(
        "task must be 'text-generation', which has a key-value cache unless --no-cache",
        source=replace(vit, task="text-generation-with-past"),
    )


def _text_model(name, **sizes):
    import transformers

    config = getattr(transformers, f"{name}Config")(vocab_size=60, **sizes)
    kind = "T5ForConditionalGeneration" if name == "T5" else f"{name}Model"
    model = getattr(transformers, kind)(config).eval()
    return ExportSource(model, "feature-extraction", "sha256:00")


def test_architectures_that_optimum_does_not_export(refused, capfd):
    """Which, and the way that is left; where that fails too, one line and no graph on stdout."""
    fnet = _text_model("FNet", hidden_size=16, num_hidden_layers=1, intermediate_size=16)
    target = ["encoder.layer.0.output.dense"]
    error = refused(
        "architecture must be one that optimum exports, got fnet: give inputs .* torch.onnx",
        source=fnet, inputs=None, targets=target,
    )  # fmt: skip
    assert "\n" not in str(error)
    ids = {"input_ids": np.arange(12).reshape(2, 6)}
    refused("one that torch.onnx can trace, got .* operator 'aten::fft_fftn'.*: give",
            source=fnet, inputs=ids, targets=target, error=RegrowError)  # fmt: skip
    five = _text_model("T5", d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8)
    refused(
        "architecture must be an encoder or a decoder alone, got t5, which has both",
        source=five, inputs=None, error=RegrowError,
        targets=["encoder.block.0.layer.0.SelfAttention.q"],
    )  # fmt: skip
    assert capfd.readouterr().out == ""


def test_an_encoder_of_two_needs_inputs_and_is_exported_with_them(refused, tmp_path):
    """optimum's config is of the whole: torch.onnx traces the part."""
    import transformers

    config = transformers.T5Config(
        vocab_size=60, d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8
    )
    model = transformers.T5EncoderModel(config).eval()
    encoder = ExportSource(model, "feature-extraction", "sha256:00")
    target = ["encoder.block.0.layer.0.SelfAttention.q"]
    refused(
        r"inputs must be given for T5EncoderModel, .* for t5 \(it takes no decoder_input_ids\)",
        source=encoder, inputs=None, targets=target,
    )  # fmt: skip
    ids = {"input_ids": np.arange(12).reshape(2, 6)}
    manifest = export_bundle(
        encoder, tmp_path / "b", ExportRequest(ExportConfig(targets=target), inputs=ids)
    )
    assert manifest.parity["base_max_abs"] < 1e-4


class _Deciding(torch.nn.Module):
    """Takes a number out of a tensor; `way` says of which."""

    def __init__(self, way):
        super().__init__()
        self.way, self.one = way, torch.nn.Linear(4, 4)
        self.register_buffer("often", torch.tensor(2))

    def forward(self, x):
        y = self.one(x)
        if self.way == "a branch":
            return y if x.mean() > 0 else -y
        times = self.often if self.way == "a constant" else x.abs().sum().long() % 7 + 1
        for _ in range(int(times.item())):
            y = torch.tanh(y)
        return y


@pytest.mark.parametrize("way", ["a branch", "a loop"])
def test_decisions_by_the_inputs_values(refused, way):
    x = np.array([[1, 2, 3, 4], [0.3, -0.1, 0.2, 0.5]], dtype=np.float32)
    refused(
        r"must not decide by its inputs' values, .* got a number .* at test_export_failures.py:\d+",
        source=ExportSource(_Deciding(way).eval(), "custom", "sha256:00"), inputs={"x": x},
        targets=["one"], error=RegrowError,
    )  # fmt: skip


class _Counting(torch.nn.Module):
    """Repeats a layer as often as an input says; or reads that input for nothing."""

    def __init__(self, *, used):
        super().__init__()
        self.used, self.one = used, torch.nn.Linear(4, 4)

    def forward(self, x, count):
        for _ in range(int(count[0]) if self.used else 2):
            x = torch.tanh(self.one(x))
        return x


@pytest.mark.parametrize(("used", "match", "error"), [
    (True, "must not decide by its inputs' values, .* at test_export_failures.py", RegrowError),
    (False, "inputs must be what the outputs depend on, got count, which", UsageError),
])  # fmt: skip
def test_a_number_that_all_samples_share(refused, used, match, error):
    """Turning the batch round would not show that it decides."""
    inputs = {"x": np.ones((2, 4), np.float32), "count": np.full(2, 3)}
    source = ExportSource(_Counting(used=used).eval(), "custom", "sha256:00")
    refused(match, source=source, inputs=inputs, targets=["one"], error=error)


def test_decisions_by_constants_are_fine(tmp_path):
    source = ExportSource(_Deciding("a constant").eval(), "custom", "sha256:00")
    inputs = {"x": np.ones((2, 4), dtype=np.float32)}
    export_bundle(
        source, tmp_path / "b", ExportRequest(ExportConfig(targets=["one"]), inputs=inputs)
    )
    assert (tmp_path / "b" / "manifest.json").is_file()


class _TokensFirst(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.one = torch.nn.Linear(5, 5)

    def forward(self, x):
        return torch.tanh(self.one(x.transpose(0, 1))).transpose(0, 1)


def test_a_model_that_puts_tokens_first(refused, tmp_path, asked):
    """The way out that the error names works."""
    source = ExportSource(_TokensFirst().eval(), "custom", "sha256:00")
    options = {"inputs": {"x": np.ones((2, 7, 5), np.float32)}, "targets": ["one"]}
    error = refused(
        "targets must see the samples of the batch first to have an adapter each, got .*"
        "--fixed-rank on the command line", source=source, error=RegrowError, **options,
    )  # fmt: skip
    assert "\n" not in str(error)
    export_bundle(source, tmp_path / "b", asked(fixed_rank=2, **options))


def test_a_head_that_is_not_reached(refused, plain):
    refused("no trace of idle; drop them from the targets, or name the head that is used",
            source=replace(plain, head=("idle",)), targets=["stem"], error=RegrowError)  # fmt: skip


def test_a_disk_that_is_full_when_the_graph_is_examined(vit, tmp_path):
    export_bundle(vit, tmp_path / "b", ExportRequest(ExportConfig(targets=[])))
    before = sorted((tmp_path / "b").iterdir())
    pixels = {"pixel_values": np.zeros((1, 1, 28, 28), np.float32)}
    with (
        _no_file_above(50_000),
        pytest.raises(RegrowError, match="disk must have room for the weights once more"),
    ):
        partitions(tmp_path / "b" / "backbone.onnx", pixels)
    assert sorted((tmp_path / "b").iterdir()) == before


@contextmanager
def _no_file_above(size):
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, before)


@pytest.mark.parametrize("room", [200, 3_000, 20_000, 70_000])
def test_a_full_disk(vit, tmp_path, room):
    """Files may grow to `room` bytes, of 600,000 that the model takes."""
    with (
        _no_file_above(room),
        pytest.raises(RegrowError, match=r"could not be written: .*") as caught,
    ):
        export_bundle(
            vit,
            tmp_path / "b",
            ExportRequest(ExportConfig(targets=["vit.encoder.layer.0.output.dense"])),
        )
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_files_that_cannot_be_copied(refused, plain, tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    taken = folder / "manifest.json"
    taken.touch()
    refused(
        "names of their own in a bundle, got manifest.json", source=replace(plain, files=(taken,))
    )
    refused("no such file", source=replace(plain, files=(folder / "gone.json",)))


def test_a_missing_extra_prints_its_pip_line(refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    refused(r"export needs onnx.*pip install .*\[export\]", error=RegrowError, targets=["stem"])


def test_targets_are_sorted_by_their_bytes(plain):
    names = [target.name for target in slot_targets(plain.model, ["stem", "pair.up", "pair.down"])]
    assert names == ["pair.down", "pair.up", "stem"]
