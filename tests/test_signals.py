import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from utils.run.signals import Stopped, stop_requests

ROOT = Path(__file__).parent.parent
NUMBERS = [signal.SIGINT, signal.SIGTERM]


@pytest.mark.parametrize("number", NUMBERS, ids=lambda number: number.name)
def test_the_first_signal_asks_to_stop_and_interrupts_nothing(number):
    with pytest.raises(Stopped) as caught, stop_requests() as stop:
        assert stop() is None
        os.kill(os.getpid(), number)
        assert stop() == number
        raise Stopped(stop(), "saved")
    assert caught.value.number == number and str(caught.value) == "saved"


def test_a_signal_that_nobody_asked_for_any_more_is_not_lost():
    with pytest.raises(Stopped) as caught, stop_requests():
        os.kill(os.getpid(), signal.SIGTERM)
    assert caught.value.number == signal.SIGTERM


def test_handlers_are_put_back():
    before = [signal.getsignal(number) for number in NUMBERS]
    with pytest.raises(KeyError), stop_requests():
        assert [signal.getsignal(number) for number in NUMBERS] != before
        raise KeyError
    assert [signal.getsignal(number) for number in NUMBERS] == before


def test_in_another_thread_it_does_nothing():
    seen = []

    def work():
        with stop_requests() as stop:
            seen.append(stop())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [None]


@pytest.mark.parametrize("second", NUMBERS, ids=lambda number: number.name)
def test_the_second_signal_ends_the_process_at_once(second):
    lines = [
        "import os",
        "from utils.run.signals import stop_requests",
        "with stop_requests() as stop:",
        "    os.kill(os.getpid(), 2)",
        "    print(stop(), flush=True)",
        "    try:",
        f"        os.kill(os.getpid(), {int(second)})",
        "    finally:",
        "        print('goes on', flush=True)",
    ]
    process = subprocess.run([sys.executable, "-c", "\n".join(lines)], cwd=ROOT, capture_output=True, text=True)
    assert (process.returncode, process.stdout) == (128 + second, "2\n")
    assert process.stderr.strip() == "stopping after this step; once more stops at once"
