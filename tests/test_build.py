"""How the kernels get built: once, by one process, and with one clear message where it fails.

Most tests compile a file of one line, which takes a tenth of a second; the ones that start a
process copy ops/ into an empty folder, so that its build folder is empty as well.
"""

import errno
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ops
from ops import BuildError, jit

ROOT = Path(ops.__file__).parents[1]
needs_compiler = pytest.mark.skipif(not shutil.which(jit.compiler()[0]), reason="no C++ compiler")


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A C++ file of one line, built into an empty folder."""
    monkeypatch.setattr(jit, "_root", lambda: tmp_path)
    path = tmp_path / "tiny.cpp"
    path.write_text("int tiny() { return 1; }\n")
    return path


def forbid_compiling(monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("it compiled again")

    monkeypatch.setattr(jit, "_compile", fail)


@needs_compiler
def test_builds_once_and_again_after_a_change(source, monkeypatch, capfd):
    library = jit.build("tiny", [source])
    assert library.exists()
    first, last = [line for line in capfd.readouterr().err.splitlines() if "ops:" in line]
    assert "compiling tiny.cpp, once" in first
    assert re.search(r"compiled in \d+ s", last)
    with monkeypatch.context() as patch:
        forbid_compiling(patch)
        assert jit.build("tiny", [source]) == library
    assert capfd.readouterr().err == ""
    source.write_text("int tiny() { return 2; }\n")
    with monkeypatch.context() as patch:
        forbid_compiling(patch)
        with pytest.raises(AssertionError, match="again"):
            jit.build("tiny", [source])


@needs_compiler
def test_a_compile_error_is_short_and_names_the_log(source):
    source.write_text("\n".join(["// many lines"] * 50 + ["int tiny() { return nonsense; }"]))
    with pytest.raises(BuildError, match="nonsense") as caught:
        jit.build("tiny", [source])
    log = Path(re.search(r"All of it: (\S+)", str(caught.value))[1])
    assert "nonsense" in log.read_text()
    assert len(str(caught.value).splitlines()) <= 17
    source.write_text("int tiny() { return 1; }\n")
    assert jit.build("tiny", [source]).exists()  # and mending it is all it takes


@needs_compiler
def test_what_a_killed_build_leaves_is_no_library(source):
    """It was killed while it compiled, or before it noted what it had built."""
    library = jit.build("tiny", [source])
    (library.parent / "work-of-a-killed-build").mkdir()
    (library.parent / "lock").touch()
    library.unlink()  # this process has it open, and would end in a bus error if it were cut
    library.write_text("half")
    (library.parent / "built").write_text("half")
    assert jit.build("tiny", [source]) == library
    assert library.read_bytes()[:4] != b"half"


@needs_compiler
@pytest.mark.parametrize("name", ["My Projects/scratch det (2)", "it's", 'a "b" $HOME & c;#'])
def test_any_folder_name(tmp_path, monkeypatch, name):
    """The compilers get their arguments without a shell between: nothing has to be quoted."""
    folder = tmp_path / name
    folder.mkdir(parents=True)
    shutil.copy(ROOT / "ops/iou.h", folder)
    monkeypatch.setattr(jit, "OPS", folder)
    monkeypatch.setattr(jit, "CXX_FLAGS", ["-std=c++20", f"-I{folder}"])
    (folder / "tiny.cpp").write_text(
        '#include "iou.h"\nfloat tiny() { return area({0, 0, 1, 1}); }\n'
    )
    library = jit.build("tiny", ["tiny.cpp"])
    assert library.parent.parent == folder.parent / "build"


@needs_compiler
@pytest.mark.parametrize("wraps", ["ccache g++", "env VARIABLE=1 c++"])
def test_a_compiler_of_two_words(source, tmp_path, monkeypatch, wraps):
    ccache = tmp_path / "bin/ccache"
    ccache.parent.mkdir()
    ccache.write_text('#!/bin/sh\nexec "$@"\n')
    ccache.chmod(0o755)
    monkeypatch.setenv("PATH", f"{ccache.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("CXX", wraps)
    assert jit.build("tiny", [source]).exists()


@needs_compiler
@pytest.mark.parametrize("error", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks(source, monkeypatch, error):
    def fail(*_):
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr("fcntl.flock", fail)
    assert jit.build("tiny", [source]).exists()


@needs_compiler
def test_a_full_disk_is_one_message(source, monkeypatch):
    def fail(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(jit.os, "replace", fail)
        with pytest.raises(BuildError, match="cannot be written .*No space left"):
            jit.build("tiny", [source])
    monkeypatch.setattr(Path, "mkdir", fail)
    with pytest.raises(BuildError, match="cannot be written .*No space left.*free some space"):
        jit.build("tiny", [source])


def test_folder_names_tell_builds_apart(monkeypatch):
    name = jit._folder_name("cpu", [], False)
    assert torch.__version__ in name
    assert f"py{sys.version_info.major}{sys.version_info.minor}" in name
    assert jit._folder_name("cpu", ["-g"], False) != name
    monkeypatch.setattr(jit, "_cpu", lambda: "flags: another CPU")
    assert jit._folder_name("cpu", [], False) != name
    monkeypatch.setattr(jit, "_architectures", lambda: ["sm_80", "sm_90"])
    assert "sm_80_sm_90" in jit._folder_name("cuda", [], True)


def test_no_compiler(source, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(BuildError, match=r"no C\+\+ compiler \('no-such-compiler'.*Install.*CXX"):
        jit.build("tiny", [source])


@pytest.fixture
def fake_gpu(source, tmp_path, monkeypatch):
    """A machine with a card, torch for CUDA 13.0, and a CUDA_HOME to put an nvcc into."""
    monkeypatch.setattr(jit, "_architectures", lambda: ["sm_90"])
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    (tmp_path / "cuda/bin").mkdir(parents=True)
    (tmp_path / "tiny.cu").touch()
    return tmp_path / "cuda/bin/nvcc"


def test_gpu_without_nvcc(fake_gpu, source, monkeypatch):
    """torch's own packages have no compiler; the message names the command that brings one."""
    pip = r'a GPU but no nvcc.*pip install "cuda-toolkit\[nvcc,cudart,cccl\]==13\.0\.\*".*CUDA_HOME'
    with pytest.raises(BuildError, match=pip):
        jit.build("tiny", [source.with_suffix(".cu")])
    monkeypatch.setattr(torch.version, "cuda", "12.6")
    with pytest.raises(BuildError, match=r"no nvcc. Install the CUDA toolkit 12\.6.*CUDA_HOME"):
        jit.build("tiny", [source.with_suffix(".cu")])
    monkeypatch.setattr(torch.version, "cuda", None)  # ROCm: torch.cuda answers for AMD's cards
    with pytest.raises(BuildError, match="another kind of GPU"):
        jit.build("tiny", [source.with_suffix(".cu")])


def test_nvcc_from_pip(fake_gpu, tmp_path, monkeypatch):
    """nvidia/cu13/bin/nvcc, and the runtime beside it, which has no name without its number."""
    monkeypatch.delenv("CUDA_HOME")
    monkeypatch.setattr(jit.shutil, "which", lambda _: None)
    nvcc = tmp_path / "site-packages/nvidia/cu13/bin/nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && echo "release 13.0, V13.0.88"\n'
        f'echo "#$ TOP={nvcc.parent}/.." >&2\n'
    )
    nvcc.chmod(0o755)
    runtime = nvcc.parents[1] / "lib/libcudart.so.13"
    runtime.parent.mkdir()
    runtime.touch()
    monkeypatch.syspath_prepend(tmp_path / "site-packages")
    monkeypatch.setattr(
        jit,
        "_places_of_nvcc",
        lambda major, real=jit._places_of_nvcc: [
            place for place in real(major) if tmp_path in place.parents
        ],
    )  # fmt: skip  (this machine may have one of its own)
    assert jit._nvcc() == nvcc
    assert Path(jit._cudart(nvcc)[0]).resolve() == runtime


def test_nvcc_of_another_version(fake_gpu, source):
    fake_gpu.write_text("#!/bin/sh\necho Cuda compilation tools, release 11.8, V11.8.89\n")
    fake_gpu.chmod(0o755)
    with pytest.raises(BuildError, match=r"is of CUDA 11\.8, torch of CUDA 13\.0.*CUDA_HOME"):
        jit.build("tiny", [source.with_suffix(".cu")])


def test_host_compiler_too_new(tmp_path):
    output = (
        "error: #error -- unsupported GNU version! gcc versions later than 15 are not supported!"
    )
    assert re.search(r"too new for nvcc.*CXX=g\+\+", jit._explain(output, tmp_path / "log"))


def test_missing_source(source):
    with pytest.raises(BuildError, match="absent.cpp is missing"):
        jit.build("tiny", [source.with_name("absent.cpp")])


def test_read_only_repository_builds_in_the_users_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(jit, "OPS", Path("/proc/ops"))  # nobody can write there
    assert jit._root() == tmp_path / "scratchdet"
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc")
    with pytest.raises(BuildError, match="XDG_CACHE_HOME"):
        jit._root()
    monkeypatch.delenv("XDG_CACHE_HOME")

    def nameless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(jit.Path, "home", nameless)  # no HOME, and a uid without a name
    with pytest.raises(BuildError, match="XDG_CACHE_HOME"):
        jit._root()
    monkeypatch.setattr(jit, "OPS", tmp_path / "ops")
    assert jit._root() == tmp_path / "build"


# ------------------------------------------------------------------------------- SCRATCHDET_OPS

USE = (
    "import torch, ops; b = torch.rand(5, 4); print(ops.describe());"
    "print(ops.nms(b, torch.rand(5)).dtype, ops.COMPILED)"
)


def start(folder, mode, code=USE, **variables):
    """A process that imports ops in a copy of the repository without a build."""
    if not (folder / "ops").exists():
        shutil.copytree(ROOT / "ops", folder / "ops")
    variables = {**os.environ, "SCRATCHDET_OPS": mode, "OMP_NUM_THREADS": "1", **variables}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen([sys.executable, "-c", code], cwd=folder, env=variables, **pipes)


def test_auto_falls_back_with_one_message(tmp_path):
    process = start(tmp_path, "auto", CXX="no-such-compiler")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert out.splitlines()[0] == f"ops: {' '.join(ops.NAMES)} - plain PyTorch"
    assert "torch.bool {'cpu': False, 'cuda': False}" in out
    assert err.count("ops:") == 1
    for part in ("no-such-compiler", "Install", "plain PyTorch", "SCRATCHDET_OPS=reference"):
        assert part in err


def test_require_raises(tmp_path, monkeypatch):
    monkeypatch.setattr(ops, "MODE", "require")
    monkeypatch.setattr(jit, "OPS", shutil.copytree(ROOT / "ops", tmp_path / "ops"))  # not built
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(BuildError, match=r"no C\+\+ compiler"):
        ops._load()


@pytest.mark.slow
def test_without_docstrings_and_assertions(tmp_path):
    process = start(tmp_path, "reference", PYTHONOPTIMIZE="2")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "torch.bool" in out


def test_modes(monkeypatch):
    monkeypatch.setattr(ops, "MODE", "fast")
    with pytest.raises(ValueError, match="SCRATCHDET_OPS=fast: expected one of auto, reference"):
        ops._load()
    monkeypatch.setattr(ops, "MODE", "reference")
    monkeypatch.setattr(ops, "build", lambda *args, **kwargs: pytest.fail("it built"))
    ops._load()


def test_an_unknown_mode_is_one_line(tmp_path):
    process = start(tmp_path, "bogus")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2
    assert re.fullmatch(r"error: SCRATCHDET_OPS=bogus: expected one of auto, refer.*\n", err)


@pytest.mark.slow
@needs_compiler
def test_processes_that_start_together(tmp_path):
    """One compiles, the others wait for it; all end with the kernels."""
    processes = [start(tmp_path, "require") for _ in range(4)]
    ends = [process.communicate(timeout=600) for process in processes]
    assert [p.returncode for p in processes] == [0] * 4, ends
    assert all("- cpu" in out for out, _ in ends)
    assert sum(err.count("once: about") for _, err in ends) == 1


@pytest.mark.slow
@needs_compiler
def test_a_killed_build_harms_nobody(tmp_path):
    process = start(tmp_path, "require")
    assert "compiling" in process.stderr.readline()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    after = start(tmp_path, "require")
    out, err = after.communicate(timeout=600)
    assert after.returncode == 0, err
    assert "- cpu" in out


@pytest.mark.slow
@needs_compiler
def test_a_later_import_is_quick(tmp_path):
    """No compiler, no torch.utils.cpp_extension: at most .2 s of CPU time."""
    code = (
        "import torch, time, sys; start = time.process_time(); import ops;"
        "print(time.process_time() - start, 'torch.utils.cpp_extension' in sys.modules)"
    )
    for _ in range(2):
        out, err = start(tmp_path, "require", code).communicate(timeout=600)
    seconds, imported = out.split()
    assert float(seconds) < 0.2, err
    assert imported == "False"
