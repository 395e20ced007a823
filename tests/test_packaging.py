"""The installation: what `vlmteacher env` reports, and the name that must stay free."""

from __future__ import annotations

import ast
import json
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path

import pytest
import torch

from vlmteacher import environment
from vlmteacher.ops import backends
from vlmteacher.ops.manifest import OPERATORS, Operator


def test_report_is_json_and_says_why():
    facts = environment.report()
    json.dumps(facts)
    assert set(facts["backends"]) == {"cpu", "triton", "cuda"}
    for status in facts["backends"].values():
        assert status["available"] == (status["why"] == "")
    assert facts["versions"]["torch"] and facts["devices"][0]["name"] == "cpu"
    text = environment.format_report(facts)
    assert "backends" in text and facts["versions"]["torch"] in text
    assert not facts["backends"]["cpu"]["available"] or facts["backends"]["cpu"]["build"]["torch"] in text


def test_missing_library_names_the_recorded_reason(monkeypatch, tmp_path):
    """The reason that setup.py recorded is what `env` shows when vlmteacher._C cannot be imported."""
    monkeypatch.setitem(sys.modules, "vlmteacher._C", None)
    monkeypatch.setattr(backends, "__file__", str(tmp_path / "ops/backends.py"))
    (tmp_path / "_build.json").write_text('{"built": false, "why": "no C++ compiler was found"}')
    status = backends.cpp_status.__wrapped__()
    assert status == (False, "no C++ compiler was found")
    (tmp_path / "_build.json").write_text('{"built": true, "why": ""}')
    available, why = backends.cpp_status.__wrapped__()
    assert not available and "does not load" in why
    (tmp_path / "_build.json").unlink()
    assert "pip install" in backends.cpp_status.__wrapped__()[1]


def test_missing_cuda_library_names_the_recorded_reason(monkeypatch, tmp_path):
    monkeypatch.setattr(backends, "__file__", str(tmp_path / "ops/backends.py"))

    def status(facts: dict) -> tuple[bool, str]:
        (tmp_path / "_build.json").write_text(json.dumps({"built": True, "why": ""} | facts))
        return backends.cuda_status.__wrapped__()

    assert status({"cuda": {"built": False, "why": "nvcc was not found"}}) == (False, "nvcc was not found")
    assert "pip install" in status({})[1]  # by a version that had none
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert re.fullmatch(r"built, but torch .* sees no GPU", status({"cuda": {"built": True, "why": ""}})[1])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert "Ampere and newer, but the GPU is a GPU" in status({"cuda": {"built": True, "why": ""}})[1]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    assert "the library does not load" in status({"cuda": {"built": True, "why": ""}})[1]


@pytest.mark.parametrize(
    ("wish", "nvcc", "torch_cuda", "expected"),
    [
        ("auto", True, "'13.0'", "nvcc"),
        ("auto", True, "None", "no CUDA build"),
        ("auto", False, "'13.0'", "nvcc was not found"),
        ("on", True, "None", "nvcc"),
        ("on", False, "None", "nvcc was not found"),
        ("off", True, "'13.0'", "VLMTEACHER_CUDA=off"),
        ("yes", True, "'13.0'", "none of auto, on and off"),
    ],
)
def test_when_the_cuda_library_is_built(wish, nvcc, torch_cuda, expected, monkeypatch, tmp_path, pytestconfig):
    monkeypatch.setattr("setuptools.setup", lambda **_: None)
    build = runpy.run_path(str(pytestconfig.rootpath / "setup.py"))
    (tmp_path / "version.py").write_text(f"__version__ = '2.13.0'\ncuda: Optional[str] = {torch_cuda}\n")
    if nvcc:
        (tmp_path / "nvcc").touch(mode=0o755)
    for name, value in {"PATH": str(tmp_path), "CUDACXX": "", "VLMTEACHER_CUDA": wish}.items():
        monkeypatch.setenv(name, value)
    try:
        found = Path(build["cuda_compiler"](tmp_path)).name
    except build["NotBuilt"] as error:
        found = str(error)
    assert found == expected or (expected != "nvcc" and expected in found)


def test_a_gpu_prefers_cuda_then_triton_then_the_reference(monkeypatch):
    class OnGPU:
        device, dtype, itemsize = torch.device("cuda"), torch.bfloat16, 2

        def __len__(self) -> int:
            return 4096

    available = {"cuda_status": True, "triton_status": True}
    for name in available:
        monkeypatch.setattr(backends, name, lambda name=name: (available[name], ""))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)  # a CPU build has none
    monkeypatch.setattr(backends.importlib, "import_module", lambda name: name)
    monkeypatch.setitem(OPERATORS, "another", Operator("another", ("another",), ("triton",)))
    assert backends.backend(OnGPU(), "lora_linear") is torch.ops.vlmteacher_cuda
    assert backends.backend(OnGPU(), "another") == "vlmteacher.kernels.another"
    small, large = ([torch.empty(n, n, device="meta")] for n in (256, 3072))
    assert backends.backend(OnGPU(), "lora_linear", small) is torch.ops.vlmteacher_cuda
    assert backends.backend(OnGPU(), "lora_linear", large) is None  # torch's products are faster
    available["cuda_status"] = False
    assert backends.backend(OnGPU(), "lora_linear", small) is None
    assert backends.backend(OnGPU(), "ada_norm") == "vlmteacher.kernels.ada_norm"
    available["triton_status"] = False
    assert backends.backend(OnGPU(), "ada_norm") is None


def test_report_without_torch(monkeypatch):
    find = environment.importlib.util.find_spec
    monkeypatch.setattr(environment.importlib.util, "find_spec", lambda name: None if name == "torch" else find(name))
    facts = environment.report()
    assert all("torch is not installed" in status["why"] for status in facts["backends"].values())
    environment.format_report(facts)


def test_report_imports_no_big_library():
    code = (
        "import sys; from vlmteacher.environment import report; report(); "
        "print([m for m in ('diffusers', 'transformers', 'peft', 'triton') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("directory", ["repository", "elsewhere"])
def test_kernels_is_no_package_to_diffusers_and_transformers(directory, tmp_path, pytestconfig):
    """Both probe for PyPI's `kernels`. From the repository's root the folder is seen, and must not be taken for it."""
    where = pytestconfig.rootpath if directory == "repository" else tmp_path
    code = (
        "from transformers.utils import is_kernels_available as t;"
        "from diffusers.utils import is_kernels_available as d;"
        "import importlib.metadata as m; has = any(x.name == 'kernels' for x in m.distributions());"
        "assert t() == has and d() == has, (t(), d(), has)"
    )
    path = str(pytestconfig.rootpath)
    done = subprocess.run([sys.executable, "-c", code], cwd=where, env={"PYTHONPATH": path}, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()[-2000:]


def test_the_sdist_has_what_a_build_needs(tmp_path, pytestconfig):
    """Built from a copy, since setuptools writes beside the sources; `make package` builds the wheel from it too."""
    root = pytestconfig.rootpath
    listed = subprocess.run(["git", "ls-files"], cwd=root, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("no checkout of git")
    for name in listed.stdout.splitlines():
        if (root / name).exists() and not name.startswith(("tests/", "docs/")):
            (tmp_path / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(root / name, tmp_path / "source" / name, follow_symlinks=False)
    (tmp_path / "source/vlmteacher/_build.json").write_text("{}")  # of an earlier build here
    code = "import sys; sys.path.insert(0, 'build_backend'); import backend; backend.build_sdist(sys.argv[1])"
    command = [sys.executable, "-c", code, str(tmp_path)]
    subprocess.run(command, cwd=tmp_path / "source", check=True, capture_output=True)
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        names = {member.name.partition("/")[2] for member in archive if member.isfile()}
    folders = ("csrc/", "build_backend/", "vlmteacher/")
    sources = {name for name in listed.stdout.splitlines() if name.startswith(folders) and (root / name).is_file()}
    assert {"CMakeLists.txt", "setup.py", "pyproject.toml", "LICENSE", *sources} <= names
    assert {"vlmteacher/kernels/lora_linear.py", "vlmteacher/py.typed"} <= names
    assert {"vlmteacher/distillation/configs/sft.yaml", "vlmteacher/microworld/models/pair.json"} <= names
    assert "vlmteacher/_build.json" not in names and not any(name.endswith(".so") for name in names)


def test_the_metadata_names_what_is_imported(pytestconfig):
    """Every library that the package imports at the top of a module is a dependency, and torch is not pinned."""
    project = tomllib.loads((pytestconfig.rootpath / "pyproject.toml").read_text())["project"]
    declared = {re.split(r"[\[<>=~!; ]", line)[0].lower().replace("_", "-") for line in project["dependencies"]}
    known = {"PIL": "pillow", "yaml": "pyyaml", "imageio_ffmpeg": "imageio"}
    optional = {re.split(r"[\[<>=]", line)[0] for group in project["optional-dependencies"].values() for line in group}
    imported = set()
    for path in (pytestconfig.rootpath / "vlmteacher").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                imported.add(node.module.split(".")[0])
            elif isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
    others = imported - set(sys.stdlib_module_names) - {"vlmteacher"}
    assert {known.get(name, name).replace("_", "-") for name in others} <= declared | optional
    assert "torch>=2.10" in project["dependencies"]
    constraints = (pytestconfig.rootpath / "constraints.txt").read_text()
    assert re.search(r"^torch==\d+\.\d+\.\d+$", constraints, re.MULTILINE)


def test_dir_names_what_is_imported_on_first_use(pytestconfig):
    code = (
        "import sys, vlmteacher; assert {'TeacherPipeline', 'QuerySet', 'packaged_example'} <= set(dir(vlmteacher));"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=pytestconfig.rootpath)
