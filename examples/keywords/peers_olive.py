"""The LoRA that `peers.py adapt` trained, taken out of the graph by Olive instead of by hand.

    peers/bin/pip install olive-ai==0.13.0
    peers/bin/python examples/keywords/peers_olive.py BASE OUT --rank 4

Reads OUT/user.onnx_adapter and writes OUT/olive.onnx in int8 and OUT/olive.onnx_adapter. Rounding
comes first, as a graph that Olive has taken the LoRA out of fails quant_pre_process.
"""

import argparse
import os
from pathlib import Path

import onnx
import onnxruntime as ort
import torch
from onnxruntime.quantization import quantize_dynamic
from peers import configured, graph, load
from peft import get_peft_model

os.environ["OLIVE_DISABLE_TELEMETRY"] = "1"
from olive.model import ONNXModelHandler
from olive.passes.olive_pass import create_pass_from_dict
from olive.passes.onnx.common import is_lora_node
from olive.passes.onnx.extract_adapters import ExtractAdapters


def trained(base, out, rank):
    """PEFT's model with the user's LoRA."""
    found = ort.AdapterFormat.read_adapter(str(out / "user.onnx_adapter")).get_parameters()
    model = get_peft_model(load(base), configured(rank)).eval()
    state = {name: torch.from_numpy(value.numpy().copy()) for name, value in found.items()}
    assert not model.load_state_dict(state, strict=False).unexpected_keys
    return model


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rank", type=int, default=4)
    given = parser.parse_args()
    path, rounded = given.out / "olive.fp32.onnx", given.out / "olive.onnx"
    graph(trained(given.base, given.out, given.rank), path, fold=True)
    nodes = onnx.load(path).graph.node
    keep = [node.name for node in nodes if is_lora_node(node.op_type, node.name)]
    quantize_dynamic(path, rounded, nodes_to_exclude=keep)
    extract = create_pass_from_dict(ExtractAdapters, {}, disable_search=True)
    made = Path(
        extract.run(ONNXModelHandler(str(rounded)), str(given.out / "extracted")).model_path
    )
    made.replace(rounded)
    (made.parent / "adapter_weights.onnx_adapter").replace(given.out / "olive.onnx_adapter")
    made.parent.rmdir()
    path.unlink()


if __name__ == "__main__":
    main()
