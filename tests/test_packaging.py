"""The installation: what `vlmteacher env` reports, and the name that must stay free."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest

from vlmteacher import environment
from vlmteacher.ops import backends


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


def test_report_without_torch(monkeypatch):
    find = environment.importlib.util.find_spec
    monkeypatch.setattr(environment.importlib.util, "find_spec", lambda name: None if name == "torch" else find(name))
    facts = environment.report()
    assert all("torch is not installed" in status["why"] for status in facts["backends"].values())
    environment.format_report(facts)


def test_report_is_quick_and_imports_no_big_library():
    code = (
        "import sys; from vlmteacher.environment import report; report(); "
        "print([m for m in ('diffusers', 'transformers', 'peft', 'triton') if m in sys.modules])"
    )
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert time.perf_counter() - start < 20  # 4 s on an idle machine; here other work may hold the cores


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
