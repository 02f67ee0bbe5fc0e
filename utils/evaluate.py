"""Accuracy of a float and a quantized model on the same images, in one pass."""

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from quant import check_calibrated
from utils.data import UNREADABLE
from utils.progress import progress_bar


@torch.inference_mode()
def evaluate(
    models: dict[str, nn.Module], images: DataLoader, report_every: int = 100
) -> dict[str, float | int | list]:
    """Top-1 and top-5 of every model, each image decoded once and seen by all of them.

    Args:
        models: by name, all on one device; a swapped model must be calibrated.
        images: batches of (images, labels, indices) from utils.data.Images.
        report_every: batches between updates of the running accuracy.

    Returns:
        n: images counted; unreadable: files that were not; and for each model name_top1, name_top5 in percent.

    Raises:
        RuntimeError: a model is not calibrated.
    """
    for model in models.values():
        check_calibrated(model)
        model.eval()
    device = next(next(iter(models.values())).parameters()).device
    correct = {name: torch.zeros(2, dtype=torch.int64, device=device) for name in models}
    count, unreadable = 0, []
    with progress_bar(images, desc="evaluating", unit="batch") as bar:
        for step, (batch, labels, indices) in enumerate(bar, start=1):
            readable = labels != UNREADABLE
            if not readable.all():
                unreadable += [images.dataset.files[index] for index in indices[~readable].tolist()]
                batch, labels = batch[readable], labels[readable]
            batch, labels = batch.to(device, non_blocking=True), labels.to(device, non_blocking=True)
            count += len(labels)
            for name, model in models.items() if len(labels) else ():
                correct[name] += count_correct(model(batch), labels)
            if step % report_every == 0 and count:
                bar.set_postfix({name: f"{100 * hits[0].item() / count:.2f} %" for name, hits in correct.items()})
    results: dict[str, float | int | list] = {"n": count, "unreadable": unreadable}
    for name, hits in correct.items():
        top1, top5 = (100 * hit / max(count, 1) for hit in hits.tolist())
        results |= {f"{name}_top1": top1, f"{name}_top5": top5}
    return results


def count_correct(logits: Tensor, labels: Tensor) -> Tensor:
    """How many labels are the first, and how many among the first five, predictions: (2,) integers."""
    best = logits.topk(min(5, logits.shape[1]), dim=1).indices  # (B, 5)
    hits = best == labels[:, None]
    return torch.stack([hits[:, 0].sum(), hits.any(dim=1).sum()])


@torch.inference_mode()
def compare(float_model: nn.Module, quantized: nn.Module, images: Tensor) -> dict[str, float]:
    """Without labels: how far the quantized model's logits are from the float model's on `images` (B, 3, H, W).

    Returns:
        agreement: percent of images with the same first prediction; logit_error: RMS of the difference over the RMS
        of the float logits' deviation from their mean.
    """
    check_calibrated(quantized)
    device = next(float_model.parameters()).device
    reference, logits = (
        torch.cat([model.eval()(batch.to(device)) for batch in images.split(32)]) for model in (float_model, quantized)
    )
    agreement = (reference.argmax(1) == logits.argmax(1)).float().mean() * 100
    spread = (reference - reference.mean(dim=1, keepdim=True)).square().mean().sqrt()
    error = (logits - reference).square().mean().sqrt() / spread
    return {"agreement": agreement.item(), "logit_error": error.item()}
