"""The ONNX graph of a calibrated model: valid, of integers, and the same function as the simulation."""

import copy
from collections import Counter

import pytest
import torch
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer

from quant import calibrate, operators, quantize_model
from quant.biases import drop_key_biases
from quant.recipes import BEST, INPUTS, PAPER

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")

from onnxruntime.tools.onnx_model_utils import make_dim_param_fixed  # noqa: E402

from quant.onnx import to_onnx  # noqa: E402

IMAGES = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(1))
EXPORTED = {}  # of the fixtures' models, which are the same in every test: an export takes seconds


@pytest.fixture(params=[True, False], ids=["wide", "narrow"])
def wide(request, monkeypatch):
    """Whether a model counts as wide."""
    count_as_wide(monkeypatch, from_width=0 if request.param else 1000)
    return request.param


def count_as_wide(monkeypatch, from_width):
    for attention in (operators.OnnxAttention, operators.OnnxWindowAttention):
        monkeypatch.setattr(attention, "wide", from_width)


def quantized(model, w_bit=8, a_bit=8, skip=(), recipe=PAPER):
    return calibrate(quantize_model(copy.deepcopy(model), w_bit, a_bit, skip, recipe), IMAGES)


def exported(model, w_bit=8, a_bit=8, recipe=PAPER):
    """A fixture's model, calibrated, and its graph, which several tests look at."""
    case = (type(model), w_bit, a_bit, recipe, operators.OnnxAttention.wide)
    if case not in EXPORTED:
        simulated = quantized(model, w_bit, a_bit, recipe=recipe)
        EXPORTED[case] = simulated, to_onnx(simulated)
    return EXPORTED[case]


def run(graph, images, optimized=None):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if optimized:
        options.optimized_model_filepath = str(optimized)
    session = onnxruntime.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def error(logits, expected):
    return ((logits - expected).square().mean().sqrt() / expected.std()).item()


@torch.no_grad()
def check(model, simulated, graph):
    """The graph's logits for batches of 1 and 5 are nearer to the simulation than the simulation is to the float."""
    onnx.checker.check_model(graph, full_check=True)
    assert {node.domain for node in graph.graph.node} == {""}
    noise = error(simulated(IMAGES), model(IMAGES))
    for batch_size in (1, 5):
        logits = run(graph, IMAGES[:batch_size])
        assert logits.shape == (batch_size, 10)
        assert error(logits, simulated(IMAGES[:batch_size])) < max(noise, 0.01)


@pytest.mark.parametrize(("w_bit", "a_bit"), [(8, 8), (4, 4)])
def test_graph_computes_what_the_simulation_does(model, w_bit, a_bit):
    check(model, *exported(model, w_bit, a_bit))


@pytest.mark.parametrize(("w_bit", "a_bit"), [(8, 8), (4, 8), (8, 6)])
def test_graph_of_the_placement_on_inputs_does_in_either_width(model, w_bit, a_bit, wide):
    check(model, *exported(model, w_bit, a_bit, INPUTS))


@torch.no_grad()
def test_float_model_is_exported_as_it_is(model, capfd):
    graph = to_onnx(model)
    assert capfd.readouterr().err == ""  # nothing that a user could not understand
    torch.testing.assert_close(run(graph, IMAGES[:3]), model(IMAGES[:3]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("bits", "recipe"), [(8, PAPER), (5, BEST)], ids=lambda value: getattr(value, "name", str(value))
)
def test_symmetric_activations_are_int8_without_zero_points(model, bits, recipe):
    simulated, graph = exported(model, bits, bits, recipe.without_zero_points())
    check(model, simulated, graph)
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.graph.initializer}
    constants |= {node.output[0]: onnx.numpy_helper.to_array(node.attribute[0].t) for node in graph.graph.node
                  if node.op_type == "Constant" and node.attribute[0].t.ByteSize()}  # fmt: skip
    zeros = [constants[node.input[2]] for node in graph.graph.node if node.op_type == "QuantizeLinear"]
    assert zeros and all(zero.dtype == "int8" and not zero.any() for zero in zeros)


def test_float_quantizers_leave_their_products_in_float(vit):
    simulated = quantized(vit, skip=["blocks.0.*", "act_position"])
    graph = to_onnx(simulated)
    check(vit, simulated, graph)
    types = {tensor.name: tensor.data_type for tensor in graph.graph.initializer}
    assert types["blocks.0.attn.qkv.weight"] == onnx.TensorProto.FLOAT
    assert types.get("pos_embed") != onnx.TensorProto.UINT8
    assert types["blocks.1.attn.qkv.weight"] == onnx.TensorProto.INT8


def test_weights_and_quantized_parameters_are_integers(model):
    _, graph = exported(model)
    for tensor in graph.graph.initializer:
        if tensor.name.endswith((".weight", "pos_embed", "bias_table")) and len(tensor.dims) > 1:
            assert tensor.data_type in (onnx.TensorProto.INT8, onnx.TensorProto.UINT8), tensor.name


def test_products_run_in_integers(model, tmp_path):
    blocks = sum(1 for name, _ in model.named_modules() if name.endswith("attn"))
    run(exported(model)[1], IMAGES[:1], tmp_path / "optimized.onnx")
    kinds = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
    assert kinds.count("MatMulIntegerToFloat") == 4 * blocks + 1  # qkv, proj, fc1, fc2; patches
    assert kinds.count("QLinearMatMul") >= blocks  # the scores
    assert not any("Conv" in kind for kind in kinds)  # its bias would be rounded
    assert kinds.count("MatMul") == blocks  # softmax's output times the values


@pytest.mark.parametrize("recipe", [INPUTS, BEST.without_zero_points()], ids=lambda recipe: recipe.name)
def test_every_product_runs_in_integers_where_all_inputs_are_quantized(model, tmp_path, recipe, wide):
    blocks = sum(1 for name, _ in model.named_modules() if name.endswith("attn"))
    each = 8 if wide and recipe is INPUTS else 6  # qkv, as three or one; scores, context, proj, fc1, fc2
    products = each * blocks + 2 + hasattr(model, "layers")  # both ends; one merging
    graph = exported(model, recipe=recipe)[1]
    fixed = copy.deepcopy(graph)
    make_dim_param_fixed(fixed.graph, "batch", 2)
    for case in (graph, fixed):
        run(case, IMAGES[:2], tmp_path / "optimized.onnx")
        kinds = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
        assert sum(map(kinds.count, ("MatMulIntegerToFloat", "QLinearMatMul"))) == products
        assert not {"MatMul", "Gemm", "QGemm"} & set(kinds)


def test_heads_are_moved_in_integers_and_windows_in_float(model, wide):
    """What a runtime moves faster."""
    graph = onnx.shape_inference.infer_shapes(exported(model, recipe=INPUTS)[1]).graph
    types = {value.name: value.type.tensor_type.elem_type for value in graph.value_info}
    moved = Counter(types[node.output[0]] for node in graph.node if node.op_type == "Transpose")
    attentions = sum(name.endswith("attn") for name, _ in model.named_modules())
    assert moved[onnx.TensorProto.INT8] == 2 * attentions * wide  # keys and values
    assert moved[onnx.TensorProto.UINT8] == (attentions if hasattr(model, "blocks") else 0)  # contexts


@pytest.mark.parametrize("qkv_bias", [True, False])
def test_products_are_of_uint8_by_int8(model, qkv_bias, tmp_path, monkeypatch):
    """Keys and values, too, as weights are: ONNX Runtime does the same of uint8 by uint8 more slowly."""
    count_as_wide(monkeypatch, from_width=0)
    if qkv_bias:
        _, graph = exported(model, recipe=INPUTS)
    else:
        for attention in [module for name, module in model.named_modules() if name.endswith("attn")]:
            attention.qkv.bias = None
        simulated = quantized(model, recipe=INPUTS)
        graph = to_onnx(simulated)
        check(model, simulated, graph)
    run(graph, IMAGES[:1], tmp_path / "optimized.onnx")
    graph = onnx.load(tmp_path / "optimized.onnx").graph
    types = {tensor.name: tensor.data_type for tensor in graph.initializer}
    zero_points = {"MatMulIntegerToFloat": (4, 5), "QLinearMatMul": (2, 5)}  # of both factors, among the inputs
    pairs = [
        tuple(types[node.input[place]] for place in zero_points[node.op_type])
        for node in graph.node
        if node.op_type in zero_points
    ]
    assert len(pairs) > 16 and set(pairs) == {(onnx.TensorProto.UINT8, onnx.TensorProto.INT8)}
    assert not {"MatMul", "Gemm", "DequantizeLinear"} & {node.op_type for node in graph.node}


def test_no_bias_is_zero_which_simplifiers_take_out(model, monkeypatch):
    count_as_wide(monkeypatch, from_width=0)
    drop_key_biases(model)
    graph = to_onnx(quantized(model, recipe=INPUTS)).graph
    tensors = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    added = [tensors[name] for node in graph.node if node.op_type == "Add" for name in node.input if name in tensors]
    assert len(added) > 12 and all(bias.any() for bias in added)


@pytest.mark.parametrize("recipe", [PAPER, INPUTS], ids=lambda recipe: recipe.name)
def test_queries_keys_and_values_of_one_product_are_taken_apart_along_the_first_dimension(model, recipe):
    """Which OpenVINO does in place: it copies to split along another."""
    counts = Counter(node.op_type for node in exported(model, recipe=recipe)[1].graph.node)
    attentions = [name for name, _ in model.named_modules() if name.endswith("attn")]
    assert counts["Squeeze"] == 3 * len(attentions) and not counts["Split"]


def test_what_the_patch_embedding_gives_is_not_moved(model):
    kinds = [node.op_type for node in exported(model, recipe=INPUTS)[1].graph.node]
    assert kinds[: kinds.index("LayerNormalization")].count("Transpose") == 1  # that which cuts the patches


def test_int4_weights_take_half_the_space(vit):
    simulated = quantized(vit, 4, 8)
    wide, narrow = to_onnx(simulated), to_onnx(simulated, int4=True)
    check(vit, simulated, narrow)
    name = "blocks.0.mlp.fc1.weight"
    sizes = [
        next(len(tensor.raw_data) for tensor in graph.graph.initializer if tensor.name == name)
        for graph in (wide, narrow)
    ]
    assert sizes == [48 * 192, 48 * 192 // 2]


def test_int4_weights_are_those_of_split_layers_too(vit, monkeypatch):
    """Beside 8-bit ones of the same width, whose zero points they share."""
    count_as_wide(monkeypatch, from_width=0)
    graph = to_onnx(quantized(vit, 4, 8, recipe=INPUTS), int4=True)
    types = {tensor.name: tensor.data_type for tensor in graph.graph.initializer}
    parts = [types[f"blocks.{block}.attn.qkv.{part}.weight"] for block in range(2) for part in range(3)]
    assert set(parts) == {onnx.TensorProto.INT4}


def test_int4_weights_beside_activations_without_zero_points(model, wide):
    """ONNX Runtime has refused int8 activations in a file that has INT4."""
    simulated = quantized(model, 4, 8, recipe=INPUTS)
    check(model, simulated, to_onnx(simulated, int4=True))


def test_a_symmetric_graph_has_no_zero_point_with_int4_either(vit):
    graph = to_onnx(quantized(vit, 4, 8, recipe=INPUTS.without_zero_points()), int4=True).graph
    zero_points = {node.input[2] for node in graph.node if node.op_type == "QuantizeLinear"}
    tensors = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    assert zero_points and all(tensors[name] == 0 and tensors[name].dtype == "int8" for name in zero_points)


def test_windows_that_need_padding_still_compute_the_same():
    torch.manual_seed(0)
    options = {"embed_dim": 24, "depths": (2, 1), "num_heads": (2, 4), "num_classes": 10}
    model = SwinTransformer(img_size=32, patch_size=2, window_size=3, **options).eval()
    simulated = quantized(model)
    check(model, simulated, to_onnx(simulated))


@torch.no_grad()
def test_an_image_that_is_no_multiple_of_the_patch():
    torch.manual_seed(0)
    model = VisionTransformer(img_size=36, patch_size=8, embed_dim=48, depth=1, num_heads=3, num_classes=10).eval()
    images = torch.randn(4, 3, 36, 36)
    quantized = calibrate(quantize_model(model, 8, 8, recipe=INPUTS), images)
    assert error(run(to_onnx(quantized), images), quantized(images)) < 0.05


def test_an_uncalibrated_model_is_refused(vit):
    with pytest.raises(RuntimeError, match="not calibrated"):
        to_onnx(quantize_model(vit))
