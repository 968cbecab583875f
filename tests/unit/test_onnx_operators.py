"""ONNX's own tests of its operators, through raytorch.onnx: what passes, and what onnxruntime cannot do and why."""

import warnings
from pathlib import Path
from typing import Any

import onnx.backend.test.loader
import yaml
from onnx.backend.test.runner import Runner, _normalize_tensor

from raytorch import onnx as ours
from raytorch.errors import UserError

LISTS = Path(__file__).with_name("onnx_operators_refused.yaml")


def outcome(case: Any, path: Path) -> str:
    """``passed``, or why not."""
    path.write_bytes(case.model.SerializeToString())
    try:
        ours.check(path)
        with ours.load(path, threads=1) as graph:
            for inputs, expected in case.data_sets:
                found = graph.run(*map(_normalize_tensor, inputs))
                wanted = [_normalize_tensor(output) for output in expected]
                Runner.assert_similar_outputs(wanted, found, case.rtol, case.atol)
    except (UserError, AssertionError, TypeError) as error:
        return " ".join(str(error).replace(str(path), "").split())
    return "passed"


def test_the_official_operator_tests_pass_but_for_those_listed(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=RuntimeWarning, module=r"onnx\.backend\.test")  # they divide by zero
        cases = onnx.backend.test.loader.load_model_tests(kind="node")
        outcomes = {case.name: outcome(case, tmp_path / "model.onnx") for case in cases}
    lists = yaml.safe_load(LISTS.read_text(encoding="utf-8"))
    refused = {name for names in lists["refused"].values() for name in names}
    either = {name for names in lists["depends_on_the_machine"].values() for name in names}
    failed = {name: reason for name, reason in outcomes.items() if reason != "passed"}
    assert {name: reason for name, reason in failed.items() if name not in refused | either} == {}
    assert sorted((refused | either) - outcomes.keys()) == []  # gone: take them off the list
    assert sorted(refused - failed.keys()) == []  # pass now: take them off the list
    assert len(outcomes) - len(failed) >= 1000
