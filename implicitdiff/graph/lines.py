"""Which line of the user's file an operation or an exception comes from.

Comes in: the running stack, or a traceback. Goes out: one line of text, ``file.py:12: source``. A line is the
user's if it is neither torch's, nor this library's (the problems it ships count as a user's), nor the
standard library's.
"""

import dataclasses
import linecache
import os
import sys
import sysconfig
from types import CodeType, FrameType, TracebackType

import torch

_TORCH = os.path.dirname(torch.__file__) + os.sep
_OWN = os.path.dirname(os.path.dirname(__file__)) + os.sep
_OWN_PROBLEMS = (_OWN + "problems" + os.sep, _OWN + "reproduce" + os.sep)
_STANDARD = sysconfig.get_path("stdlib") + os.sep
_INSTALLED = os.sep + "site-packages" + os.sep
_FUNCTION_FILE = os.path.join("torch", "autograd", "function.py")


def is_user_file(filename: str) -> bool:
    """Whether a code object of this file is the user's."""
    if filename.startswith(_TORCH) or filename.startswith("<frozen"):
        return False
    if filename.startswith(_OWN):
        return filename.startswith(_OWN_PROBLEMS)
    return not filename.startswith(_STANDARD) or _INSTALLED in filename


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where an operation was called.

    Attributes:
        line: The innermost line of the user, ``file.py:12: source``; empty if there is none.
        function: The innermost autograd.Function whose forward was running; None if there was none.
    """

    line: str
    function: type | None


def origin(entry: CodeType) -> Origin:
    """Look up the running stack, from here to the frame of ``entry``.

    Args:
        entry: The code of the library's function that called the user's; frames outside of it are not looked
            at.
    """
    line, function = "", None
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not entry:
        filename = frame.f_code.co_filename
        if not line and is_user_file(filename):
            line = _text(filename, frame.f_lineno)
        if function is None and frame.f_code.co_name == "apply" and filename.endswith(_FUNCTION_FILE):
            function = frame.f_locals.get("cls")
        frame = frame.f_back
    return Origin(line, function)


def raising_line(traceback: TracebackType | None) -> str:
    """The user's innermost line of a traceback; empty if there is none."""
    line = ""
    while traceback is not None:
        filename = traceback.tb_frame.f_code.co_filename
        if is_user_file(filename):
            line = _text(filename, traceback.tb_lineno)
        traceback = traceback.tb_next
    return line


def _text(filename: str, number: int) -> str:
    source = linecache.getline(filename, number).strip()
    place = f"{os.path.basename(filename)}:{number}"
    return f"{place}: {source}" if source else place
