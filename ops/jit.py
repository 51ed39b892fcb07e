"""Compiles the kernels on first use and loads them; later runs load the finished library.

    build("cpu", ["match.cpp", ...])            g++
    build("emulate", ["match.cu", ...], emulate=True)   the CUDA sources by g++, through emulate.h
    build("cuda", ["match.cu", ...])            nvcc, for the cards of this machine

One folder holds one library, and its name holds all that a library depends on but its sources:
torch, Python, compiler, flags, and the CPU's instruction set (-march=native of another machine is
an illegal instruction here) or the cards' architecture. A file `built` in it holds the hash of
the sources, so that a second import neither starts ninja nor reads a line of C++.
"""

import contextlib
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import torch

OPS = Path(__file__).resolve().parent
# -ffp-contract=off, --fmad=false: a fused multiply-add rounds once where the reference rounds
# twice. The two -fno only let comparisons and selects be vectorised; they change no result.
CXX_FLAGS = ["-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
CXX_FLAGS += ["-std=c++20", "-Wall", f"-I{OPS}"]
NVCC_FLAGS = ["-O3", "--fmad=false", "-std=c++20", "-lineinfo", "-DUSE_CUDA", f"-I{OPS}"]


class BuildError(RuntimeError):
    """Cause and remedy of a library that could not be built or loaded."""


def build(name, sources, flags=(), *, emulate=False, load=True):
    """Compile `sources` (relative to ops/, or absolute) into one library and load it.

    `flags` are added for every compiler, to the link as well where they start with -fsanitize.
    `emulate` feeds .cu files to g++ behind `#include "emulate.h"` with SCRATCHDET_EMULATE defined.
    Returns the library's path; raises BuildError. Processes that arrive together wait for one.
    """
    sources = [OPS / source for source in sources]
    flags, cuda = list(flags), not emulate and any(s.suffix == ".cu" for s in sources)
    if emulate:
        flags.append("-DSCRATCHDET_EMULATE")
    folder = _root() / _folder_name(name, flags, cuda)
    digest = hashlib.sha256()
    for path in [*sources, *sorted(OPS.rglob("*.h"))]:
        if not path.exists():
            raise BuildError(f"{path} is missing. Restore it (git checkout ops), then run again")
        digest.update(f"{folder} {path}".encode() + path.read_bytes())
    digest = digest.hexdigest()
    # torch's loader gives the second library of one name in one process another name: so every
    # state of the sources gets its own.
    library, stamp = folder / f"scratchdet_{name}_{digest[:8]}.so", folder / "built"
    with _only_one(folder):
        if not (stamp.exists() and stamp.read_text() == digest and library.exists()):
            stamp.unlink(missing_ok=True)
            _compile(library, sources, flags, cuda=cuda, emulate=emulate)
            stamp.write_text(digest)
        if load:
            try:
                torch.ops.load_library(library)
            except OSError as error:
                message = f"{library} does not load ({error}). Remove it: rm -r {folder}"
                raise BuildError(message) from error
    return library


def _root():
    """<repo>/build, or a cache of the user's where the repo is read-only."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "scratchdet"
    for root in (OPS.parent / "build", cache):
        with contextlib.suppress(OSError):
            root.mkdir(parents=True, exist_ok=True)
            if os.access(root, os.W_OK):
                return root
    raise BuildError(f"neither {OPS.parent}/build nor {cache} can be written. Set XDG_CACHE_HOME")


def _folder_name(name, flags, cuda):
    """cuda-torch2.13.0+cu130-py311-sm_90-1a2b3c4d, cpu-torch2.13.0+cpu-py311-x86_64-5e6f7a8b."""
    target = "_".join(_architectures()) if cuda else platform.machine()
    parts = [_cpu(), _compiler(), *CXX_FLAGS, *NVCC_FLAGS, *flags]
    short = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:8]
    python = f"py{sys.version_info.major}{sys.version_info.minor}"
    return f"{name}-torch{torch.__version__}-{python}-{target}-{short}"


def _cpu():
    """What -march=native turns into code: on Linux, the CPU's list of features."""
    with contextlib.suppress(OSError):
        found = re.search(r"^(flags|Features).*$", Path("/proc/cpuinfo").read_text(), re.M)
        if found:
            return found[0]
    return platform.processor()


def _architectures():
    cards = range(torch.cuda.device_count())
    return sorted({"sm_{}{}".format(*torch.cuda.get_device_capability(card)) for card in cards})


def _compiler():
    return os.environ.get("CXX", "c++")


@contextlib.contextmanager
def _only_one(folder):
    """One process at a time in `folder`. The system drops this lock when its holder is killed."""
    try:
        import fcntl
    except ImportError as error:
        raise BuildError("kernels are built on Linux and macOS only") from error
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "in_use", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say(f"waiting for another process that compiles in {folder}")
            fcntl.flock(file, fcntl.LOCK_EX)
        # torch's own lock is a plain file: a killed build leaves it, and the next one spins on
        # it for ever. Whoever holds ours knows that it is stale.
        (folder / "lock").unlink(missing_ok=True)
        yield


def _compile(library, sources, flags, *, cuda, emulate):
    folder = library.parent
    log = folder / "build.log"
    _check_tools(cuda)
    from torch.utils import cpp_extension  # slow to import, and only a build needs it

    if emulate:  # ninja's rule for .cu is nvcc: hand it a .cpp that includes the file
        sources = [_wrapper(folder, source) for source in sources]
    nvcc_flags, link_flags = list(NVCC_FLAGS), [f for f in flags if f.startswith("-fsanitize")]
    if cuda:
        link_flags += _cudart(cpp_extension.CUDA_HOME)
        nvcc_flags += [f"-gencode=arch=compute_{a[3:]},code={a}" for a in _architectures()]
    files = " ".join(source.name for source in sources)
    hint = f"log: {log}; if this hangs, an earlier build was killed: rm -r {folder}"
    _say(f"compiling {files} once, some 10 seconds, with nvcc a minute ({hint})")
    try:
        cpp_extension.load(
            library.stem,
            [str(source) for source in sources],
            extra_cflags=CXX_FLAGS + flags,
            extra_cuda_cflags=nvcc_flags + flags,
            extra_ldflags=link_flags,
            build_directory=str(folder),
            is_python_module=False,
        )
    except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
        log.write_text(str(error))
        raise BuildError(_explain(str(error), log)) from None
    log.write_text(f"built {files} with {CXX_FLAGS + flags}\n")


def _wrapper(folder, source):
    wrapper = folder / f"{source.stem}_emulated.cpp"
    text = f'#include "{OPS}/emulate.h"\n#include "{source}"\n'
    if not wrapper.exists() or wrapper.read_text() != text:
        wrapper.write_text(text)
    return wrapper


def _check_tools(cuda):
    """Raise BuildError with the remedy where a tool is missing or of the wrong version."""
    if not shutil.which(_compiler()):
        raise BuildError(
            f"no C++ compiler ({_compiler()!r} is not found). "
            "Install one (apt install g++; macOS: xcode-select --install) or set CXX"
        )
    if not shutil.which("ninja"):  # installed in an environment that is not activated?
        try:
            import ninja
        except ImportError:
            raise BuildError("no ninja. Install it: pip install ninja") from None
        os.environ["PATH"] += os.pathsep + ninja.BIN_DIR
    if not cuda:
        return
    from torch.utils.cpp_extension import CUDA_HOME

    nvcc = Path(CUDA_HOME or "/nowhere") / "bin" / "nvcc"
    wanted = torch.version.cuda
    if not nvcc.exists():
        raise BuildError(
            f"a GPU but no nvcc. Install the CUDA toolkit {wanted}, or set CUDA_HOME to it"
        )
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    found = re.search(r"release (\d+)\.(\d+)", version)
    if found and found[1] != wanted.split(".")[0]:
        raise BuildError(
            f"{nvcc} is of CUDA {found[1]}.{found[2]}, torch of CUDA {wanted}. "
            f"Set CUDA_HOME to a toolkit {wanted.split('.')[0]}.x, or install torch for "
            f"CUDA {found[1]}"
        )


def _cudart(cuda_home):
    """Where libcudart is, as a flag of the link. torch looks beside the nvcc on the PATH, and that
    may be a script or a link to the real one, which knows its own place."""
    command = [Path(cuda_home) / "bin" / "nvcc", "--dryrun", "-c", "x.cu", "-o", os.devnull]
    said = subprocess.run(command, capture_output=True, text=True).stderr
    return [f"-L{top}/lib64" for top in re.findall(r"^#\$ TOP=(.+)$", said, re.M)]


def _explain(output, log):
    """The compiler's dump -> one message."""
    if "unsupported GNU version" in output or "unsupported clang version" in output:
        return (
            "the host compiler is too new for nvcc. Install an older one (apt install g++-13) "
            f"and set CC=gcc-13 CXX=g++-13. Log: {log}"
        )
    last = "\n    ".join(output.strip().splitlines()[-15:])
    return f"the compiler failed; its last lines:\n    {last}\n  All of it: {log}"


def _say(line):
    print(f"ops: {line}", file=sys.stderr, flush=True)
