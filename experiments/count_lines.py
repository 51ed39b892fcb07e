"""How long and how readable the lesson is, as counts that a later change can be held against.

    python -m experiments.count_lines                 the lesson files, as a Markdown table
    python -m experiments.count_lines FILE [FILE ...]     any other Python files, in the same counts

lines: all; code: without blank lines, comments and docstrings; words/code: lines of comments and
docstrings per line of code; width: mean characters of a line of code; raise, if: statements (and
conditional expressions); longest: the function with most lines, docstring included.
"""

import argparse
import ast
import io
import tokenize
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
LESSON = ("scratchdet.py", "data.py", "train.py", "eval.py", "metrics.py")
MAIN_PATH = (*LESSON, "detect.py", "ops/reference.py")


class Counts(NamedTuple):
    lines: int
    code: int
    words: int
    characters: int
    raises: int
    ifs: int
    longest: int
    where: str


def count(path: Path) -> Counts:
    """The counts of one Python file."""
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    code: set[int] = set()
    comments: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            comments.add(token.start[0])
        elif token.type not in (tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
                                tokenize.ENDMARKER):  # fmt: skip
            code |= set(range(token.start[0], token.end[0] + 1))
    docstrings: set[int] = set()
    functions = [(0, "-")]
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(
            node
        ):
            docstrings |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
        if isinstance(node, ast.FunctionDef):
            functions.append((node.end_lineno - node.lineno + 1, node.name))
    code -= docstrings
    blank = {n for n, line in enumerate(text.splitlines(), 1) if not line.strip()}
    code, docstrings = code - blank, docstrings - blank
    lines = text.splitlines()
    return Counts(
        len(lines), len(code), len(docstrings | comments),
        sum(len(lines[n - 1].strip()) for n in code),
        sum(isinstance(node, ast.Raise) for node in ast.walk(tree)),
        sum(isinstance(node, (ast.If, ast.IfExp)) for node in ast.walk(tree)),
        *max(functions),
    )  # fmt: skip


def table(files: dict[str, Path]) -> str:
    """The counts as Markdown, with a last row that adds them up."""
    rows = {name: count(path) for name, path in files.items()}
    total = [sum(column) for column in list(zip(*rows.values(), strict=True))[:6]]
    rows["together"] = Counts(*total, *max((r.longest, r.where) for r in rows.values()))
    lines = ["| file | lines | code | words/code | width | raise | if | longest function |",
             "|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for name, c in rows.items():
        ratio, width = c.words / max(1, c.code), c.characters / max(1, c.code)
        cells = (name, f"{c.lines:,}", f"{c.code:,}", f"{ratio:.2f}", f"{width:.0f}", c.raises)
        lines.append(f"| {' | '.join(map(str, cells))} | {c.ifs} | `{c.where}` {c.longest} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("files", nargs="*", metavar="FILE", help="default: the lesson")
    args = parser.parse_args(argv)
    if args.files:
        print(table({name: Path(name) for name in args.files}))
        return
    print(table({name: ROOT / name for name in LESSON}))
    print()
    print(table({name: ROOT / name for name in MAIN_PATH}))


if __name__ == "__main__":
    main()
