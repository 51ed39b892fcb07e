"""How the kernels get built: once, by one process, and with one clear message where it fails.

Most tests compile a file of one line, which takes a tenth of a second; the ones that start a
process copy ops/ into an empty folder, so that its build folder is empty as well.
"""

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
needs_compiler = pytest.mark.skipif(
    not shutil.which(os.environ.get("CXX", "c++")), reason="no C++ compiler"
)


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
    said = capfd.readouterr().err
    assert len(said.splitlines()) == 1
    assert "compiling tiny.cpp once" in said
    assert "if this hangs" in said
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
def test_the_lock_of_a_killed_build_is_mended(source):
    """torch's own lock file would make the next build wait for ever."""
    jit.build("tiny", [source])
    folder = next(p for p in source.parent.iterdir() if p.is_dir())
    (folder / "lock").touch()
    (folder / "built").write_text("half")
    assert jit.build("tiny", [source]).exists()
    assert not (folder / "lock").exists()


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


def test_no_ninja(source, monkeypatch):
    which = shutil.which
    monkeypatch.setattr(jit.shutil, "which", lambda x: None if x == "ninja" else which("python3"))
    monkeypatch.setitem(sys.modules, "ninja", None)
    with pytest.raises(BuildError, match="pip install ninja"):
        jit.build("tiny", [source])


@pytest.fixture
def fake_gpu(source, tmp_path, monkeypatch):
    """A machine with a card, torch for CUDA 13.0, and a CUDA_HOME to put an nvcc into."""
    which = shutil.which
    monkeypatch.setattr(jit.shutil, "which", lambda x: which(x) or sys.executable)
    monkeypatch.setattr(jit, "_architectures", lambda: ["sm_90"])
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr("torch.utils.cpp_extension.CUDA_HOME", str(tmp_path / "cuda"))
    (tmp_path / "cuda/bin").mkdir(parents=True)
    (tmp_path / "tiny.cu").touch()
    return tmp_path / "cuda/bin/nvcc"


def test_gpu_without_nvcc(fake_gpu, source):
    with pytest.raises(BuildError, match=r"a GPU but no nvcc.*toolkit 13\.0.*CUDA_HOME"):
        jit.build("tiny", [source.with_suffix(".cu")])


def test_nvcc_of_another_version(fake_gpu, source):
    fake_gpu.write_text("#!/bin/sh\necho Cuda compilation tools, release 11.8, V11.8.89\n")
    fake_gpu.chmod(0o755)
    with pytest.raises(BuildError, match=r"of CUDA 11\.8, torch of CUDA 13\.0.*CUDA_HOME"):
        jit.build("tiny", [source.with_suffix(".cu")])


def test_host_compiler_too_new(tmp_path):
    output = (
        "error: #error -- unsupported GNU version! gcc versions later than 15 are not supported!"
    )
    assert re.search(r"too new for nvcc.*CC=gcc", jit._explain(output, tmp_path / "log"))


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


def test_require_raises(tmp_path):
    process = start(tmp_path, "require", CXX="no-such-compiler")
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0
    assert re.search(r"BuildError: no C\+\+ compiler", err)


def test_modes(monkeypatch):
    monkeypatch.setattr(ops, "MODE", "fast")
    with pytest.raises(ValueError, match="SCRATCHDET_OPS=fast: expected one of auto, reference"):
        ops._load()
    monkeypatch.setattr(ops, "MODE", "reference")
    monkeypatch.setattr(ops, "build", lambda *args, **kwargs: pytest.fail("it built"))
    ops._load()


@pytest.mark.slow
@needs_compiler
def test_processes_that_start_together(tmp_path):
    """One compiles, the others wait for it; all end with the kernels."""
    processes = [start(tmp_path, "require") for _ in range(4)]
    ends = [process.communicate(timeout=600) for process in processes]
    assert [p.returncode for p in processes] == [0] * 4, ends
    assert all("- cpu" in out for out, _ in ends)
    assert sum(err.count("compiling") for _, err in ends) == 1


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
    """No ninja, no compiler, no torch.utils.cpp_extension: at most .2 s of CPU time."""
    code = (
        "import torch, time, sys; start = time.process_time(); import ops;"
        "print(time.process_time() - start, 'torch.utils.cpp_extension' in sys.modules)"
    )
    for _ in range(2):
        out, err = start(tmp_path, "require", code).communicate(timeout=600)
    seconds, imported = out.split()
    assert float(seconds) < 0.2, err
    assert imported == "False"
