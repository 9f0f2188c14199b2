"""What is installed: the wheel and the sdist are whole, work alone, and cost what they say."""

import hashlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def build(source, target, out):
    """Without an index: hatchling is installed."""
    command = [sys.executable, "-m", "hatchling", "build", "-t", target, "-d", out]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    (made,) = Path(out).iterdir()
    return made


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return build(ROOT, "wheel", tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A folder with the wheel in it, by pip, which may ask no index."""
    folder = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", folder, wheel]
    subprocess.run(pip, check=True, capture_output=True)
    return folder


def hybrid_moe(installed, *arguments, cwd):
    environment = os.environ | {"PYTHONPATH": str(installed), "XDG_DATA_HOME": str(cwd)}
    command = [sys.executable, "-P", "-m", "hybrid_moe", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


def test_the_wheel_has_the_policies_and_what_they_were_learned_from(wheel):
    with zipfile.ZipFile(wheel) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    assert {"hybrid_moe/py.typed", "hybrid_moe/learn/report/page.html", "hybrid_moe/__main__.py"} <= contents.keys()
    digests = {hashlib.sha256(data).hexdigest() for name, data in contents.items() if "/_records/" in name}
    shipped = list(ROOT.glob("policies/*/*.json"))
    for path in shipped:
        assert contents[f"hybrid_moe/_policies/{path.relative_to(ROOT / 'policies')}"] == path.read_bytes()
        assert {each["sha256"] for each in json.loads(path.read_text())["inputs"]} <= digests, path
    assert len(shipped) >= 3
    assert len(digests) == sum("/_records/" in name for name in contents)
    assert not any(name.startswith(("tests", "benchmarks", "docs")) for name in contents)
    assert wheel.stat().st_size < 1_000_000


def test_the_sdist_gives_the_same_wheel(wheel, tmp_path):
    with tarfile.open(build(ROOT, "sdist", tmp_path / "sdist")) as archive:
        archive.extractall(tmp_path, filter="data")
    (source,) = tmp_path.glob("hybrid_moe-*/")
    for name in (
        "README.md",
        "docs/serving.md",
        "tests/test_package.py",
        "Makefile",
        "tools/torch_build.py",
        "LICENSE",
    ):
        assert (source / name).is_file(), name
    with zipfile.ZipFile(wheel) as one, zipfile.ZipFile(build(source, "wheel", tmp_path / "again")) as other:
        assert {n: one.read(n) for n in one.namelist()} == {n: other.read(n) for n in other.namelist()}


def test_the_wheel_works_alone(installed, tmp_path):
    done = hybrid_moe(installed, "explain", "--device", "nvidia_h100_80gb_hbm3", "--num-tokens", 300, cwd=tmp_path)
    assert done.returncode == 0 and "triton_fused[gemm=triton]" in done.stdout, done.stderr
    assert str(installed) in done.stdout.replace("\n", "")  # its own policies, not this repository's


@pytest.mark.parametrize("device", ["nvidia_b200", "nvidia_h200"])
def test_the_report_of_a_shipped_policy_from_a_wheel(installed, tmp_path, device):
    done = hybrid_moe(installed, "report", "--device", device, "-o", "page.html", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "the policy was learned from it" in (tmp_path / "page.html").read_text()


# ---- What an installation costs ----


def torch_build():
    spec = importlib.util.spec_from_file_location("torch_build", ROOT / "tools" / "torch_build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def report(*names):
    return {"install": [{"metadata": {"name": name, "version": "1.0"}} for name in names]}


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["torch", "nvidia-cublas", "cuda-toolkit", "sympy"], "2 packages of CUDA libraries"),
        (["torch", "sympy", "nvidia-ml-py"], None),
        ([], None),  # torch is there already
    ],
)
def test_a_cuda_build_without_a_gpu_is_announced(names, said):
    note = torch_build().note(report(*names))
    assert note is None if said is None else said in note and "TORCH_INDEX" in note


def test_every_direct_dependency_of_development_is_locked():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    libraries = {"sgl", "deepgemm", "flashinfer", "bench", "vllm"}  # for a GPU, by what its driver and torch want
    wanted = project["dependencies"] + [each for extra in extras.keys() - libraries for each in extras[extra]]
    names = {re.match(r"[\w-]+", each)[0] for each in wanted} - {"hybrid-moe", "triton"}
    locked = set(re.findall(r"^([\w-]+)==", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    assert names <= locked
