"""Learning: weights, biases and the scales of activations follow the gradient of what quantization costs.

What it costs is seen on the calibration images, at the output of every block and of the model, against the same model
in float: distillation, without a label. Rounding passes its gradient through as if it were not there (Bengio et al.,
2013, arXiv:1308.3432); that of an activation's scale is then the one of learned step sizes (Esser et al., ICLR 2020,
section 2.1). Weights are learned in units of their scales, which stay, so that one rate serves all layers.
"""

import math
import re
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from quant.modules import named_activations, quantized_weights
from quant.parts import enlarge
from quant.quantizers import fake_quantize_, signed_grid

BATCH = 32  # images of a step
RATE = 0.01  # of Adam, in steps of a weight's grid; all rates fall to zero as a cosine
SCALE_RATE = 0.002  # as a part of an activation's scale
BIAS_RATE = 1e-4
BETAS = (0.9, 0.99)  # the squares are forgotten within a hundred steps, of which there are few
_TINY = torch.finfo(torch.float32).tiny  # of a variance that is divided by
REACH = 1 / 8  # of a side: the largest cyclic shift of the images


class Student:
    """A calibrated model that learns to be its teacher; `finish` leaves it as any calibrated model is.

    Attributes:
        tensors: by name, what is learned.
        optimizer: changes them.
        random: what is drawn from.
        total: steps that are to be done.
    """

    def __init__(
        self, model: nn.Module, teacher: nn.Module, images: Tensor, steps: int, parts: bool = False, seed: int = 0
    ) -> None:
        """Begin with what calibration left.

        Args:
            model: calibrated.
            teacher: the same model before it was: in float, with its channels in the same basis.
            images: (B, 3, H, W), normalised.
            steps: to be done in all.
            parts: of half of a step's images a part is seen, enlarged, and not the whole.
        """
        self.model, self.teacher, self.images = model, teacher.requires_grad_(False), images
        self.total, self.parts = steps, parts
        self.random = torch.Generator().manual_seed(seed)
        self.layers = dict(quantized_weights(model.requires_grad_(False)))
        self.acts = {name: act for name, act in named_activations(model) if act.scale is not None}
        # From the middle between two borders: all first steps of Adam are of one length, and from what weights were
        # rounded from, much of it next to a border, they would undo the compensation before any gradient is known well.
        self.codes = {name: (layer.weight / layer.weight_scale).round() for name, layer in self.layers.items()}
        self.biases = {name: layer.bias for name, layer in self.layers.items() if layer.bias is not None}
        self.scales = {name: act.scale.log().requires_grad_() for name, act in self.acts.items()}
        for name, act in self.acts.items():
            act.kernel = partial(round_learned, self.scales[name])
        for parameter in (*(layer.weight for layer in self.layers.values()), *self.biases.values()):
            parameter.requires_grad_()
        groups = (("weight", self.codes, RATE), ("bias", self.biases, BIAS_RATE), ("scale", self.scales, SCALE_RATE))
        self.tensors = {f"{name}.{kind}": value for kind, some, _ in groups for name, value in some.items()}
        self.optimizer = torch.optim.Adam(
            [{"params": list(some.values()), "rate": rate} for _, some, rate in groups if some], betas=BETAS
        )

    def learn(self) -> None:
        """Do all steps. Raises FloatingPointError where an error or its gradient is not finite."""
        seen = torch.stack([self.step(number) for number in range(self.total)])
        if not seen.isfinite().all():
            raise FloatingPointError("learning: the error, or its gradient, is not finite")

    @torch.enable_grad()
    def step(self, number: int) -> Tensor:
        """The step of a number, from 0; returns the error before it, and the length of its gradient: (2,)."""
        for group in self.optimizer.param_groups:
            group["lr"] = group["rate"] * (1 + math.cos(math.pi * number / self.total)) / 2
        self.round_weights()
        error = self.error(self.draw())
        weights = [layer.weight for layer in self.layers.values()]
        learned = [*weights, *self.biases.values(), *self.scales.values()]
        gradients = torch.autograd.grad(error, learned, allow_unused=True, materialize_grads=True)
        for tensor, gradient in zip(self.tensors.values(), gradients, strict=True):
            tensor.grad = gradient
        for name, layer in self.layers.items():
            self.codes[name].grad = self.codes[name].grad * layer.weight_scale  # of weights in steps of their grid
        self.optimizer.step()
        return torch.stack([error.detach(), torch.nn.utils.get_total_norm(gradients)])

    def finish(self) -> None:
        """Leave weights and ranges as they were learned."""
        self.round_weights()
        self.model.requires_grad_(False)
        for name, act in self.acts.items():
            del act.kernel
            act.scale = self.scales[name].detach().exp()
            act.low, act.high = ((end - act.zero_point) * act.scale for end in act.grid)

    @torch.no_grad()
    def round_weights(self) -> None:
        """Give every layer its weight on the grid."""
        for name, layer in self.layers.items():
            layer.weight.copy_(self.codes[name].clamp_(*signed_grid(layer.w_bit)).round() * layer.weight_scale)

    def draw(self) -> Tensor:
        """Some of the images, shifted cyclically, all by the same offsets, and flipped in half of all cases.

        Of half of them a part is seen, where parts are asked for.
        """
        images = self.images[torch.randperm(len(self.images), generator=self.random)[:BATCH]]
        reach = [round(side * REACH) for side in images.shape[2:]]
        offsets = [int(torch.randint(-most, most + 1, (), generator=self.random)) for most in reach]
        flipped = torch.rand(len(images), 1, 1, 1, generator=self.random) < 0.5
        shifted = images.roll(offsets, dims=(2, 3))
        images = torch.where(flipped.to(shifted.device), shifted.flip(3), shifted)
        if self.parts:
            half = len(images) // 2
            images = torch.cat([enlarge(images[:half], self.random), images[half:]])
        return images.to(next(self.model.parameters()).device)

    def error(self, images: Tensor) -> Tensor:
        """The squared error relative to the teacher's variance, mean over the blocks' outputs and the model's: 0-d."""
        with torch.no_grad():
            expected = block_outputs(self.teacher, images)
        outputs = block_outputs(self.model, images)
        pairs = zip(outputs, expected, strict=True)
        return torch.stack([(y - t).square().mean() / t.var().clamp(min=_TINY) for y, t in pairs]).mean()


def round_learned(log_scale: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor, grid: tuple[int, int]) -> Tensor:
    """`fake_quantize_` with a gradient for `x` and for the logarithm of the scale, which takes the place of `scale`."""
    return _RoundLearned.apply(log_scale, x, zero_point, grid)


class _RoundLearned(torch.autograd.Function):
    """y of x, of which nothing else is kept for the backward pass: half the memory of a step of PyTorch's own way."""

    @staticmethod
    def forward(ctx: FunctionCtx, log_scale: Tensor, x: Tensor, zero_point: Tensor, grid: tuple[int, int]) -> Tensor:
        scale = log_scale.exp()
        y = fake_quantize_(x.clone(), scale, zero_point, grid)
        ctx.save_for_backward(x, y, *((end - zero_point) * scale for end in grid))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, y, low, high = ctx.saved_tensors
        inside = (x >= low) & (x <= high)
        # Of log s: y - x where x is on the grid, y where it is clipped (Esser et al., equation 3, times s)
        return (gradient * (y - x * inside)).sum(), gradient * inside, None, None


def block_outputs(model: nn.Module, images: Tensor) -> list[Tensor]:
    """What every block gives, in order, and last what the model gives."""
    outputs: list[Tensor] = []
    with ExitStack() as hooks:
        for name, module in model.named_modules():
            if re.fullmatch(r"(layers\.\d+\.)?blocks\.\d+", name):
                hook = module.register_forward_hook(lambda block, inputs, output: outputs.append(output))
                hooks.enter_context(hook)
        logits = model(images)
    return [*outputs, logits]
