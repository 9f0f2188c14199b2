"""The README and docs/: every code block runs or says why it can't, and what they name is there."""

import difflib
import re
import shlex
import subprocess
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import pytest
import test_architecture
from typer.testing import CliRunner

from hybrid_moe import __version__, backends
from hybrid_moe.cli import app

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
OTHERS = ("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "benchmarks/README.md")
DOCUMENTS = [*PAGES, *(ROOT / name for name in OTHERS)]
# Not code: maps, formats, pictures.
PLAIN = {"text", "mermaid"}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NOT_RUN = re.compile(r"<!-- not run: (\S.*) -->\n\Z")


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, the line before its text, and why it isn't run."""

    path: Path
    line: int
    language: str
    text: str
    not_run: str | None


def blocks(path):
    text = path.read_text(encoding="utf-8")
    for match in FENCE.finditer(text):
        marker = NOT_RUN.search(text, 0, match.start())
        line = text.count("\n", 0, match.start(2))
        yield Block(path, line, match[1], match[2], marker[1] if marker else None)


def ids(path):
    return str(path.relative_to(ROOT))


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder to write into that has what the commands of the documents read."""
    folder = tmp_path / "work"
    folder.mkdir()
    for name in ("benchmarks", "policies", "examples"):
        (folder / name).symlink_to(ROOT / name)
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.parametrize("path", PAGES, ids=ids)
def test_the_blocks_run(path, workplace, monkeypatch):
    monkeypatch.setattr("hybrid_moe.cli.common.out.width", 120)
    monkeypatch.setattr(backends, "BACKENDS", dict(backends.BACKENDS))  # a page registers one
    namespace = {}
    for block in blocks(path):
        if block.language in PLAIN or block.not_run:
            continue
        assert block.language in ("python", "console"), f"{ids(path)}:{block.line}: name the block's language"
        if block.language == "python":
            # The file's own lines, so that an error shows where it is.
            code = compile("\n" * block.line + block.text, str(path), "exec")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a GPU without a policy
                exec(code, namespace)
        else:
            run_console(block)


def run_console(block):
    """Run each command; where lines of output follow, they have to be in its output, ``...`` standing for any."""
    for command, expected in commands(block.text):
        words = shlex.split(command, comments=True)
        where = f"{ids(block.path)}:{block.line}: {command}"
        if words[0] == "make":
            assert words[1] in targets(), where
            continue
        assert words[0] == "hybrid-moe", f"{where}: runs nothing that this test knows: mark the block as not run"
        result = CliRunner().invoke(app, words[1:])
        assert result.exit_code == 0, f"{where}\n{result.output}\n{result.exception!r}"
        if expected:
            pattern = ".*".join(map(re.escape, re.split(r"^\.\.\.\n", expected, flags=re.MULTILINE)))
            assert re.fullmatch(pattern, result.output, re.DOTALL), f"{where}\n{result.output}"


def commands(text):
    """Each command with the output that is shown after it; with output, commands start with ``$``."""
    lines = text.replace("\\\n", " ").splitlines(keepends=True)
    if not any(line.startswith("$ ") for line in lines):
        return [(line, "") for line in lines if line.strip()]
    found = []
    for line in lines:
        if line.startswith("$ "):
            found.append((line[2:], ""))
        else:
            found[-1] = (found[-1][0], found[-1][1] + line)
    return found


def targets():
    return re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_what_is_not_run_says_why():
    for path in PAGES:
        for block in blocks(path):
            if block.not_run is not None:
                assert block.language not in PLAIN and len(block.not_run.split()) > 1, f"{ids(path)}:{block.line}"
    # Each marker stands before a block.
    for path in PAGES:
        text = path.read_text()
        assert text.count("<!-- not run:") == sum(block.not_run is not None for block in blocks(path)), ids(path)


def test_a_block_that_fails_or_says_something_else_is_found():
    page = ROOT / "README.md"

    def console(text):
        run_console(Block(page, 1, "console", text, None))

    console(f"$ hybrid-moe --version\n{__version__}\n")
    console("$ hybrid-moe explain --device nvidia_b200 --num-tokens 16\n...\nregime 14-32, expected regret 5.9%\n...\n")
    for wrong in ("hybrid-moe explain --device x\n", "$ hybrid-moe --version\n0.0\n", "rm -r x\n", "make nothing\n"):
        with pytest.raises(AssertionError):
            console(wrong)


def anchors(path):
    """As a forge makes them of headings."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", path.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCUMENTS, ids=ids)
def test_links_lead_somewhere(path):
    text = FENCE.sub("", path.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        file, _, anchor = target.partition("#")
        assert "://" not in target, f"{ids(path)} links to {target}"
        linked = (path.parent / file) if file else path
        assert linked.exists(), f"{ids(path)} links to {target}"
        if anchor:
            assert anchor in anchors(linked), f"{ids(path)} links to {target}"


def test_every_page_of_docs_is_linked_from_the_readme():
    text = (ROOT / "README.md").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert f"(docs/{page.name})" in text, page.name


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().split()) <= 1300


def test_the_map_of_the_code_is_whole():
    """docs/architecture.md names every package, and no module that isn't there."""
    (code_map,) = (b.text for b in blocks(ROOT / "docs/architecture.md") if b.text.startswith("hybrid_moe/\n"))
    names = {path.name for path in (ROOT / "hybrid_moe").rglob("*.py")} | {p.name for p in (ROOT / "docs").iterdir()}
    names |= {path.name for path in (*(ROOT / "tests").iterdir(), *(ROOT / "benchmarks").iterdir())}
    for named in re.findall(r"\b(\w+\.(?:py|md))\b", code_map):
        assert named in names, f"the map names {named}"
    for package in (ROOT / "hybrid_moe").rglob("__init__.py"):
        assert f"{package.parent.name}/" in code_map, f"the map lacks {package.parent}"


def test_the_order_of_dependencies_is_the_one_that_is_checked():
    (order,) = (b.text for b in blocks(ROOT / "docs/architecture.md") if b.text.startswith("cli ->"))
    places = [test_architecture.SPINE.index(part) for part in re.findall(r"\w+", order)]
    assert places == sorted(places)


def test_the_table_of_backends_is_whole():
    from hybrid_moe.learn.report.letters import assign_letters

    rows = dict(re.findall(r"^\| (\w) \| `([^`]+)`", (ROOT / "docs/backends.md").read_text(), re.MULTILINE))
    assert rows == {letter: str(c) for c, letter in assign_letters(backends.candidates()).items()}


def test_the_api_reference_is_current():
    made = subprocess.run([sys.executable, ROOT / "docs/make_api.py", "-"], capture_output=True, text=True, check=True)
    there = (ROOT / "docs/api.md").read_text(encoding="utf-8")
    difference = "\n".join(difflib.unified_diff(there.splitlines(), made.stdout.splitlines(), lineterm="", n=1))
    assert there == made.stdout, f"make docs writes docs/api.md again:\n{difference}"
