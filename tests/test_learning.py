"""Learning lowers what quantization costs on its images, and leaves a model like any calibrated one."""

import copy
from dataclasses import replace

import pytest
import torch

from quant import activation_ranges, calibrate, quantize_model
from quant.integers import integer_state, load_integer_state
from quant.learning import Student, block_outputs, round_learned, unrounded
from quant.modules import named_activations, quantized_weights
from quant.quantizers import fake_quantize_, signed_grid
from quant.recipes import INPUTS, LEARNED
from tests.families import IMAGES

FAST = replace(INPUTS, learn=True)
