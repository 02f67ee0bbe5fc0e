"""ONNX graphs of the families: the same function, and every product has two quantized factors."""

import pytest
import torch
from families import build

from quant import calibrate, quantize_model
from quant.recipes import INPUTS, PAPER

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")
openvino = pytest.importorskip("openvino")

from quant.onnx import to_onnx  # noqa: E402

IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
MOVES = ("Transpose", "Reshape", "Split", "Slice", "Gather", "Concat", "Expand", "Squeeze", "Unsqueeze", "Identity")
MOVES += ("Tile", "GatherElements", "GatherND", "Cast")
# One of each kind of attention; each takes seconds
FAMILIES = ("norms inside", "siglip", "swin v2", "beit, both biases", "relative positions", "eva-02", "dinov3")


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
        moved = node.input if node.op_type == "Concat" else node.input[:1]  # the others are shapes and places
        return node.op_type not in MOVES or any(map(is_float, moved))

    for node in graph.node:
        if node.op_type in ("MatMul", "Gemm", "Conv") and any(map(is_float, node.input[:2])):
            found.append(node.name)
    return found


def onnxruntime_logits(model):
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    return session.run(None, {"images": IMAGES[:3].numpy()})[0]


def openvino_logits(model):
    core = openvino.Core()
    compiled = core.compile_model(core.read_model(model), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return compiled([IMAGES[:3].numpy()])[0]


def check(family, recipe):
    """Export a family, and run it in two runtimes; returns the names of the products that run in float."""
    expected = build(family)(IMAGES)
    quantized = calibrate(quantize_model(build(family), recipe=recipe), IMAGES)
    graph = to_onnx(quantized)
    onnx.checker.check_model(graph, full_check=True)
    simulated = quantized(IMAGES[:3])
    noise = (simulated - expected[:3]).square().mean().sqrt() / expected.std()
    for runtime in (onnxruntime_logits, openvino_logits):
        logits = torch.from_numpy(runtime(graph.SerializeToString()))
        assert (simulated - logits).square().mean().sqrt() / expected.std() < max(noise, 0.01), runtime.__name__
    return float_products(graph.graph)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_graph_is_the_model_and_all_its_products_have_quantized_factors(family):
    assert check(family, INPUTS) == []


@torch.no_grad()
def test_where_the_paper_quantizes_the_sums_of_values_run_in_float():
    """Softmax's output stays in float: one product for each of the two attention layers."""
    assert len(check("eva-02", PAPER)) == 2
