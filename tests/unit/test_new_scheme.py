"""A made-up routing scheme in one file is known to the scenario, to paths and to predictions; nothing else is touched."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

import testbed.routing
from tests.support.new_scheme import SOURCE, copy_package, run_copy

AI_ZONE = str(Path(__file__).parents[2] / "scenarios" / "ai-zone.yaml")


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_package(tmp_path_factory.mktemp("package"), mirror=SOURCE)


def test_paths_follow_a_scheme_that_is_one_new_file(package: Path) -> None:
    done = run_copy(package, "paths", AI_ZONE, "--set", "routing.scheme=mirror", "--format", "json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    (first,) = (flow for flow in report["flows"] if flow["src"] == "host0")
    assert first["path"] == ["host0", "leaf0", "spine3", "leaf1", "host4"]
    assert report["predicted_cct_ratio"] == pytest.approx(1.0)


def test_predictions_follow_it_too(package: Path) -> None:
    done = run_copy(package, "predict", AI_ZONE, "--set", "routing.scheme=mirror", "--seeds", "3", "--format", "json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["scheme"] == "mirror"
    assert report["cct_ratio_mean"] == report["cct_ratio_p95"] == pytest.approx(1.0)


def test_a_misspelling_is_told_its_name(package: Path) -> None:
    wrong = run_copy(package, "validate", AI_ZONE, "--set", "routing.scheme=miror")
    assert wrong.returncode == 1
    assert "must be one of adaptive, e-ecmp, ecmp, flowlet, mirror, pinning" in wrong.stderr
    assert "did you mean mirror?" in wrong.stderr


def test_two_schemes_of_one_name_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mirror.py").write_text(SOURCE.replace('"mirror"', '"ecmp"'))
    monkeypatch.setattr(testbed.routing, "__path__", [*testbed.routing.__path__, str(tmp_path)])
    with pytest.raises(ValueError, match=r'testbed\.routing\.mirror: there is another routing scheme "ecmp"'):
        testbed.routing.find_schemes()
    del sys.modules["testbed.routing.mirror"]
