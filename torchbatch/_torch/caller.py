"""The user's own line, for warnings and errors that are raised while it runs."""

from __future__ import annotations

import linecache
import os
import sys
from types import FrameType

import torch

LIBRARIES = (
    os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep,
    os.path.dirname(os.path.abspath(torch.__file__)) + os.sep,
)


def user_frame() -> FrameType | None:
    """The innermost running frame that belongs neither to torchbatch nor to PyTorch."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith(LIBRARIES):
        frame = frame.f_back
    return frame


def line() -> str:
    """Where the user's code is, and what it says there, to be put at the end of a message."""
    frame = user_frame()
    if frame is None:
        return ""
    file, number = frame.f_code.co_filename, frame.f_lineno
    return f"\n  in {frame.f_code.co_name}, {file}:{number}\n    {linecache.getline(file, number).strip()}".rstrip()
