"""Every example in the README runs and prints what the README says."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import pytest

README = Path(__file__).resolve().parents[1] / "README.md"
EXAMPLES = re.findall(
    r"^```python\n(.*?)^```\n\n```text\n(.*?)^```$", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
)


def test_every_python_block_has_its_output():
    assert len(EXAMPLES) == README.read_text(encoding="utf-8").count("```python") == 5


@pytest.mark.parametrize(("code", "output"), EXAMPLES, ids=["first", "errors", "gradients", "trees", "oracle"])
def test_example(code, output):
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, str(README), "exec"), {"__name__": "readme"})
    assert printed.getvalue() == output
