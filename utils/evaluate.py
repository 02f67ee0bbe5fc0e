"""Accuracy of a float and a quantized model on the same images, in one pass."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from utils.cache import validation_loader
from utils.data import UNREADABLE, Images
from utils.loader import image_loader
from utils.neighbours import compare_embeddings, neighbour_accuracy
from utils.outputs import CPU_BATCH, halved, in_parts, inference, outputs_of
from utils.run.distributed import gather
from utils.run.memory import is_out_of_memory
from utils.run.progress import note, progress_bar


def measure(
    models: dict[str, nn.Module],
    data: dict[str, Images],
    batch_size: int,
    workers: int,
    cache: Path | None = None,
    report_every: int = 100,
) -> dict[str, float | int | list]:
    """Accuracy of the models on the images of val, which the processes of a torchrun share.

    Without a classifier it is that of the nearest neighbours in train. For the arguments see `evaluate`, and
    utils.cache.validation_loader.
    """
    loader = partial(validation_loader, batch_size=batch_size, workers=workers)
    val = loader(data["val"], cache=cache)
    if next(iter(models.values())).num_classes:
        return evaluate(models, val, report_every)
    return neighbour_accuracy(models, loader(data["train"]), val)


def evaluate(
    models: dict[str, nn.Module], images: DataLoader, report_every: int = 100
) -> dict[str, float | int | list]:
    """Top-1 and top-5 of every model, each image decoded once and seen by all of them.

    Where the memory does not suffice for a batch it is halved, from there on, until it does. Of several processes each
    sees its own shard, and all return the sums.

    Args:
        models: by name, all on one device; a swapped model must be calibrated.
        images: batches of (images, labels, indices), as utils.loader.image_loader has them of utils.data.Images.
        report_every: batches between updates of the running accuracy.

    Returns:
        n: images counted; unreadable: files that were not; and for each model name_top1, name_top5 in percent.

    Raises:
        RuntimeError: a model is not calibrated.
        InputError: there is not the memory for one image.
    """
    device = next(next(iter(models.values())).parameters()).device
    correct = {name: torch.zeros(2, dtype=torch.int64, device=device) for name in models}
    count, unreadable, size = 0, [], images.batch_size if device.type != "cpu" else min(images.batch_size, CPU_BATCH)

    def count_hits(batch: Tensor, labels: Tensor) -> dict[str, Tensor]:
        batch, labels = batch.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        return {name: count_correct(model(batch), labels) for name, model in models.items()}

    with (
        inference(*models.values()),
        progress_bar(_batches(images), total=len(images), desc="evaluating", unit="batch") as bar,
    ):
        for step, (batch, labels, indices) in enumerate(bar, start=1):
            readable = labels != UNREADABLE
            if not readable.all():
                unreadable += [images.dataset.files[index] for index in indices[~readable].tolist()]
                batch, labels = batch[readable], labels[readable]
            parts, enough = in_parts(count_hits, size, batch, labels)
            if enough < size:
                note(f"out of memory with {size} images a batch; going on with {enough}")
            size = enough
            count += len(labels)
            for hits in parts:
                for name in models:
                    correct[name] += hits[name]
            if step % report_every == 0 and count:
                shares = {name: f"{100 * hits[0].item() / count:.2f} %" for name, hits in correct.items()}
                bar.set_postfix(shares, refresh=False)
    shards = gather((count, unreadable, {name: hits.cpu() for name, hits in correct.items()}))
    n = sum(count for count, _, _ in shards)
    results: dict[str, float | int | list] = {
        "n": n,
        "unreadable": sorted(file for _, files, _ in shards for file in files),
    }
    for name in models:
        top1, top5 = (100 * hit / max(n, 1) for hit in sum(hits[name] for _, _, hits in shards).tolist())
        results |= {f"{name}_top1": top1, f"{name}_top5": top5}
    return results


def count_correct(logits: Tensor, labels: Tensor) -> Tensor:
    """How many labels are the first, and how many among the first five, predictions: (2,) integers.

    Of equal logits, which few bits often give, the lower class comes first, as in argmax and on every device; topk
    leaves it open. A NaN comes before everything, and a label whose logit it is, is no prediction.
    """
    own, classes = logits.gather(1, labels[:, None]), torch.arange(logits.shape[1], device=logits.device)
    behind = (logits < own) | ((logits == own) & (classes >= labels[:, None]))  # the label itself, too
    before = (~behind).sum(dim=1)
    return torch.stack([(before < 1).sum(), (before < min(5, len(classes))).sum()])


@torch.inference_mode()
def compare(float_model: nn.Module, quantized: nn.Module, images: Tensor) -> dict[str, float]:
    """Without labels: how far the quantized model's logits are from the float model's on `images` (B, 3, H, W).

    Returns:
        Of models without a classifier what `compare_embeddings` does; else
        agreement: percent of images with the same first prediction, ties as in `count_correct`; logit_error: RMS of
        the difference over the RMS of the float logits' deviation from their mean, over images where there is one only.

    Raises:
        RuntimeError: `quantized` is not calibrated.
        InputError: there is not the memory for one image.
    """
    if not float_model.num_classes:
        return compare_embeddings(float_model, quantized, images)
    reference, logits = outputs_of(float_model, quantized, images)
    agreement = (reference.argmax(1) == logits.argmax(1)).float().mean() * 100
    across = 1 if reference.shape[1] > 1 else 0
    spread = (reference - reference.mean(dim=across, keepdim=True)).square().mean().sqrt()
    error = (logits - reference).square().mean().sqrt() / spread
    return {"agreement": agreement.item(), "logit_error": error.item()}


def _batches(images: DataLoader) -> Iterator[list[Tensor]]:
    """The loader's batches as tensors; from where the memory does not suffice to load them, half as large."""
    dataset, size, seen = images.dataset, images.batch_size, 0
    while seen < len(dataset):
        try:
            for items in images:
                seen += len(items[1])
                yield [torch.as_tensor(item) for item in items]  # arrays where the shared memory is small
            return
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        note(f"out of memory loading {size} images a batch; going on with {halved(size)}")
        size = halved(size)
        rest = Subset(dataset, range(seen, len(dataset)))
        images = image_loader(rest, size, images.num_workers, images.pin_memory)
