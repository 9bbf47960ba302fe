"""What a wheel brings: the eBPF object and all else that is no Python, installed and found."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "CHANGELOG.md", "LICENSE", "scripts/build-bpf")
DATA = ("bpf/fabric.bpf.o", "bpf/fabric.bpf.c", "bpf/fabric.h", "scenario/schema.json", "py.typed")

# Needs nothing but the package: loads what a run loads first, and says where it is.
CHECK = """
import importlib.resources, testbed, testbed.kernel.bpf as bpf
home = importlib.resources.files("testbed")
for name in {data!r}:
    assert home.joinpath(name).is_file(), name
assert bpf.OBJECT_PATH.read_bytes()[:4] == b"\\x7fELF"
print(testbed.__file__)
"""


def copy_sources(destination: Path, *, with_object: bool) -> Path:
    """Copy what a source distribution has; the repository itself is left alone."""
    for name in SOURCES:
        target = destination / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target)
    ignored = shutil.ignore_patterns("__pycache__", *([] if with_object else ["*.bpf.o"]))
    shutil.copytree(ROOT / "testbed", destination / "testbed", ignore=ignored)
    return destination


def build_wheel(source: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", "dist", "."]
    return subprocess.run(command, cwd=source, capture_output=True, text=True, env={**os.environ, **environment})


def test_wheel_built_without_the_object_builds_it_and_works_where_it_is_installed(tmp_path: Path) -> None:
    source = copy_sources(tmp_path / "source", with_object=False)
    built = build_wheel(source)
    assert built.returncode == 0, built.stderr
    (wheel,) = (source / "dist").glob("testbed-*.whl")
    names = ZipFile(wheel).namelist()
    assert {f"testbed/{name}" for name in DATA} <= set(names)
    assert {Path(name).parts[0] for name in names} - {"testbed"} == {
        wheel.name.removesuffix("-py3-none-any.whl") + ".dist-info"
    }

    home = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", home], check=True)
    pip = [sys.executable, "-m", "pip", "--python", home / "bin" / "python", "--disable-pip-version-check", "--quiet"]
    subprocess.run([*pip, "install", "--no-index", "--no-deps", wheel], check=True)
    # The dependencies are those of the environment that runs this test; its own testbed is only linked there.
    environment = {**os.environ, "PYTHONPATH": sysconfig.get_path("purelib")}
    check = [home / "bin" / "python", "-c", CHECK.format(data=DATA)]
    done = subprocess.run(check, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).is_relative_to(home)
    version = subprocess.run(
        [home / "bin" / "testbed", "--help"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert version.returncode == 0, version.stderr


def test_wheel_without_compiler_and_object_fails_with_a_hint(tmp_path: Path) -> None:
    source = copy_sources(tmp_path / "source", with_object=False)
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("bash", "env", "dirname", "find"):
        found = shutil.which(name)
        assert found
        (tools / name).symlink_to(found)
    built = build_wheel(source, PATH=str(tools))
    assert built.returncode != 0
    assert "clang is missing" in built.stdout + built.stderr
    assert "apt-get install clang" in built.stdout + built.stderr
    assert not list(source.glob("dist/*.whl"))


@pytest.mark.skipif(not (ROOT / "testbed/bpf/fabric.bpf.o").exists(), reason="scripts/build-bpf has not run")
def test_object_is_left_alone_when_it_is_newer_than_its_sources(tmp_path: Path) -> None:
    source = copy_sources(tmp_path, with_object=True)
    compiled = source / "testbed/bpf/fabric.bpf.o"
    stamp = compiled.stat().st_mtime_ns
    for name in ("fabric.bpf.c", "fabric.h"):
        os.utime(source / "testbed/bpf" / name, ns=(stamp - 10**9, stamp - 10**9))
    os.utime(source / "scripts/build-bpf", ns=(stamp - 10**9, stamp - 10**9))
    subprocess.run([source / "scripts/build-bpf"], check=True)
    assert compiled.stat().st_mtime_ns == stamp
    os.utime(source / "testbed/bpf/fabric.h", ns=(stamp + 10**9, stamp + 10**9))
    subprocess.run([source / "scripts/build-bpf"], check=True)
    assert compiled.stat().st_mtime_ns > stamp
