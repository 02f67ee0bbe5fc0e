"""ONNX graphs of the families: the same function, and every product has two quantized factors."""

import pytest
import torch
from families import build

from quant import calibrate, quantize_model
from quant.recipes import INPUTS, PAPER

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")

from quant.onnx import to_onnx  # noqa: E402

IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
MOVES = ("Transpose", "Reshape", "Split", "Slice", "Gather", "Concat", "Expand", "Squeeze", "Unsqueeze", "Identity")
MOVES += ("Tile", "GatherElements", "GatherND", "Cast")
FAMILIES = {  # of each attention and block one
    *("norms inside", "siglip", "parallel", "post-norm", "swin v2", "beit, both biases", "eva-02", "dinov3"),
    *("mixed rotation", "shared keys"),
}


def float_products(graph):
    """Names of the products with a factor that depends on the images and that nothing has quantized."""
    nodes = {output: node for node in graph.node for output in node.output}
    depends, found = {"images"}, []
    for node in graph.node:
        if depends & set(node.input):
            depends |= set(node.output)

    def is_float(name):
        node = nodes.get(name)
        if name not in depends or node is None or node.op_type == "DequantizeLinear":
            return name == "images"
        return node.op_type not in MOVES or any(is_float(entry) for entry in node.input if entry in depends)

    for node in graph.node:
        if node.op_type in ("MatMul", "Gemm", "Conv") and any(map(is_float, node.input[:2])):
            found.append(node.name)
    return found


@pytest.mark.parametrize("family", sorted(FAMILIES))
@torch.no_grad()
def test_graph_is_the_model_and_its_products_are_quantized(family):
    expected = build(family)(IMAGES)
    for recipe in (INPUTS, PAPER):
        quantized = calibrate(quantize_model(build(family), recipe=recipe), IMAGES)
        graph = to_onnx(quantized)
        onnx.checker.check_model(graph, full_check=True)
        session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
        logits = torch.from_numpy(session.run(None, {"images": IMAGES[:3].numpy()})[0])
        noise = (quantized(IMAGES[:3]) - expected[:3]).square().mean().sqrt() / expected.std()
        error = (quantized(IMAGES[:3]) - logits).square().mean().sqrt() / expected.std()
        assert error < max(noise, 0.01)
        # The paper leaves softmax's output in float: one product an attention layer, and in a pooling one
        attentions = {"swin v2": 4, "parallel": 4, "siglip": 3}.get(family, 2) if recipe is PAPER else 0
        assert len(float_products(graph.graph)) == attentions, float_products(graph.graph)
