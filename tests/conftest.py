"""What every test gets: kernels on the CPU where there is no GPU, and nobody's own policies."""

import os

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

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the workers share the cores already


def pytest_configure(config):
    """Markers of the tests that can't run everywhere."""
    config.addinivalue_line("markers", "interpreter: compiles too many kernels for a GPU; skipped where there is one")


def pytest_collection_modifyitems(items):
    """Skip what needs a GPU where there is none, and what needs the interpreter where there is a GPU."""
    if torch.cuda.is_available():
        name, skip = "interpreter", pytest.mark.skip(reason="needs Triton's interpreter, which isn't used on a GPU")
    else:
        name, skip = "gpu", pytest.mark.skip(reason="needs a CUDA GPU")
    for item in items:
        if item.get_closest_marker(name):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def user_data(tmp_path, monkeypatch):
    """An empty folder in place of the user's data, where policies are looked up first."""
    folder = tmp_path / "user_data"
    monkeypatch.setenv("XDG_DATA_HOME", str(folder))
    return folder
