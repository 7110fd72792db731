"""What becomes of a map while the interpreter shuts down."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import atexit

late = []
atexit.register(lambda: late and late[0]())
import torch, torchbatch

double = torchbatch.vmap(lambda x: x * 2)

def run():
    try:
        double(torch.ones(2))
    except RuntimeError as error:
        print(error)

atexit.register(lambda: print(double(torch.ones(2))))
late.append(run)
"""


def test_a_map_at_the_exit_of_the_interpreter():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert done.stdout == "tensor([2., 2.])\nvmap cannot run any more: the interpreter is shutting down.\n"
    assert done.stderr == ""
