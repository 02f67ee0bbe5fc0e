"""Learning as a long computation: it shows how far it is, can be stopped, and goes on from there."""

from pathlib import Path

from quant.learning import BATCH, Student
from utils.run.distributed import rank
from utils.run.optimisation import Optimisation
from utils.run.progress import progress_bar
from utils.run.signals import stop_requests
from utils.run.state import digest


def learn(student: Student, state: Path) -> None:
    """Do all steps of a student.

    Args:
        state: a folder for what is unfinished; what is there of this very computation is gone on from. Each process of
            a torchrun learns the same, and has a file of its own.

    Raises:
        FloatingPointError: the error is not finite.
        InputError: there is not the memory for a step, or `state` holds another computation's.
        Stopped: SIGINT or SIGTERM came, and the state is saved.
    """
    images = min(BATCH, len(student.images))
    begun_with = [*student.model.parameters(), *student.tensors.values(), student.images]
    with stop_requests() as stop, progress_bar(total=student.total, desc="learning", unit="step") as bar:
        optimisation = Optimisation(
            student.step,
            ("error",),
            student.total,
            tensors=student.tensors,
            optimizers=[student.optimizer],
            random=student.random,
            file=state / f"learning-{rank()}.safetensors",
            identity={"model and images": digest(begun_with), "steps": student.total},
            out_of_memory=lambda: f"for a step of learning, of {images} images; a smaller --calib-batchsize takes less",
        )
        bar.update(optimisation.done)
        optimisation.run(bar, stop)
