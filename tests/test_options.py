import pytest
import torch

from utils.options import parse_run
from utils.run.errors import InputError
from utils.run.options import pick_device


def test_defaults():
    options = parse_run([])
    assert (options.model, options.w_bit, options.a_bit, options.mode, options.seed) == ("deit_tiny", 8, 8, 0, 0)
    assert (options.calib_batchsize, options.val_batchsize, options.print_freq) == (32, 200, 100)


@pytest.mark.parametrize("spelling", ["--w_bit 4 --a_bit 6", "--w-bit 4 --a-bit 6", "--w_bit=4 --a-bit=6"])
def test_both_spellings_of_bit_widths(spelling):
    options = parse_run(spelling.split())
    assert (options.w_bit, options.a_bit) == (4, 6)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--w_bit 1", r"--w_bit.*expected 2 to 8, or 16 for float; got '1'"),
        ("--a_bit 9", r"--a_bit.*expected 2 to 8.*got '9'"),
        ("--a_bit four", "got 'four'"),
        ("--mode 3", "--mode.*invalid choice: 3"),
        ("--calib-batchsize 0", "expected a whole number from 1; got '0'"),
        ("--seed -1", "expected a whole number from 0"),
        ("--seed 4294967296", "expected a whole number from 0"),
        ("--limit many", "got 'many'"),
        ("--nonsense", "unrecognized arguments: --nonsense"),
        ("--model", "expected one argument"),
    ],
)
def test_bad_options_are_told_in_one_line(line, message):
    with pytest.raises(InputError, match=message) as raised:
        parse_run(line.split())
    assert "\n" not in str(raised.value)


def test_devices():
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device(None).type in ("cpu", "cuda")
    for name in ("gpu", "cuda:99", ""):
        with pytest.raises(InputError, match="--device"):
            pick_device(name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_one_is_refused():
    with pytest.raises(InputError, match="--device cuda: expected a device of this machine"):
        pick_device("cuda")
