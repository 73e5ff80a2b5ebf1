"""`import steelyard` is light, its public names are there, and every module imports without the extras."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("torch", "numpy", "gymnasium", "transformers", "pydantic", "tyro", "h5py", "matplotlib", "mujoco")
EXTRAS = ("h5py", "minari", "matplotlib", "PIL", "gymnasium_robotics", "mujoco", "pyarrow", "tensorboard", "trackio",
          "transformers", "tokenizers", "fastapi", "ray", "vllm", "av", "onnx", "onnxruntime",
          "onnxscript", "scipy", "uvicorn", "sklearn")  # fmt: skip


def python(code: str) -> str:
    work = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert work.returncode == 0, work.stderr
    return work.stdout


@pytest.mark.parametrize("module", ["steelyard", "steelyard.cli.main"])
def test_import_is_light(module):
    found = python(f"import sys, {module}\nprint([name for name in {HEAVY} if name in sys.modules])")
    assert found.strip() == "[]"


def test_public_names_are_there_and_steady():
    """A second look must give the same object: a lazy name must not be hidden by a package of the same name."""
    changed = python(
        "import steelyard\n"
        "assert steelyard.__version__ and set(steelyard.__all__) <= set(dir(steelyard)) | set(steelyard._PUBLIC)\n"
        "first = {name: getattr(steelyard, name) for name in steelyard.__all__}\n"
        "print(sorted(name for name, value in first.items() if getattr(steelyard, name) is not value))"
    ).strip()
    assert changed == "[]"


def test_what_the_public_names_are():
    import steelyard
    from steelyard import artefact
    from steelyard.data import episode, formats, store
    from steelyard.workflows import control

    names = steelyard.__all__
    assert {"ControlRun", "Episode", "Store", "__version__", "load", "open_dataset", "resume", "start"} <= set(names)
    assert steelyard.load is artefact.load
    assert steelyard.Store is store.Store
    assert steelyard.Episode is episode.Episode
    assert steelyard.open_dataset is formats.open_dataset
    assert steelyard.ControlRun is control.ControlRun
    assert steelyard.resume is control.resume
    assert steelyard.start is control.start
    with pytest.raises(AttributeError, match="module 'steelyard' has no attribute 'laod'"):
        _ = steelyard.laod


def test_every_module_imports_without_extras():
    """P2: the core is enough to import everything; what needs an extra says so when it is used."""
    python(
        "import importlib, pkgutil, sys\n"
        f"for name in {EXTRAS}: sys.modules[name] = None\n"
        "import steelyard\n"
        "names = [found.name for found in pkgutil.walk_packages(steelyard.__path__, 'steelyard.')]\n"
        "assert len(names) > 40, names\n"
        "for name in names: importlib.import_module(name)\n"
    )
