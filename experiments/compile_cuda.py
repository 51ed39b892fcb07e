"""Compiles every .cu file for sm_80 and sm_90; no GPU is needed. CI runs it wherever nvcc is.

    python -m experiments.compile_cuda [FILE.cu ...]

Prints registers, shared memory and spills of each kernel. Exits 1 if a file does not compile, a
kernel spills registers to memory or the files do not link into one library (a function of a header
has to be `inline`), and 0 without a word of success where there is no nvcc.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

OPS = Path(__file__).resolve().parents[1] / "ops"
ARCHITECTURES = ("80", "90")  # A100, H100 and H200
KERNEL = re.compile(r"\d([a-z]+_kernel)(?:I(\w+?)E+v)?")  # mangled, with a template argument
TYPES = {"f": "float", "d": "double", "Lb0": "false", "Lb1": "true"}


def kernel_name(mangled):
    """_ZN..12class_kernelILb1EEEvNS.. -> class_kernel<true>."""
    name, argument = KERNEL.search(mangled).groups()
    if argument is None:
        return name
    known = next((x for x in ("Half", "BFloat16") if x in argument), None)
    return f"{name}<{known or TYPES.get(argument, argument)}>"


def object_of(source, folder):
    return f"{folder}/{source.stem}.o"


def compile_file(source, nvcc, flags, folder):
    """-> rows (architecture, kernel, registers, shared bytes, spilled bytes); prints errors."""
    command = [nvcc, *flags, "-Xptxas", "-v", "-c", str(source), "-o", object_of(source, folder)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        print(f"{source}: nvcc failed\n{result.stderr}")
        return None
    rows = []
    for line in result.stderr.splitlines():
        if found := re.search(r"Compiling entry function '(\w+)' for 'sm_(\d+)'", line):
            kernel = kernel_name(found[1])
            architecture = found[2]
        elif found := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line):
            spilled = int(found[1]) + int(found[2])
        elif found := re.search(r"Used (\d+) registers", line):
            shared = re.search(r"(\d+) bytes smem", line)
            row = (architecture, kernel, int(found[1]), int(shared[1]) if shared else 0, spilled)
            rows.append(row)
    return rows


def link(sources, folder):
    """Whether their objects fit into one library; prints the names that collide."""
    objects = [object_of(source, folder) for source in sources]
    command = ["c++", "-r", "-nostdlib", *objects, "-o", f"{folder}/all.o"]
    result = subprocess.run(command, capture_output=True, text=True)
    print(result.stderr, end="")
    return not result.returncode


def find(program):
    """On the PATH, in CUDA_HOME, in the usual folder or among pip's packages; or None."""
    pip = importlib.util.find_spec("nvidia")
    folders = [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin"]
    folders += [
        p for f in (pip.submodule_search_locations if pip else []) for p in Path(f).glob("*/bin")
    ]
    found = shutil.which(program)
    return found or next((str(f / program) for f in folders if (f / program).is_file()), None)


def main(arguments):
    if {"-h", "--help"} & set(arguments):
        print(__doc__.strip())
        return 0
    nvcc = find("nvcc")
    if nvcc is None:
        print("no nvcc on this machine: the CUDA files were NOT compiled")
        return 0
    os.environ["SCRATCHDET_OPS"] = "reference"  # import ops without building anything
    from torch.utils.cpp_extension import include_paths

    from ops.jit import NVCC_FLAGS

    flags = NVCC_FLAGS + [f"-I{path}" for path in include_paths()]
    flags += [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
    sources = [Path(name) for name in arguments]
    sources = sources or sorted(OPS.glob("*.cu")) + sorted(OPS.glob("ladder/*.cu"))
    failed = not sources
    print(f"{'file':22} {'sm':3} {'kernel':23} registers  shared bytes  spilled bytes")
    with ThreadPoolExecutor(os.cpu_count()) as pool, tempfile.TemporaryDirectory() as folder:
        found = pool.map(partial(compile_file, nvcc=nvcc, flags=flags, folder=folder), sources)
        for source, rows in zip(sources, found, strict=True):
            failed |= not rows
            for architecture, kernel, registers, shared, spilled in rows or []:
                failed |= spilled > 0
                print(
                    f"{source.name:22} {architecture:3} {kernel:23} "
                    f"{registers:9} {shared:13} {spilled:14}"
                )
            sys.stdout.flush()
        failed = failed or not link(sources, folder)
    print("FAILED" if failed else f"{len(sources)} files compiled and linked, no spills")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
