"""A compiler that remembers, for builds of many copies of the repository.

    CXX="python tests/harness/compile_once.py FOLDER c++"

A mutant changes one file of a copy of the repository, and all other files need not be compiled
anew. An object is taken from FOLDER if its source, the headers beside the kernels and the flags
(but for paths, which every copy has its own of) are those of an earlier call.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path


def key_of(words: list[str], source: Path) -> str:
    """A hash of all that the object depends on. `words` are the compiler's call."""
    text = source.read_text()
    emulated = re.fullmatch(r'#include "(.+)"\n', text)  # all that jit.py writes for a .cu
    text = Path(emulated[1]).read_text() if emulated else text
    folders = [Path(word[2:]) for word in words if word.startswith("-I")]
    headers = [h.read_text() for f in folders if f.name == "ops" for h in sorted(f.glob("*.h"))]
    # what differs from copy to copy: folders, names of files, and torch's name for the library
    other = re.compile(r"/|EXTENSION_NAME|\.(o|d|cpp)$")
    flags = [word for word in words if not other.search(word)]
    return hashlib.sha256("\0".join([source.name, text, *headers, *flags]).encode()).hexdigest()


def main(folder: str, *words: str) -> int:
    """Compiles, or copies what was compiled before; other calls (linking) go to the compiler."""
    if "-c" not in words:
        return subprocess.run(words).returncode
    source, target = (Path(words[words.index(flag) + 1]) for flag in ("-c", "-o"))
    kept = Path(folder, key_of(list(words), source))
    if not kept.exists():
        if code := subprocess.run(words).returncode:
            return code
        shutil.copyfile(target, f"{kept}.{os.getpid()}")
        os.replace(f"{kept}.{os.getpid()}", kept)
    shutil.copyfile(kept, target)
    target.with_suffix(".o.d").write_text(f"{target}:\n")  # ninja wants its list of headers
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
