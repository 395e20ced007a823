"""Builds vlmteacher._C and, for GPUs, vlmteacher/_cuda.so with CMake. Whatever stops a build stops only that library:
the package still installs in pure Python, and the reason is kept in vlmteacher/_build.json for `vlmteacher env`.

VLMTEACHER_CUDA=auto|on|off says whether the GPU's library is built: `auto`, the default, where nvcc is found and the
installed torch is a CUDA build, `on` whatever torch is.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
CUDA_LIBRARY = "_cuda.so"


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


def version_fact(torch: Path, name: str) -> str | None:
    """`name` as torch/version.py has it, without importing it."""
    found = re.search(rf"^{name}\b[^=]*=\s*['\"]([^'\"]+)", (torch / "version.py").read_text(), re.MULTILINE)
    return found.group(1) if found else None


def cuda_compiler(torch: Path) -> str:
    """nvcc, where the GPU's library is wanted: $CUDACXX when set, else the one on PATH."""
    wish = os.environ.get("VLMTEACHER_CUDA", "auto")
    if wish not in ("auto", "on", "off"):
        raise NotBuilt(f"VLMTEACHER_CUDA={wish} is none of auto, on and off")
    if wish == "off":
        raise NotBuilt("the package was built with VLMTEACHER_CUDA=off")
    nvcc = shutil.which(os.environ.get("CUDACXX") or "nvcc")
    if nvcc is None:
        raise NotBuilt("nvcc was not found (install the CUDA toolkit or set CUDACXX)")
    if wish == "auto" and version_fact(torch, "cuda") is None:
        raise NotBuilt("the installed torch is no CUDA build (VLMTEACHER_CUDA=on builds all the same)")
    return nvcc


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
        facts = self.attempt(self.cpu, target)
        facts["cuda"] = self.attempt(self.cuda, target.parent / CUDA_LIBRARY)
        (target.parent / "_build.json").write_text(json.dumps(facts) + "\n")

    def attempt(self, build: Callable[[Path], dict[str, str]], target: Path) -> dict[str, object]:
        try:
            facts = build(target)
            if not target.exists():
                raise NotBuilt(f"cmake did not write {target.name}")
            return {"built": True, "why": "", **facts}
        except (NotBuilt, OSError) as error:
            target.unlink(missing_ok=True)
            print(f"vlmteacher: installing without {target.name}: {error}", file=sys.stderr)
            return {"built": False, "why": str(error)}

    def copy_extensions_to_source(self) -> None:
        """For an editable install, which reads the source tree."""
        built = Path(self.build_lib) / "vlmteacher"
        # those of an earlier build would look current
        for old in [*(ROOT / "vlmteacher").glob("_C.*so"), ROOT / "vlmteacher" / CUDA_LIBRARY]:
            old.unlink(missing_ok=True)
        for name in ("_build.json", CUDA_LIBRARY):
            if (built / name).exists():
                shutil.copy(built / name, ROOT / "vlmteacher")
        super().copy_extensions_to_source()

    def cpu(self, target: Path) -> dict[str, str]:
        torch, cxx = torch_dir(), compiler()

        shutil.rmtree(self.build_temp, ignore_errors=True)  # an isolated build's paths are gone by the next one
        options = {
            "CMAKE_CXX_COMPILER": cxx,
            "Python_EXECUTABLE": sys.executable,
            "TORCH_DIR": str(torch),
            "TORCH_VERSION": version_fact(torch, "__version__") or "unknown",
        }
        self.cmake(target, "_C", options)
        return {}

    def cuda(self, target: Path) -> dict[str, str]:
        torch = torch_dir()
        nvcc = cuda_compiler(torch)
        self.cmake(target, "_cuda", {"VLMTEACHER_CUDA": "ON", "CMAKE_CUDA_COMPILER": nvcc})
        release = re.search(r"release ([\d.]+)", subprocess.check_output([nvcc, "--version"], text=True))
        return {
            "compiler": f"nvcc {release.group(1) if release else ''}".strip(),
            "torch": version_fact(torch, "__version__") or "unknown",
        }

    def cmake(self, target: Path, name: str, options: dict[str, str]) -> None:
        """Builds CMake's target `name`; what an earlier one set stays set."""
        cmake = shutil.which("cmake")
        if cmake is None:
            raise NotBuilt("cmake was not found (install cmake)")
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        generator = ["-GNinja"] if shutil.which("ninja") else []
        options = {"CMAKE_LIBRARY_OUTPUT_DIRECTORY": str(target.parent), **options}
        run(cmake, "-S", str(ROOT), "-B", str(build), *generator, *(f"-D{k}={v}" for k, v in options.items()))
        jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL") or str(os.cpu_count() or 1)
        run(cmake, "--build", str(build), "--target", name, "--parallel", jobs)


# The library is of Python's limited API: one wheel serves every Python from 3.11 on.
setup(
    ext_modules=[Extension("vlmteacher._C", sources=[], optional=True, py_limited_api=True)],
    cmdclass={"build_ext": CMakeBuild},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
