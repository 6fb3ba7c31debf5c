"""Compile the stand-in for CUDA: `runtime.cpp`, what else of cuBLAS torch names, and a driver library that says yes."""

from __future__ import annotations

import re
import subprocess
from importlib.util import find_spec
from pathlib import Path

SOURCE = Path(__file__).with_name("runtime.cpp")
DRIVER = """
int cuDeviceGetCount(int* count) { *count = 1; return 0; }
int cuDriverGetVersion(int* version) { *version = 13000; return 0; }
int cuDevicePrimaryCtxGetState(int device, unsigned* flags, int* active) { *flags = 0; *active = 1; return 0; }
int cuPointerGetAttribute(void* data, int attribute, unsigned long pointer) {
  *(unsigned long*)data = pointer;
  return 0;
}
"""


def _package(name: str) -> Path:
    spec = find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise RuntimeError(f"{name}: expected it to be installed, with the CUDA build of torch, got no module")
    return Path(next(iter(spec.submodule_search_locations)))


def build(folder: Path) -> dict[str, str]:
    """Compile into `folder`.

    Returns:
        What the environment of a process must have for torch to find a GPU in it.

    Raises:
        RuntimeError: torch is not the build for CUDA 13.
        subprocess.CalledProcessError: no compiler, or none that can.
    """
    folder.mkdir(parents=True, exist_ok=True)
    cuda = _package("nvidia") / "cu13" / "include"
    headers = [
        cuda,
        _package("triton") / "backends" / "nvidia" / "include",
    ]  # the latter for those that the former lacks
    libraries = _package("torch") / "lib"
    if not (cuda / "cuda.h").exists() or not (libraries / "libtorch_cuda.so").exists():
        raise RuntimeError("torch: expected the build for CUDA 13, got another")
    text = SOURCE.read_text(encoding="utf-8")
    names = subprocess.run(
        ["nm", "-D", "--undefined-only", libraries / "libtorch_cuda.so"], check=True, capture_output=True, text=True
    ).stdout
    missing = {name for name in re.findall(r"\b(cublas\w+)", names) if f" {name}(" not in text}
    (folder / "more.cpp").write_text("\n".join(f'extern "C" int {name}() {{ return 0; }}' for name in sorted(missing)))
    flags = ["-shared", "-fPIC", "-w", *(f"-I{path}" for path in headers)]
    subprocess.run(["g++", *flags, SOURCE, folder / "more.cpp", "-o", folder / "runtime.so"], check=True)
    functions = set(re.findall(r"\b(cu[A-Z]\w+)\s*\(", (cuda / "cuda.h").read_text(encoding="utf-8")))
    functions |= {f"{name}_v{version}" for name in functions for version in (2, 3, 4)}
    others = sorted(name for name in functions if f" {name}(" not in DRIVER)
    (folder / "driver.c").write_text("\n".join(f"int {name}(void) {{ return 0; }}" for name in others) + DRIVER)
    subprocess.run(["gcc", "-shared", "-fPIC", "-w", folder / "driver.c", "-o", folder / "libcuda.so.1"], check=True)
    return {"LD_LIBRARY_PATH": str(folder), "LD_PRELOAD": str(folder / "runtime.so")}
