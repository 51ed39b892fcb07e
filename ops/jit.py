"""Compiles the kernels on first use and loads them; later runs load the finished library.

    build("cpu", ["match.cpp", ...])            g++
    build("emulate", ["match.cu", ...], emulate=True)   the CUDA sources by g++, through emulate.h
    build("cuda", ["match.cu", ...])            nvcc, for the cards of this machine

One folder holds the libraries of one name, one for each state of the sources. The folder's name
holds all else that a library depends on: torch, Python, compiler, flags, and the CPU's instruction
set (-march=native of another machine is an illegal instruction here) or the cards' architecture. A
file `built` in it holds the hash of the sources, so that a second import starts no compiler.
"""

import contextlib
import hashlib
import importlib.util
import logging
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import warnings
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


def build(name, sources, flags=(), *, emulate=False):
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
            raise BuildError(
                f"{path} is missing. If the op is new, write it; if it was there, `git checkout "
                f"ops/{path.name}` restores it"
            )
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
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / "in_use", "w")
    except OSError as error:
        remedy = "Remove it, or free some space"
        raise BuildError(f"{folder} cannot be written ({error}). {remedy}") from None
    with file:
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
    """Sources -> the library, by torch.utils.cpp_extension: ninja starts the compilers.

    It works in a folder of its own, so torch's lock, a plain file that a killed build leaves
    behind, stops nobody. Not all paths that it hands to a shell are quoted: where one has a blank
    or a quote, the compilers see it through links in a temporary folder.
    """
    names, log = " ".join(source.name for source in sources), library.parent / "build.log"
    given = os.environ.get("CXX")
    _checked_compiler()
    _check_ninja()
    flags, nvcc_flags = CXX_FLAGS + flags, NVCC_FLAGS + flags
    link_flags = [flag for flag in flags if flag.startswith("-fsanitize")]
    if cuda:
        nvcc = _nvcc()
        os.environ.setdefault("CUDA_HOME", str(nvcc.parents[1]))  # read when it is imported
        link_flags += _cudart(nvcc)
        nvcc_flags += [f"-gencode=arch=compute_{a[3:]},code={a}" for a in _architectures()]
    _say(f"compiling {names}, once: about half a minute, with nvcc two (log: {log})")
    started = time.monotonic()
    where = library.parent if _is_plain(library.parent) else None  # None: the system's folder
    with tempfile.TemporaryDirectory(prefix="work-", dir=where) as work, _progress(started):
        work = Path(work)
        name = re.sub(r"\W", "_", work.name)  # torch renames the second library of one name
        if not _is_plain(OPS):
            (work / "ops").symlink_to(OPS)
            flags, nvcc_flags = (
                [flag.replace(str(OPS), f"{work}/ops") for flag in some]
                for some in (flags, nvcc_flags)
            )
        seen = [_seen_source(work, i, source, cuda) for i, source in enumerate(sources)]
        try:
            _one_word_compiler(work)
            _load_extension(
                name,
                [str(source) for source in seen],
                extra_cflags=flags,
                extra_cuda_cflags=nvcc_flags,
                extra_ldflags=link_flags,
                build_directory=str(work),
                with_cuda=cuda,
                is_python_module=False,
            )
        except (RuntimeError, subprocess.CalledProcessError) as error:
            log.write_text(str(error))
            raise BuildError(_explain(str(error), log)) from None
        finally:
            if given is not None:
                os.environ["CXX"] = given
        shutil.copyfile(work / f"{name}.so", library.with_suffix(".part"))
        os.replace(library.with_suffix(".part"), library)
    log.write_text(f"built {names} with {flags}\n")
    _say(f"compiled in {time.monotonic() - started:.0f} s")


def _load_extension(*arguments, **options):
    """torch.utils.cpp_extension.load, without the loading: `build` does that.

    torch's warnings about its own tools are left out; an error says what is wrong. So is its lock,
    which fails where a file system has none: the folder is this process's own.
    """
    from torch.utils import cpp_extension  # slow to import, and only a build needs it

    loading, level = torch.ops.load_library, logging.root.manager.disable
    locks = {n: vars(cpp_extension)[n] for n in TORCHS_LOCKS if n in vars(cpp_extension)}
    logging.disable(logging.WARNING)
    try:
        torch.ops.load_library = lambda path: None
        vars(cpp_extension).update(dict.fromkeys(locks, _NoLock))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            cpp_extension.load(*arguments, **options)
    finally:
        torch.ops.load_library = loading
        vars(cpp_extension).update(locks)
        logging.disable(level)


TORCHS_LOCKS = ("FileBaton", "FileLock")  # until torch 2.13, from 2.14 on


class _NoLock(contextlib.nullcontext):
    """In place of torch's lock."""

    def try_acquire(self):
        return True

    def release(self):
        pass


def _one_word_compiler(work):
    """torch takes CXX for one word: of several, such as `ccache g++`, a script makes one."""
    if len(compiler()) > 1:
        script = work / "cxx"
        script.write_text(f'#!/bin/sh\nexec {shlex.join(compiler())} "$@"\n')
        script.chmod(0o755)
        os.environ["CXX"] = str(script)


def _is_plain(path):
    """Whether neither ninja nor a shell sees anything special in a path."""
    return re.fullmatch(r"[\w./+-]+", str(path), re.A) is not None


def _seen_source(work, number, source, cuda):
    """A source as the compilers see it: itself, a link to it, or what includes it.

    ninja's rule for .cu is nvcc; the emulated ones go to the C++ compiler in a .cpp.
    """
    if not _is_plain(source):
        folder = work / f"source{number}"
        folder.symlink_to(source.parent)
        source = folder / source.name
    if source.suffix == ".cu" and not cuda:
        wrapper = work / f"{source.stem}_emulated.cpp"
        wrapper.write_text(f'#include "{source}"\n')
        return wrapper
    return source


@contextlib.contextmanager
def _progress(started):
    """Tells every 20 seconds that it still compiles; on a terminal each second, in one line."""
    is_live, done = sys.stderr is not None and sys.stderr.isatty(), threading.Event()

    def tell():
        while not done.wait(1 if is_live else 20):
            text = f"ops: still compiling, {time.monotonic() - started:.0f} s"
            end = "\r" if is_live else "\n"
            print(text, end=end, file=sys.stderr, flush=True)

    teller = threading.Thread(target=tell, daemon=True)
    teller.start()
    try:
        yield
    finally:
        done.set()
        teller.join()


def _check_ninja():
    """torch builds with ninja: it may be installed in an environment that is not activated."""
    if not shutil.which("ninja"):
        try:
            import ninja
        except ImportError:
            raise BuildError("no ninja. Install it: pip install ninja") from None
        os.environ["PATH"] += os.pathsep + ninja.BIN_DIR


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
