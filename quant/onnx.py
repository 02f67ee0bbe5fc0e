"""A calibrated model as an ONNX graph: QuantizeLinear and DequantizeLinear where the simulation rounds.

Operators are ONNX's own; what they compute, module by module, is in quant/operators.py.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from quant.convert import check_calibrated
from quant.modules import quantized_weights
from quant.operators import prepare

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto

# 21 is the first with 4-bit integers. In a graph of 21, ONNX Runtime 1.32 moves int8 activations to uint8 but not the
# types that it has given to nodes of its own, and refuses what it made.
OPSET, OPSET_INT4 = 20, 21
INPUT, OUTPUT = "images", "logits"


def to_onnx(model: nn.Module, int4: bool = False) -> "ModelProto":
    """The graph of a model, from `images` (batch, 3, H, W) to `logits` (batch, classes), with any batch size.

    Args:
        model: calibrated, or a float timm model; left as it is.
        int4: store weights of 4 bits or less as INT4, not as INT8: half the size, but most runtimes then multiply in
            float.

    Raises:
        RuntimeError: the model is swapped but not calibrated.
    """
    import onnxscript

    check_calibrated(model)
    opset = OPSET_INT4 if int4 else OPSET
    op = getattr(onnxscript, f"opset{opset}")
    translations = {
        torch.ops.psaq.quantize.default: lambda x, scale, zero: op.QuantizeLinear(x, scale, zero),
        torch.ops.psaq.dequantize.default: lambda codes, scale, zero, axis: op.DequantizeLinear(
            codes, scale, zero, axis=axis
        ),
        torch.ops.aten.mean.dim: lambda x, dim, keepdim=False: mean(op, x, dim, keepdim),
    }
    prepared = prepare(model)
    with torch.no_grad():
        graph = torch.onnx.export(
            prepared,
            (torch.zeros(2, 3, *model.patch_embed.img_size),),
            dynamo=True,
            verbose=False,
            opset_version=opset,
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            custom_translation_table=translations,
        ).model_proto
    for node in graph.graph.node:  # where it came from in Python: a sixth of the file
        node.ClearField("metadata_props")
    del graph.graph.value_info[:]
    skip_empty_pads(graph.graph)
    if int4:
        layers = [name for name, layer in quantized_weights(prepared) if layer.w_bit <= 4]
        narrow_to_int4(graph.graph, {f"{name}.weight" for name in layers})
        make_activations_unsigned(graph.graph)
    return graph


def mean(op: Any, x: Any, dim: Sequence[int], keepdim: bool) -> Any:
    """ONNX's ReduceMean; that of tokens (B, N, D) over two dimensions, (B, N, 1, D).

    Of integers OpenVINO 2026.4 gives a wrong mean over N, unless there is one image only; over two dimensions a right
    one.
    """
    if list(dim) == [1] and not keepdim:
        return op.ReduceMean(op.Unsqueeze(x, [2]), [1, 2], keepdims=0)
    return op.ReduceMean(x, list(dim), keepdims=int(keepdim))


def narrow_to_int4(graph: "GraphProto", names: set[str]) -> None:
    """Store the weights of these names, and their zero points, as INT4, two values to a byte.

    Layers of one width share a zero point, also where one has 8 bits.
    """
    from onnx import TensorProto, helper, numpy_helper

    int4 = helper.tensor_dtype_to_np_dtype(TensorProto.INT4)
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    for node in [node for node in graph.node if node.op_type == "DequantizeLinear" and node.input[0] in names]:
        for place in (0, 2):
            name = f"{node.input[place]}.int4" if place else node.input[place]
            narrow = numpy_helper.from_array(numpy_helper.to_array(tensors[node.input[place]]).astype(int4), name)
            if name not in tensors:
                tensors[name] = graph.initializer.add()
            tensors[name].CopyFrom(narrow)
            node.input[place] = name
    used = {name for node in graph.node for name in node.input}
    for tensor in [tensor for tensor in graph.initializer if tensor.name not in used]:
        graph.initializer.remove(tensor)


def make_activations_unsigned(graph: "GraphProto") -> None:
    """Turn int8 activations into uint8 ones of a zero point 128 larger, the same numbers, unless all of them are int8.

    ONNX Runtime does so itself, but gives what it moves an explicit type, from opset 21 on, that it forgets to change:
    1.32 refuses the file. Where no activation has a zero point, for TensorRT, which takes none, it stays so.
    """
    from onnx import numpy_helper

    tensors = {tensor.name: tensor for tensor in graph.initializer}
    nodes = [node for node in graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    names = {node.input[2] for node in nodes if node.input[0] not in tensors}
    zero_points = {name: numpy_helper.to_array(tensors[name]) for name in names}
    signed = {name: value for name, value in zero_points.items() if value.dtype == "int8"}
    if signed.keys() == names:
        return
    for name, value in signed.items():
        unsigned = (value.astype("int16") + 128).astype("uint8")
        graph.initializer.append(numpy_helper.from_array(unsigned, f"{name}.unsigned"))
    for node in nodes:
        if node.input[0] not in tensors and node.input[2] in signed:
            node.input[2] += ".unsigned"


def skip_empty_pads(graph: "GraphProto") -> None:
    """Turn paddings by nothing, which timm's Swin has in every block, into Identity: they would end a run of moves."""
    empty = {tensor.name for tensor in graph.initializer if not any(tensor.raw_data)}
    for node in graph.node:
        if node.op_type == "Pad" and node.input[1] in empty:
            node.op_type = "Identity"
            del node.input[1:], node.attribute[:]
