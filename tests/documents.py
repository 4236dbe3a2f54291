"""README.md and docs/ as data: their code blocks and their tables."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).absolute().parent.parent
README: Final = ROOT / "README.md"
PAGES: Final = (README, *sorted((ROOT / "docs").glob("*.md")))

_FENCE = re.compile(r"^( *)```([a-z]+)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
_FILE = re.compile(r"# ([\w.]+\.py)\n")
_CELL = re.compile(r"(?<!\\)\|")


@dataclass(frozen=True)
class Block:
    """A fenced block. `file`: the name in its first line, when it is a whole file."""

    page: Path
    line: int
    language: str
    text: str

    @property
    def file(self) -> str | None:
        found = _FILE.match(self.text)
        return found[1] if found else None

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"


def blocks(page: Path, *languages: str) -> list[Block]:
    """The fenced blocks of a page in these languages, in their order."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in _FENCE.finditer(text):
        indent, language, body = match.groups()
        if language in languages:
            lines = [line.removeprefix(indent) for line in body.splitlines(keepends=True)]
            found.append(Block(page, text.count("\n", 0, match.start()) + 1, language, "".join(lines)))
    return found


def all_blocks(*languages: str) -> list[Block]:
    return [block for page in PAGES for block in blocks(page, *languages)]


def marked(page: Path, name: str) -> str:
    """What stands between `<!-- name -->` and `<!-- end of name -->`."""
    text = page.read_text(encoding="utf-8")
    begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
    assert text.count(begin) == text.count(end) == 1, f"{page.name} marks {name!r} not exactly once"
    return text.partition(begin)[2].partition(end)[0]


def rows(text: str) -> list[list[str]]:
    """The cells of all rows of the tables in a text, headings left out."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    rules = {index for index, line in enumerate(lines) if set(line) <= set("|- ")}
    kept = [line for index, line in enumerate(lines) if index not in rules and index + 1 not in rules]
    return [[cell.strip() for cell in _CELL.split(line)[1:-1]] for line in kept]


def code(cell: str) -> list[str]:
    """What a cell shows as code."""
    return re.findall(r"`([^`]+)`", cell)


def names(text: str) -> set[str]:
    """The names that the first column of a text's tables explains: `Session.of(request)` is `of`."""
    found = (re.sub(r"\(.*", "", item).removeprefix("await ") for row in rows(text) for item in code(row[0]))
    return {name.rpartition(".")[2] for name in found}
