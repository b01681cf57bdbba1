"""What bundles take in RAM, as the system counts it in a fresh process without torch."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from regrow_export import ExportConfig, ExportRequest, ExportSource, export_bundle
from regrow_runtime import Bundle

MEASURE = """
import json, sys
import numpy as np
import regrow_runtime

def state():
    lines = (line.split() for line in open('/proc/self/status'))
    found = {w[0][:-1]: int(w[1]) * 1024 for w in lines if w[0][:3] in ('VmH', 'VmR', 'Rss')}
    open('/proc/self/clear_refs', 'w').write('5')
    return found

before = state()
bundle = regrow_runtime.Bundle.open(sys.argv[1], profile=sys.argv[2], threads=1)
opened = state()
for count in (8, 1, 1):
    bundle.run({'pixel_values': np.zeros((count, 3, 64, 64), np.float32)})
found = {'peak': opened['VmHWM'] - before['VmRSS']}
for name, part in (('opened', opened), ('run', state())):
    found[name] = part['RssAnon'] - before['RssAnon']
print(json.dumps(found))
"""
# A session of no weights at all takes this, and its code 8 MB of mapped pages.
SESSION, CODE = 10e6, 10e6


@pytest.fixture(scope="module")
def wide() -> ExportSource:
    """4 layers, 512 wide, 17 tokens: 50 MB in fp32."""
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(1)
    config = ViTConfig(
        hidden_size=512, num_hidden_layers=4, num_attention_heads=4, intermediate_size=2048,
        image_size=64, patch_size=16, num_labels=3,
    )  # fmt: skip
    model = ViTForImageClassification(config).eval()
    return ExportSource(
        model, "image-classification", "sha256:" + "ab" * 32, ("classifier",), ("a", "b", "c")
    )


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "int4"])
def test_profiles_take_the_ram_that_they_promise(wide, tmp_path, precision):
    folder = tmp_path / precision
    export_bundle(
        wide,
        folder,
        ExportRequest(
            ExportConfig(targets=["vit.encoder.layer.0.output.dense"], precision=precision)
        ),
    )
    stored = sum(path.stat().st_size for path in folder.glob("backbone.onnx*"))
    found = {}
    for profile in ("speed", "memory"):
        call = [sys.executable, "-c", MEASURE, str(folder), profile]
        done = subprocess.run(call, stdout=subprocess.PIPE, check=True, text=True)
        found[profile] = json.loads(done.stdout)
    assert found["memory"]["opened"] < 0.25 * stored + SESSION
    assert found["memory"]["peak"] < 1.15 * stored + SESSION + CODE
    assert found["memory"]["run"] < found["memory"]["opened"] + 20e6
    assert found["speed"]["run"] > stored  # as the numbers would not tell apart what is mapped
    if precision in ("fp32", "int8"):  # others are widened
        assert found["speed"]["peak"] < 1.15 * stored + SESSION + CODE
    pixels = np.random.default_rng(0).standard_normal((2, 3, 64, 64)).astype(np.float32)
    speed, memory = (
        Bundle.open(folder, profile=profile, threads=1).run({"pixel_values": pixels})["logits"]
        for profile in ("speed", "memory")
    )
    # int4: the fast kernels round what goes into a layer to 8 bits.
    tolerance = 0.05 * np.abs(speed).max() if precision == "int4" else 1e-5
    np.testing.assert_allclose(memory, speed, atol=tolerance)
