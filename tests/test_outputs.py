import pytest
import torch

from quant import quantize_model
from utils.outputs import inference
from utils.products import onednn_is_fast


def test_inference_keeps_no_graph_and_is_undone(vit):
    vit.train()
    with pytest.raises(KeyError), inference(vit, vit):  # one may be compared with itself
        assert torch.is_inference_mode_enabled() and not vit.training
        assert ("forward" in vars(vit.head)) == onednn_is_fast()
        raise KeyError
    assert not torch.is_inference_mode_enabled() and "forward" not in vars(vit.head)


def test_inference_refuses_what_is_half_calibrated(vit):
    quantized = quantize_model(vit, w_bit=8, a_bit=8)
    with pytest.raises(RuntimeError, match="not calibrated"), inference(vit, quantized):
        pass
    assert "forward" not in vars(vit.head)
