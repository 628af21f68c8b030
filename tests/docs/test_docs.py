"""What the documents say is true: their commands parse, their links lead somewhere, their pages match the code."""

from __future__ import annotations

import importlib.util
import re
import shlex
import subprocess
from pathlib import Path
from types import ModuleType

import pytest
import typer
import yaml

ROOT = Path(__file__).resolve().parents[2]
LISTED = subprocess.run(
    ["git", "ls-files", "-co", "--exclude-standard", "*.md"], cwd=ROOT, capture_output=True, text=True, check=True
)
DOCUMENTS = sorted(name for name in LISTED.stdout.splitlines() if (ROOT / name).exists())
"""Every Markdown file of the project, from the root."""
COLUMNS, README_LINES = 120, 160


def text_of(document: str) -> str:
    return (ROOT / document).read_text()


def test_the_documents_are_there() -> None:
    wanted = {"search", "classify", "results", "images", "commands", "columns-and-errors", "architecture"}
    assert {f"docs/{name}.md" for name in wanted} | {"README.md", "SECURITY.md", "CHANGELOG.md"} <= set(DOCUMENTS)


def long_lines(text: str) -> list[str]:
    """Give lines over 120 columns that could be broken: no table's, and more than one word or link."""
    found = []
    for line in text.splitlines():
        words = re.findall(r"(?:`[^`]*`|\[[^\]]*\]\([^)]*\)|\S)+", line.lstrip(" -*"))
        if len(line) > COLUMNS and not line.startswith("|") and len(words) > 1:
            found.append(line)
    return found


def test_no_line_is_too_long() -> None:
    assert long_lines("a " * 61) and not long_lines("| " * 61) and not long_lines(f"- [a]({'b' * 130})")
    assert {name: lines for name in DOCUMENTS if (lines := long_lines(text_of(name)))} == {}


def test_the_readme_is_short() -> None:
    assert len(text_of("README.md").splitlines()) <= README_LINES


def anchors(text: str) -> set[str]:
    """Give the anchors that GitHub makes of a page's headings."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", prose, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(document: str, text: str) -> list[str]:
    """Give the links that lead to no file, or to no heading of theirs."""
    found = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if not link.startswith(("http://", "https://")):
            path, _, anchor = link.partition("#")
            target = (ROOT / document).parent / path if path else ROOT / document
            if not target.exists() or (anchor and anchor not in anchors(target.read_text())):
                found.append(link)
    return found


def test_links_lead_somewhere() -> None:
    assert broken_links("README.md", "[a](docs/none.md) [b](docs/search.md#none) [c](#none)") == [
        *("docs/none.md", "docs/search.md#none", "#none")
    ]
    assert {name: links for name in DOCUMENTS if (links := broken_links(name, text_of(name)))} == {}


def commands_of(text: str) -> list[str]:
    """Give the lines of a document's shell blocks that run carray or a job, continued lines joined."""
    blocks = re.findall(r"^ *```bash\n(.*?)^ *```", text, flags=re.MULTILINE | re.DOTALL)
    lines = [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in lines if re.match(r"carray |python (-m )?(jobs|tests|carray)\b|make ", line)]


def check_command(line: str) -> None:
    """Parse a line as its program would, without running it."""
    from carray.__main__ import app

    words = shlex.split(line, comments=True)
    if words[0] == "make":
        targets = re.findall(r"^([a-z-]+):", text_of("Makefile"), flags=re.MULTILINE)
        assert {word for word in words[1:] if "=" not in word} <= set(targets), line
    elif words[:2] == ["python", "-m"]:
        assert importlib.util.find_spec(words[2]), line
    elif words[0] == "python":
        assert (ROOT / words[1]).exists(), line
    else:
        group = typer.main.get_command(app)
        words = words[1:]
        while hasattr(group, "commands"):  # `estimate` has commands of its own
            group = group.commands[words.pop(0)]
        group.make_context(line, words)
    for file in [word for word in words if word.startswith("jobs/")]:
        assert (ROOT / file).exists(), line


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_parse(document: str) -> None:
    for line in commands_of(text_of(document)):
        check_command(line)


@pytest.mark.parametrize(
    "line", ["carray tun --manifest m", "carray tune --manifst m", "make demos", "python jobs/x.py", "python -m jobs.x"]
)
def test_a_wrong_command_is_found(line: str) -> None:
    assert commands_of(f"```bash\n{line}\n```") == [line]
    with pytest.raises((Exception, SystemExit)):
        check_command(line)


def test_settings_files_in_documents_are_right() -> None:
    """The YAML of docs/search.md is a search, and `--set` names settings that exist."""
    from carray.core.settings import parse_settings
    from carray.search.space import TuneSettings

    (block,) = re.findall(r"^```yaml\n(.*?)^```", text_of("docs/search.md"), flags=re.MULTILINE | re.DOTALL)
    assert parse_settings(TuneSettings, yaml.safe_load(block)).families["cnn"].share == 0.4


def test_every_command_is_described() -> None:
    from carray.__main__ import app

    rows = re.findall(r"^\| `([a-z]+)` \|", text_of("docs/commands.md"), flags=re.MULTILINE)
    assert sorted(rows) == sorted(typer.main.get_command(app).commands)  # type: ignore[attr-defined]


def test_every_setting_that_a_table_names_exists() -> None:
    from carray.search.space import SearchSettings

    section = text_of("docs/search.md").partition("| setting of `search` |")[2].partition("\n\n")[0]
    named = {name for row in section.splitlines()[2:] for name in re.findall(r"`(\w+)`", row.split("|")[1])}
    assert len(named) > 10 and named <= set(SearchSettings.model_fields)


def test_columns_and_errors_are_those_of_the_code() -> None:
    writer = load("columns_and_errors")
    assert text_of("docs/columns-and-errors.md") == writer.page(), "run python tests/docs/columns_and_errors.py"


def load(name: str) -> ModuleType:
    """Import a module that lies beside this one."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def named_modules(text: str) -> set[str]:
    """Give the paths below carray/ that the drawing of the house names, from its indented tree."""
    tree = text.partition("```\ncarray/\n")[2].partition("\n```")[0]
    found, package = set(), ""
    for line in tree.splitlines():
        names, indent = re.split(r" {2,}", line.strip())[0], len(line) - len(line.lstrip())
        if not names or indent > 8:
            continue
        for name in names.split():
            if name.endswith("/"):
                package = name if indent == 2 else package.partition("/")[0] + "/" + name
                found.add(package)
            else:
                found.add((package if indent > 2 else "") + name)
    return found


def test_the_house_is_drawn_as_it_stands() -> None:
    named = named_modules(text_of("docs/architecture.md"))
    assert [name for name in sorted(named) if not (ROOT / "carray" / name).exists()] == []
    packages = {path.parent.relative_to(ROOT / "carray").as_posix() for path in (ROOT / "carray").rglob("__init__.py")}
    assert {f"{package}/" for package in packages - {"."}} - named == set()


def test_files_that_the_architecture_names_exist() -> None:
    paths = re.findall(r"`((?:carray|tests|jobs|docs|cluster|results)/[\w./-]*\w)`", text_of("docs/architecture.md"))
    assert len(paths) > 20
    assert [path for path in paths if not (ROOT / path).exists()] == []
