"""Models without a classifier: how near embeddings are, and which images they hold for alike."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from utils.data import UNREADABLE
from utils.outputs import CPU_BATCH, in_parts, inference, outputs_of
from utils.run.distributed import gather
from utils.run.errors import InputError
from utils.run.progress import progress_bar

NEIGHBOURS = 20  # DINO (Caron et al., ICCV 2021), section 3.2
TEMPERATURE = 0.07  # of a neighbour's vote, exp(cosine / T): DINO's code, not in the paper
QUERIES = 1024  # whose cosines with all images of the bank are in memory at once


@torch.inference_mode()
def compare_embeddings(float_model: nn.Module, quantized: nn.Module, images: Tensor) -> dict[str, float]:
    """Cosine of the two models' embeddings of each of `images` (B, 3, H, W): its mean, and the worst.

    Raises:
        RuntimeError: `quantized` is not calibrated.
        InputError: there is not the memory for one image.
    """
    cosines = F.cosine_similarity(*outputs_of(float_model, quantized, images))
    return {"cosine": cosines.mean().item(), "worst_cosine": cosines.min().item()}


def neighbour_accuracy(models: dict[str, nn.Module], train: DataLoader, val: DataLoader) -> dict:
    """Accuracy of a nearest-neighbour classifier on the embeddings of each model: the bank is `train`.

    Args:
        models: by name, all on one device; a swapped model must be calibrated.
        train, val: batches as utils.loader.image_loader has them, of labels that mean the same in both.

    Returns:
        n: images of `val` that counted; unreadable: files of both that were not; for each model name_knn in percent;
        and of two models the cosine of their embeddings of each image, its mean and the worst: cosine, worst_cosine.
    """
    bank, bank_labels, bad = embeddings(models, train)
    queries, labels, worse = embeddings(models, val)
    results: dict[str, float | int | list] = {"n": len(labels), "unreadable": sorted(bad + worse)}
    for name in models:
        hits = vote(bank[name], bank_labels, queries[name]) == labels
        results[f"{name}_knn"] = 100 * hits.float().mean().item() if len(labels) else 0.0
    if len(models) > 1 and len(labels):
        cosines = F.cosine_similarity(*queries.values())
        results |= {"cosine": cosines.mean().item(), "worst_cosine": cosines.min().item()}
    return results


def embeddings(models: dict[str, nn.Module], images: DataLoader) -> tuple[dict[str, Tensor], Tensor, list[str]]:
    """What every model gives for each image, (n, D) by name, the labels (n,), and the files that are not readable.

    The processes of a torchrun share the images, and all return all, in the same order.
    """
    device = next(next(iter(models.values())).parameters()).device
    found: dict[str, list[Tensor]] = {name: [] for name in models}
    labels, unreadable, size = [], [], images.batch_size if device.type != "cpu" else CPU_BATCH
    with inference(*models.values()):
        for batch, batch_labels, indices in progress_bar(images, desc="embedding", unit="batch"):
            batch, batch_labels, indices = map(torch.as_tensor, (batch, batch_labels, indices))
            readable = batch_labels != UNREADABLE
            unreadable += [images.dataset.files[index] for index in indices[~readable].tolist()]
            if not readable.any():
                continue
            labels.append(batch_labels[readable])
            parts, size = in_parts(
                lambda part: [model(part.to(device)).float().cpu() for model in models.values()], size, batch[readable]
            )
            for name, values in zip(models, zip(*parts, strict=True), strict=True):
                found[name] += values
    shards = gather((found, labels, unreadable))
    if not any(some for _, some, _ in shards):
        raise InputError(f"expected images to embed; got none that can be read of {len(images.dataset)}")
    joined = {name: torch.cat([value for shard, _, _ in shards for value in shard[name]]) for name in models}
    all_labels = torch.cat([value for _, some, _ in shards for value in some])
    return joined, all_labels, [file for *_, files in shards for file in files]


def vote(bank: Tensor, labels: Tensor, queries: Tensor, neighbours: int = NEIGHBOURS) -> Tensor:
    """The class of each query by its nearest neighbours in the bank, by cosine; each has a vote of exp(cosine / T).

    Args:
        bank: (n, D).
        labels: of the bank, (n,).
        queries: (m, D).

    Returns:
        (m,).
    """
    bank, classes, result = F.normalize(bank, dim=1), int(labels.max()) + 1, []
    for part in F.normalize(queries, dim=1).split(QUERIES):
        cosines, nearest = (part @ bank.T).topk(min(neighbours, len(bank)), dim=1)  # (m, k)
        votes = torch.zeros(len(part), classes).scatter_add_(1, labels[nearest], (cosines / TEMPERATURE).exp())
        result.append(votes.argmax(dim=1))
    return torch.cat(result)
