"""Builds vlmteacher._C with CMake. Whatever stops the build stops only the extension: the package still installs in
pure Python, and the reason is kept in vlmteacher/_build.json for `vlmteacher env`."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


class NotBuilt(Exception):
    """Why there is no extension, in one line."""


def torch_dir() -> Path:
    """The installed torch package, found without importing it (which takes seconds)."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise NotBuilt("torch was not installed when the package was built")
    directory = Path(spec.origin).parent
    if not (directory / "include/torch/csrc/stable/library.h").exists():
        raise NotBuilt("the installed torch has no stable ABI headers: torch 2.10 or newer is needed")
    return directory


def compiler() -> str:
    """The C++ compiler: $CXX when set, else the first common name on PATH."""
    for name in [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]:
        if path := shutil.which(name):
            return path
    raise NotBuilt("no C++ compiler was found (install g++ or set CXX)")


def run(*command: str) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(done.stdout)
    if done.returncode:
        lines = [line.strip() for line in done.stdout.splitlines() if line.strip()] or ["it said nothing"]
        at = next((i for i, line in enumerate(lines) if re.search("error", line, re.IGNORECASE)), len(lines) - 1)
        # CMake writes where before what, and breaks the sentence
        text = " ".join(lines[at + 1 : at + 4] if lines[at].startswith("CMake Error") else lines[at:][:1])
        raise NotBuilt(f"{Path(command[0]).name} failed: {text[:300]}")


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            self.cmake(target)
            facts: dict[str, object] = {"built": True, "why": ""}
        except (NotBuilt, OSError) as error:
            target.unlink(missing_ok=True)
            facts = {"built": False, "why": str(error)}
            print(f"vlmteacher: installing without the C++ operators: {error}", file=sys.stderr)
        (target.parent / "_build.json").write_text(json.dumps(facts) + "\n")

    def copy_extensions_to_source(self) -> None:
        """For an editable install, which reads the source tree."""
        built = Path(self.build_lib) / "vlmteacher"
        for old in (ROOT / "vlmteacher").glob("_C.*.so"):  # of an earlier build: it would look current
            old.unlink()
        shutil.copy(built / "_build.json", ROOT / "vlmteacher")
        super().copy_extensions_to_source()

    def cmake(self, target: Path) -> None:
        torch, cxx, cmake = torch_dir(), compiler(), shutil.which("cmake")
        if cmake is None:
            raise NotBuilt("cmake was not found (install cmake)")
        if importlib.util.find_spec("pybind11") is None:
            raise NotBuilt("pybind11 was not installed when the package was built")
        import pybind11

        version = re.search(r"__version__\s*=\s*['\"]([^'\"]+)", (torch / "version.py").read_text())
        build = Path(self.build_temp).resolve()
        shutil.rmtree(build, ignore_errors=True)  # an isolated build's paths are gone by the next one
        build.mkdir(parents=True)
        generator = ["-GNinja"] if shutil.which("ninja") else []
        options = {
            "CMAKE_CXX_COMPILER": cxx,
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": str(target.parent),
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "TORCH_DIR": str(torch),
            "TORCH_VERSION": version.group(1) if version else "unknown",
        }
        run(cmake, "-S", str(ROOT), "-B", str(build), *generator, *(f"-D{k}={v}" for k, v in options.items()))
        run(cmake, "--build", str(build), "--parallel", str(os.cpu_count() or 1))
        if not target.exists():
            raise NotBuilt(f"cmake did not write {target.name}")


setup(ext_modules=[Extension("vlmteacher._C", sources=[], optional=True)], cmdclass={"build_ext": CMakeBuild})
