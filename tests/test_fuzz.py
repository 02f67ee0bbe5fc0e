"""Whatever bytes or text come from outside: they are read, or refused with one line, and nothing else happens.

A reader is one more line of `readers`: what it is given, and the call.
"""

import functools
import io
import json
import sys
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save

import generate_data
from models.checkpoints import read_checkpoint
from scripts.rows import COLUMNS, read_rows
from utils.data import UNREADABLE, Images, read_class_map
from utils.images import load_images
from utils.options import parse_run
from utils.run.errors import InputError

EXAMPLES = 1000  # a reader


def damaged(*samples):
    """Valid files with a piece replaced, cut out or put in; and any bytes."""

    def damage(sample, start, length, piece):
        start = start % (len(sample) + 1)
        return sample[:start] + piece + sample[start + length :]

    numbers = st.integers(0, 2**16)
    pieces = st.binary(max_size=16)
    edited = st.builds(damage, st.sampled_from(samples), numbers, st.integers(0, 32), pieces)
    cut = st.builds(lambda sample, end: sample[: end % len(sample)], st.sampled_from(samples), numbers)
    return edited | cut | st.binary(max_size=200)


def safetensors_headers():
    """Files whose header says anything about their tensors."""
    dtypes = st.sampled_from(["F32", "F16", "BF16", "F64", "I64", "U8", "BOOL", "F8_E4M3", "F8_E8M0", "C64", "F4", "X"])
    shapes = st.lists(st.integers(-1, 4) | st.just(2**62), max_size=5) | st.sampled_from(
        [[1, 3, 2, 2], [2, 3, 2, 2], [1]]
    )
    tensor = st.fixed_dictionaries(
        {"dtype": dtypes, "shape": shapes, "data_offsets": st.sampled_from([[0, 48], [0, 96], [0, 8], [0, 0], [8, 0]])}
    )
    names = st.sampled_from(["images", "held_out", "labels", "__metadata__", "mean", "head.weight"])
    headers = st.dictionaries(names, tensor | st.none(), max_size=2)

    def file(header, data):
        text = json.dumps(header).encode()
        return len(text).to_bytes(8, "little") + text + data

    return st.builds(file, headers, st.sampled_from([bytes(48), bytes(96), bytes(8), b"", b"\xff" * 48]))


def pickled(value):
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def picture(kind):
    file = io.BytesIO()
    Image.radial_gradient("L").resize((9, 7)).save(file, kind)
    return file.getvalue()


def decode(path):
    image, label = Images.decode(SimpleNamespace(files=[path], labels=[0]), 0)
    assert image.mode == "RGB" and label in (0, UNREADABLE)


def command_lines():
    """Options of both commands, right and wrong, with values that are right and wrong."""
    options = ["--model", "--dataset", "--w_bit", "--w-bit", "--a_bit", "--mode", "--checkpoint", "--images", "--help"]
    options += ["--calib-batchsize", "--steps", "--skip-layers", "--limit", "--num-workers", "--seed", "--plots", "--"]
    options += ["--num-images", "--output", "--class-map", "--val-batchsize", "--device", "--s", "-h", "--w_bit=4"]
    values = ["8", "-1", "0", "1e9", "²", "9" * 5000, "", " ", "%s", "{}", "demo_vit", "absent", "/", "nan", "@file"]
    return st.lists(st.sampled_from(options) | st.sampled_from(values) | st.text(max_size=5), max_size=6)


def file_reader(suffix, read):
    """`read(path)` on bytes that are written to a file."""

    def check(content, folder):
        path = folder / f"input{suffix}"
        path.write_bytes(content)
        read(path)

    return check


def parse_test_quant(arguments, folder):
    parse_run(arguments)


def parse_generate_data(arguments, folder):
    """Up to where the model would be built, which another test does with every name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["generate_data.py", *arguments])
        patch.setattr(generate_data, "check_generation", refuse)
        patch.setattr(generate_data, "model_tag", lambda name: name)
        generate_data.main()


def refuse(*arguments):
    raise InputError


@functools.cache
def readers():
    tensors = {"images": torch.zeros(1, 3, 2, 2), "labels": torch.zeros(1, dtype=torch.int64)}
    rows = ",".join(COLUMNS).encode() + b'\ndemo_vit,8,8,0,0,"a\n,""b"' + b"," * (len(COLUMNS) - 6) + b"\n"
    weights = {"head.weight": torch.zeros(3, 2), "norm.bias": torch.zeros(3)}
    checkpoints = damaged(pickled(weights), pickled({"model": weights}), pickled([1, "x", {2: torch.zeros(1)}]))
    return {
        "command line of test_quant.py": (command_lines(), parse_test_quant),
        "command line of generate_data.py": (command_lines(), parse_generate_data),
        "checkpoint .pth": (checkpoints, file_reader(".pth", read_checkpoint)),
        "checkpoint .safetensors": (
            damaged(save(weights)) | safetensors_headers(),
            file_reader(".safetensors", read_checkpoint),
        ),
        "images": (
            damaged(save(tensors)) | safetensors_headers(),
            file_reader(
                ".safetensors", lambda path: load_images(path, (2, 2), torch.zeros(3, 1, 1), torch.ones(3, 1, 1))
            ),
        ),
        "picture": (damaged(*map(picture, ("PNG", "JPEG", "TIFF", "GIF", "WEBP"))), file_reader(".png", decode)),
        "result rows": (damaged(rows, rows * 2), file_reader(".csv", read_rows)),
        "class map": (
            damaged(b"n01440764 0\nn01443537 1\n", "é 3\r\nb c 12\n\n".encode()),
            file_reader(".txt", lambda path: read_class_map(path, 10)),
        ),
    }


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", readers())
def test_nothing_but_input_errors_comes_out(name, tmp_path, capsys):
    strategy, read = readers()[name]
    tried = 0

    @settings(
        max_examples=EXAMPLES,
        deadline=timedelta(seconds=20),  # what hangs
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    @given(strategy)
    def check(given_input):
        nonlocal tried
        tried += 1
        try:
            read(given_input, tmp_path)
        except InputError as error:
            assert "\n" not in str(error)
        except SystemExit as end:
            assert end.code == 0  # --help

    check()
    assert tried >= EXAMPLES
