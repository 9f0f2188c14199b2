"""What every test gets: kernels on the CPU where there is no GPU, and nobody's own policies."""

import collections
import os
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:  # NumPy reads it when it is imported: the workers share the cores already
    os.environ["OPENBLAS_NUM_THREADS"] = os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from hypothesis import settings

# Triton reads it when it is first imported, and what is decorated then stays so for the whole process: it has to be the
# same for all tests. Kernels are compiled (tests/compile_pipeline.py) in processes without it.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# Kernels in the interpreter take longer than hypothesis allows by itself. CI must not fail by a chance find; elsewhere
# each run looks at new examples.
settings.register_profile("default", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "default")

TESTS = Path(__file__).parent
# Side by side, files are begun in this order, the longest first: what is begun last keeps one core busy alone.
SLOWEST = (
    "test_compile.py",
    "test_kernels.py",
    "test_emulated_kernels.py",
    "test_not_a_number.py",
    "test_sweep.py",
    "test_contract.py",
    "test_solution.py",
    "test_torch_compile.py",
    "test_expert_parallel.py",
    "test_report.py",
    "test_cli.py",
    "test_package.py",
    "test_library_gemms.py",
    "test_routed.py",
    "test_soak.py",
    "test_cli_terminal.py",
    "test_direct.py",
    "test_docs.py",
)
SLOW = 0.02  # of the time of all tests together


def pytest_configure(config):
    """Markers of the tests that can't run everywhere."""
    config.addinivalue_line("markers", "interpreter: compiles too many kernels for a GPU; skipped where there is one")


def pytest_collection_modifyitems(items):
    """Skip what needs a GPU where there is none, and the interpreter where there is one; put the files in order."""
    if gone := [name for name in SLOWEST if not (TESTS / name).exists()]:
        raise pytest.UsageError(f"SLOWEST in tests/conftest.py: expected files, got {', '.join(gone)}")
    if "PYTEST_XDIST_WORKER" in os.environ:
        place = {name: number for number, name in enumerate(SLOWEST)}
        items.sort(key=lambda item: place.get(item.path.name, len(SLOWEST)))
    if torch.cuda.is_available():
        name, skip = "interpreter", pytest.mark.skip(reason="needs Triton's interpreter, which isn't used on a GPU")
    else:
        name, skip = "gpu", pytest.mark.skip(reason="needs a CUDA GPU")
    for item in items:
        if item.get_closest_marker(name):
            item.add_marker(skip)


def pytest_terminal_summary(terminalreporter, config):
    """After the whole, say which slow file would be begun too late."""
    seconds = collections.Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                seconds[Path(report.location[0]).name] += report.duration
    whole = config.args_source is not pytest.Config.ArgsSource.ARGS and not config.option.keyword
    for name, own in seconds.most_common() if whole else ():
        if own > SLOW * seconds.total() and name not in SLOWEST:
            terminalreporter.line(f"{name} isn't in tests/conftest.py's SLOWEST: {own:.0f} s of {seconds.total():.0f}")


@pytest.fixture(autouse=True)
def user_data(tmp_path, monkeypatch):
    """An empty folder in place of the user's data, where policies are looked up first."""
    folder = tmp_path / "user_data"
    monkeypatch.setenv("XDG_DATA_HOME", str(folder))
    return folder
