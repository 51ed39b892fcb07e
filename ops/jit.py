"""Compiles the kernels on first use and loads them; later runs load the finished library.

    build("cpu", ["match.cpp", ...])            g++
    build("emulate", ["match.cu", ...], emulate=True)   the CUDA sources by g++, through emulate.h
    build("cuda", ["match.cu", ...])            nvcc, for the cards of this machine

One folder holds one library, and its name holds all that a library depends on but its sources:
torch, Python, compiler, flags, and the CPU's instruction set (-march=native of another machine is
an illegal instruction here) or the cards' architecture. A file `built` in it holds the hash of
the sources, so that a second import starts no compiler.

The compilers are started here, not through torch.utils.cpp_extension: arguments need no quotes, so
the repository may lie in "My Projects (2)"; no ninja is needed; and a killed build leaves no lock.
"""

import contextlib
import hashlib
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path

import torch

OPS = Path(__file__).resolve().parent
TORCH = Path(torch.__file__).resolve().parent
# -ffp-contract=off, --fmad=false: a fused multiply-add rounds once where the reference rounds
# twice. The two -fno only let comparisons and selects be vectorised; they change no result.
CXX_FLAGS = ["-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
CXX_FLAGS += ["-std=c++20", "-Wall", f"-I{OPS}"]
NVCC_FLAGS = ["-O3", "--fmad=false", "-std=c++20", "-lineinfo", "-DUSE_CUDA", f"-I{OPS}"]
INCLUDES = ("include", "include/torch/csrc/api/include")
TORCH_FLAGS = [part for path in INCLUDES for part in ("-isystem", str(TORCH / path))]


class BuildError(RuntimeError):
    """Cause and remedy of a library that could not be built or loaded."""


class CompilerFailed(RuntimeError):
    """The command, and what it said."""


def build(name, sources, flags=(), *, emulate=False, load=True):
    """Compile `sources` (relative to ops/, or absolute) into one library and load it.

    `flags` are added for every compiler, to the link as well where they start with -fsanitize.
    `emulate` gives .cu files to the C++ compiler, with SCRATCHDET_EMULATE defined: see emulate.h.
    Returns the library's path; raises BuildError. Processes that arrive together wait for one.
    """
    sources = [OPS / source for source in sources]
    flags, cuda = list(flags), not emulate and any(s.suffix == ".cu" for s in sources)
    if emulate:
        flags += ["-DSCRATCHDET_EMULATE", "-Wno-unknown-pragmas"]
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
            try:
                _compile(library, sources, flags, cuda=cuda)
                stamp.write_text(digest)
            except OSError as error:  # such as a full disk
                raise BuildError(f"{folder} cannot be written ({error})") from error
        if load:
            try:
                torch.ops.load_library(library)
            except OSError as error:
                message = f"{library} does not load ({error}). Remove it: rm -r {folder}"
                raise BuildError(message) from error
    return library


def _root():
    """<repo>/build, or a cache of the user's where the repo is read-only."""
    roots, cache = [OPS.parent / "build"], os.environ.get("XDG_CACHE_HOME")
    with contextlib.suppress(RuntimeError):  # no HOME, and a user without a name
        roots.append(Path(cache or Path.home() / ".cache") / "scratchdet")
    for root in roots:
        with contextlib.suppress(OSError):
            root.mkdir(parents=True, exist_ok=True)
            if os.access(root, os.W_OK):
                return root
    tried = " and ".join(map(str, roots))
    raise BuildError(f"{tried} cannot be written. Set XDG_CACHE_HOME to a folder that can")


def _folder_name(name, flags, cuda):
    """cuda-torch2.13.0+cu130-py311-sm_90-1a2b3c4d, cpu-torch2.13.0+cpu-py311-x86_64-5e6f7a8b."""
    target = "_".join(_architectures()) if cuda else platform.machine()
    parts = [_cpu(), *compiler(), *CXX_FLAGS, *NVCC_FLAGS, *flags]
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


@contextlib.contextmanager
def _only_one(folder):
    """One process at a time in `folder`. The system drops this lock when its holder is killed.

    Without locks (Windows; some network file systems) two processes may build at once: each in a
    folder of its own, and the library appears by a rename.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "in_use", "w") as file:
        with contextlib.suppress(ImportError, OSError):
            import fcntl

            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                _say(f"waiting for another process that compiles in {folder}")
                fcntl.flock(file, fcntl.LOCK_EX)
        yield


# ------------------------------------------------------------------------------ the compilers


def _compile(library, sources, flags, *, cuda):
    """Sources -> objects, as many at a time as there are cores -> the library."""
    cxx, nvcc = _checked_compiler(), _nvcc() if cuda else None
    names, log = " ".join(source.name for source in sources), library.parent / "build.log"
    _say(f"compiling {names}, once: about half a minute, with nvcc two (log: {log})")
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="work-", dir=library.parent) as work:
        objects = [f"{work}/{i}-{source.stem}.o" for i, source in enumerate(sources)]
        jobs = {}
        for source, out in zip(sources, objects, strict=True):
            command = [*cxx, *CXX_FLAGS, "-fPIC", "-x", "c++"]
            if cuda and source.suffix == ".cu":
                command = [*_nvcc_command(nvcc), *NVCC_FLAGS, "-Xcompiler", "-fPIC"]
            jobs[source.name] = [*command, *flags, *TORCH_FLAGS, "-c", str(source), "-o", out]
        linked = f"{work}/{library.name}"
        try:
            said = _run_all(jobs, started)
            said += [_run([*cxx, "-shared", *objects, *_link_flags(flags, nvcc), "-o", linked])]
        except CompilerFailed as error:
            log.write_text(str(error))
            raise BuildError(_explain(str(error), log)) from None
        os.replace(linked, library)
    log.write_text("\n".join(said))
    _say(f"compiled in {time.monotonic() - started:.0f} s")


def _link_flags(flags, nvcc):
    sanitizers = [flag for flag in flags if flag.startswith("-fsanitize")]
    cuda = ["-ltorch_cuda", *_cudart(nvcc)] if nvcc else []
    return [*sanitizers, f"-L{TORCH}/lib", "-ltorch_cpu", "-ltorch", "-lc10", *cuda]


def _run_all(jobs, started):
    """{name: command} -> what they said. Tells how far it is: a line that is rewritten on a
    terminal, elsewhere one a minute."""
    is_live = sys.stderr is not None and sys.stderr.isatty()
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        running = {pool.submit(_run, command): name for name, command in jobs.items()}
        waiting, shown = set(running), started
        while waiting:
            _, waiting = wait(waiting, 1 if is_live else 60, FIRST_COMPLETED)
            now = time.monotonic()
            left = ", ".join(running[job] for job in running if job in waiting)
            text = f"{now - started:.0f} s, {len(jobs) - len(waiting)} of {len(jobs)} done; {left}"
            if is_live:
                line = f"\rops: {text:<90.90}" if waiting else f"\r{'':95}\r"
                print(line, end="", file=sys.stderr, flush=True)
            elif waiting and now - shown >= 60:
                _say(text)
                shown = now
        return [job.result() for job in running]


def _run(command):
    """-> the command and what it said; CompilerFailed if it fails."""
    env = {**os.environ, "TMPDIR": tempfile.gettempdir()}  # nvcc dies of one that is not there
    pipes = dict(stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    done = subprocess.run(command, env=env, **pipes)
    said = f"{shlex.join(command)}\n{done.stdout.decode(errors='replace')}"
    if done.returncode:
        raise CompilerFailed(said)
    return said


def compiler():
    """CXX as a list, for it may be `ccache g++`; c++ where it is not set."""
    return shlex.split(os.environ.get("CXX", "")) or ["c++"]


def _checked_compiler():
    if os.name == "nt":
        raise BuildError("the kernels are built on Linux and macOS; on Windows use WSL")
    if not shutil.which(compiler()[0]):
        raise BuildError(
            f"no C++ compiler ({compiler()[0]!r} is not found). "
            "Install one (apt install g++; macOS: xcode-select --install) or set CXX"
        )
    return compiler()


def _nvcc():
    """An nvcc of the CUDA that torch was built for; BuildError says how to get one."""
    wanted = torch.version.cuda
    if wanted is None:
        raise BuildError("torch was built for another kind of GPU: the kernels are CUDA's")
    major, seen = wanted.split(".")[0], []
    for nvcc in _places_of_nvcc(major):
        version = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
        found = re.search(r"release (\d+)\.(\d+)", version)
        if found is None or found[1] == major:
            return nvcc
        seen.append(f"{nvcc} is of CUDA {found[1]}.{found[2]}")
    pip = f'pip install "cuda-toolkit[nvcc,cudart,cccl]=={major}.{wanted.split(".")[1]}.*"'
    remedy = f"Install the CUDA toolkit {wanted}, or set CUDA_HOME to one"
    if int(major) >= 13:  # before, nvcc was not on PyPI
        remedy = f"Install one: {pip}; or the CUDA toolkit {wanted}, and set CUDA_HOME to it"
    raise BuildError(
        f"{'; '.join(seen)}, torch of CUDA {wanted}. {remedy}"
        if seen
        else f"a GPU but no nvcc. {remedy}"
    )


def _places_of_nvcc(major):
    """CUDA_HOME's alone, if that is set; else the PATH's, the usual folder's, pip's."""
    if home := os.environ.get("CUDA_HOME"):
        places = [Path(home) / "bin/nvcc"]
    else:
        pip = importlib.util.find_spec("nvidia")
        pip = list(pip.submodule_search_locations or []) if pip else []
        places = [Path(shutil.which("nvcc") or "nvcc"), Path("/usr/local/cuda/bin/nvcc")]
        places += [Path(folder) / f"cu{major}/bin/nvcc" for folder in pip]
    return [place for place in places if place.is_file()]


def _nvcc_command(nvcc):
    cards = [f"-gencode=arch=compute_{a[3:]},code={a}" for a in _architectures()]
    host = ["-ccbin", compiler()[-1]] if os.environ.get("CXX") else []  # ccache g++: the g++
    return [str(nvcc), *cards, *host]


def _cudart(nvcc):
    """The CUDA runtime's library, if it is found: torch brings it along in any case. nvcc knows its
    own place, a script or a link of that name may not; pip's has no libcudart.so without a 13."""
    command = [nvcc, "--dryrun", "-c", "x.cu", "-o", os.devnull]
    said = subprocess.run(command, capture_output=True, text=True).stderr
    for top in re.findall(r"^#\$ TOP=(.+)$", said, re.M):
        for folder in ("lib64", "lib"):
            if found := sorted(Path(top, folder).glob("libcudart.so*")):
                return [str(found[0])]
    return []


def _explain(output, log):
    """The compiler's dump -> one message."""
    if "unsupported GNU version" in output or "unsupported clang version" in output:
        return (
            "the host compiler is too new for nvcc. Install an older one (apt install g++-13) "
            f"and set CXX=g++-13. Log: {log}"
        )
    last = "\n    ".join(output.strip().splitlines()[-15:])
    return f"the compiler failed; its last lines:\n    {last}\n  All of it: {log}"


def _say(line):
    print(f"ops: {line}", file=sys.stderr, flush=True)
