"""Reports: what they say, and what can be read off them."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from torchbatch.errors import EquivalenceError, TorchbatchError
from torchbatch.testing.compare import compare
from torchbatch.testing.report import Check, Report, extent, summary, table


def check(got, expected, reference=None, run="jit"):
    return Check.of_leaves(run, "loop", "values", "as given", compare(got, expected, reference), 0.5)


RIGHT = check(torch.ones(2), torch.ones(2), run="eager")
WRONG = check({"a": torch.ones(2), "b": torch.tensor([1.0, 3.0])}, {"a": torch.zeros(2), "b": torch.ones(2)})
SKIPPED = Check("compile", "loop", "values", "as given", "skipped", message="this machine has no C++ compiler")


@dataclasses.dataclass(frozen=True)
class Policy:
    """Something in the place of the settings."""

    def warnings(self):
        return ["float32 products run in TF32"]

    def to_dict(self):
        return {"tf32": True}


def test_a_check_is_named_after_its_first_leaf_that_differs():
    assert (RIGHT.status, RIGHT.problem, RIGHT.name) == ("passed", None, "eager, values, as given")
    assert (WRONG.status, WRONG.problem) == ("failed", "values")
    assert WRONG.message.startswith("output['a']: 2 of 2 differ, most at [0]: 1.0 instead of 0.0")


def test_a_check_says_who_is_off():
    reference = torch.ones(1, dtype=torch.float64)
    assert check(torch.tensor([2.0]), torch.ones(1), reference).message.endswith("; the float64 reference says that jit is off")


def test_a_report_in_words():
    inputs = ("x: float32[2], mapped over axis 0",)
    report = Report("check_vmap(f)", (RIGHT, WRONG, SKIPPED), inputs, ("a note",), Policy(), "import torch")
    lines = str(report).splitlines()
    assert lines[:8] == [
        "check_vmap(f): 1 of 2 checks failed, 1 skipped",
        "  x: float32[2], mapped over axis 0",
        "",
        "run      what    on                 largest difference",
        "eager    values  as given  passed   equal",
        f"jit      values  as given  failed   {extent(WRONG)}",
        "compile  values  as given  skipped  this machine has no C++ compiler",
        "",
    ]
    assert lines[8] == "FAILED jit, values, as given (values), against loop:"
    assert lines[10].startswith("  also output['b']: 1 of 2 differ")
    assert lines[-6:-3] == ["a note", "note: float32 products run in TF32", ""]
    assert lines[-3:] == ["To reproduce it in plain PyTorch:", "", "import torch"]


def test_of_many_leaves_only_some_are_described():
    lines = str(Report("f", (check(list(range(20)), list(range(1, 21))),))).splitlines()
    assert sum(line.startswith("  also ") for line in lines) == 5
    assert lines[-1] == "  and 14 more leaves"


def test_what_passed_is_short():
    report = Report("check_vmap(f)", (RIGHT,), precision=Policy())
    assert summary(report) == "1 check passed" and "TF32" not in str(report)
    assert report.raise_if_failed() is report


@pytest.mark.parametrize("checks", [(WRONG,), (SKIPPED,), ()])
def test_what_failed_or_was_not_made_is_an_error(checks):
    report = Report("check_vmap(f)", checks)
    assert not report.passed
    with pytest.raises(EquivalenceError) as caught:
        report.raise_if_failed()
    assert caught.value.report is report and str(caught.value) == str(report)
    assert isinstance(caught.value, AssertionError) and isinstance(caught.value, TorchbatchError)


def test_a_report_as_json(tmp_path):
    report = Report("check_vmap(f)", (RIGHT, WRONG, SKIPPED), precision=Policy())
    report.save_json(tmp_path / "report.json")
    found = json.loads((tmp_path / "report.json").read_text())
    assert (found["passed"], found["title"], found["precision"]) == (False, "check_vmap(f)", {"tf32": True})
    assert [one["status"] for one in found["checks"]] == ["passed", "failed", "skipped"]
    leaf = found["checks"][1]["leaves"][1]
    assert (leaf["where"], leaf["worst"]["index"], leaf["max_abs"], leaf["size"]) == ("output['b']", [1], 2.0, 2)


def test_numbers_that_json_has_not_are_text():
    report = Report("f", (check(torch.tensor([float("nan")]), torch.ones(1)),))
    leaf = report.to_dict()["checks"][0]["leaves"][0]
    assert leaf["worst"]["got"] == "nan" and leaf["heat"] == [["inf"]]


def test_the_table_has_a_line_for_each_check():
    assert len(table([RIGHT, WRONG])) == 3
    assert extent(SKIPPED) == SKIPPED.message
    assert extent(check(torch.ones(2), torch.ones(3))) == "shape"


def test_a_program_of_pages_is_left_out_of_the_text():
    short, long = (dataclasses.replace(Report("f", (RIGHT,)), reproducer="x = 1\n" * lines) for lines in (3, 3000))
    assert str(short).endswith("To reproduce it in plain PyTorch:\n\nx = 1\nx = 1\nx = 1\n")
    text = "The program has 3000 lines with the numbers in it. It is report.reproducer, and stands in the files of JSON and HTML."
    assert str(long).endswith(text)
    assert long.to_dict()["reproducer"] == long.reproducer
