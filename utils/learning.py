"""Learning as a long computation: it shows how far it is, can be stopped, and goes on from there."""

from pathlib import Path

from torch import Tensor

from quant.learning import BATCH, Student
from utils.run.distributed import rank
from utils.run.optimisation import Optimisation
from utils.run.precision import float32_products, model_products
from utils.run.progress import progress_bar
from utils.run.signals import stop_requests
from utils.run.state import digest


def learn(student: Student, precision: str, state: Path | None = None) -> None:
    """Do all steps of a student.

    Args:
        precision: of products, teacher's and student's, as in `utils.run.precision`: what bf16 rounds is a small part
            of what 8 bits round. Weights, their gradients and what is learned are kept in float32.
        state: a folder for what is unfinished; what is there of this very computation is gone on from. Each process of
            a torchrun learns the same, and has a file of its own. None for nowhere.

    Raises:
        FloatingPointError: the error is not finite.
        InputError: there is not the memory for a step, or `state` holds another computation's.
        Stopped: SIGINT or SIGTERM came, and the state is saved.
    """
    images, device = min(BATCH, len(student.images)), next(student.model.parameters()).device

    def step(number: int) -> Tensor:
        # Anew in each: autocast keeps what it has rounded, and weights change
        with float32_products(tf32=precision == "tf32"), model_products(precision, device):
            return student.step(number)

    begun_with = [*student.model.parameters(), *student.tensors.values(), student.images]
    with stop_requests() as stop, progress_bar(total=student.total, desc="learning", unit="step") as bar:
        optimisation = Optimisation(
            step,
            ("error",),
            student.total,
            tensors=student.tensors,
            optimizers=[student.optimizer],
            random=student.random,
            file=state and state / f"learning-{rank()}.safetensors",
            identity={"model and images": state and digest(begun_with), "steps": student.total, "precision": precision},
            out_of_memory=lambda: f"for a step of learning, of {images} images; a smaller --calib-batchsize takes less",
        )
        bar.update(optimisation.done)
        optimisation.run(bar, stop)
