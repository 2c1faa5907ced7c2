"""The documents: their commands and their Python run, their tables say what the code says, their links lead somewhere.

A fenced block after the line `<!-- run -->` is executed, in the document's order, in a folder that holds a copy of
`examples/`. Commands run in this process, and shortened: the documents show the whole run.
"""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path
from typing import get_args, get_origin

import pytest

import lorica
from lorica import errors
from lorica.cli import main
from lorica.config import load_config, sections
from lorica.methods.method import method_names, method_options, option_fields
from lorica.strict_yaml import dump_value

ROOT = Path(__file__).resolve().parent.parent
README, README_ZH = ROOT / "README.md", ROOT / "README.zh-CN.md"
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md")])
RUN = "<!-- run -->\n"

# What makes a documented command short.
SHORTER = {
    "train": ["train.max_steps=3"],
    "sweep": ["train.max_steps=3", "eval.max_new_tokens=4"],
    "eval": ["eval.max_new_tokens=4"],
    "generate": ["--max-new-tokens", "4"],
}


def blocks(page: Path) -> list[tuple[bool, str, str]]:
    """Every fenced block of a page: whether it is to be run, its language, its text."""
    found = re.findall(r"^((?:<!-- run -->\n)?)```(\w+)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.M | re.S)
    return [(marker == RUN, language, text) for marker, language, text in found]


def block_with(page: Path, words: str) -> str:
    (text,) = [text for _, _, text in blocks(page) if words in text]
    return text


def table(page: Path, first_column: str) -> list[list[str]]:
    """The cells of the one table of `page` whose head begins with `first_column`."""
    _, _, rest = page.read_text(encoding="utf-8").partition(f"\n| {first_column} |")
    lines = rest.split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines]


def commands(text: str) -> list[list[str]]:
    lines = text.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def run(page: Path) -> None:
    for wanted, language, text in blocks(page):
        if not wanted:
            continue
        if language == "python":
            exec(compile(text, str(page), "exec", dont_inherit=True), {"__name__": "__main__"})
            continue
        for program, *words in commands(text):
            assert program == "lorica", f"{page.name}: {program} is marked to run"
            assert main([*words, *SHORTER.get(words[0], [])]) == 0, f"{page.name}: {shlex.join(words)}"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory: a new one with the repository's examples."""
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_COLOR", "1")
    return tmp_path


def test_readme_runs_and_the_run_folder_is_as_described(here: Path) -> None:
    run(README)
    _, *lines = block_with(README, "environment.json").splitlines()
    described = {line.split()[0].rstrip("/") for line in lines}
    found = {path.name for path in (here / "runs" / "clinic").iterdir()}
    assert found - {"tensorboard"} == described


@pytest.mark.parametrize("page", sorted(ROOT.glob("docs/*.md")), ids=lambda page: page.name)
def test_docs_run(page: Path, here: Path) -> None:
    run(page)


def test_every_command_that_is_marked_to_run_is_of_a_known_language() -> None:
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        marked = [language for wanted, language, _ in blocks(page) if wanted]
        assert text.count(RUN) == len(marked) and set(marked) <= {"bash", "python"}, page.name


def test_readme_shows_what_preview_prints(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "preview", "examples/clinic/run.yaml", "--rows", "1"]) == 0
    assert capsys.readouterr().out.strip() == block_with(README, "Learned: between").strip()


def test_readme_shows_the_example_that_it_runs() -> None:
    assert block_with(README, "base: embedded") == (ROOT / "examples/clinic/run.yaml").read_text(encoding="utf-8")
    config = load_config(ROOT / "examples/clinic/run.yaml").config
    assert isinstance(config.data.eval, str)
    for path, count in ((config.data.train, 40), (config.data.eval, 16)):
        assert len((ROOT / path).read_text(encoding="utf-8").splitlines()) == count


def listed_commands(capsys: pytest.CaptureFixture[str], *group: str) -> set[str]:
    assert main([*group, "--help"]) == 0
    _, _, rest = capsys.readouterr().out.partition("Commands:\n")
    names = re.findall(r"^  (\w+)  ", rest.split("\n\n")[0], re.M)
    return {" ".join([*group, name]) for name in names}


@pytest.mark.parametrize("page, head", [(README, "command"), (README_ZH, "命令")], ids=["en", "zh"])
def test_the_table_of_commands_is_that_of_the_program(
    page: Path, head: str, capsys: pytest.CaptureFixture[str]
) -> None:
    groups = {"adapter", "config", "data"}
    known = listed_commands(capsys)
    assert groups < known
    known = (known - groups).union(*(listed_commands(capsys, group) for group in groups))
    shown = [row[0].strip("`").removeprefix("lorica ") for row in table(page, head)]
    assert len(shown) == len(set(shown)) and set(shown) == known


@pytest.mark.parametrize("page, head", [(README, "code"), (README_ZH, "退出码")], ids=["en", "zh"])
def test_the_table_of_exit_codes_has_every_error(page: Path, head: str) -> None:
    shown = {int(code) for row in table(page, head) for code in re.split("[, 、]+", row[0])}
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    stopped = {errors.StoppedError("", number).exit_code for number in (2, 15)}
    assert shown == {0, *stopped, *(kind.exit_code for kind in kinds if issubclass(kind, errors.LoricaError))}


def field_rows() -> list[tuple[str, list[str], str, str]]:
    """Each field's key, choices, default and meaning, as docs/configuration.md should have them, in its order."""
    rows = []
    for name, section in sections().items():
        fields = dict(section.model_fields)
        groups = [fields]
        if name == "method":
            # What all methods have stands once, and then the fields of each method in turn.
            common = ("modules_to_save", "trainable_tokens")
            groups = [{key: fields[key] for key in ("name", *common)}]
            for method in method_names():
                own = option_fields(method_options(method)).model_fields
                groups.append({key: info for key, info in own.items() if key not in common})
        for key, info in (item for group in groups for item in group.items()):
            is_choice = "Literal" in str(get_origin(info.annotation))
            choices = [dump_value(choice) for choice in get_args(info.annotation)] if is_choice else []
            default = "required" if info.is_required() else f"`{dump_value(info.default)}`"
            rows.append((f"{name}.{key}", choices, default, info.description or ""))
    return rows


def test_configuration_lists_every_field_as_the_program_describes_it() -> None:
    page = ROOT / "docs/configuration.md"
    lines = re.findall(r"^\| `(\w+\.\w+)` \| (.*?) \| (.*?) \| (.*) \|$", page.read_text(encoding="utf-8"), re.M)
    wanted = field_rows()
    assert [line[0] for line in lines] == [row[0] for row in wanted]
    for (key, choices, default, meaning), (_, values, *shown) in zip(wanted, lines, strict=True):
        assert shown == [default, meaning], f"wanted: | `{key}` | ... | {default} | {meaning} |"
        assert not choices or values == ", ".join(f"`{choice}`" for choice in choices), key


def test_data_lists_every_format_and_kind_of_file() -> None:
    from lorica.data.formats import FORMATS
    from lorica.data.readers import READERS

    page = ROOT / "docs/data.md"
    assert [row[0].strip("`") for row in table(page, "format")] == list(FORMATS)
    assert set(re.findall(r"`(\.\w+)`", " ".join(row[0] for row in table(page, "file")))) == set(READERS)


def outline(page: Path) -> list[str]:
    """What a page is made of, without its words: heads by level, blocks, list items, table rows, figures to come."""
    kinds = (r"#+ ", r"- ", r"\|", r"<!-- run -->", r"FIGURE: ")
    text = re.sub(r"^```.*?^```$", "```", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    return [match[0] for line in text.splitlines() if (match := re.match("|".join((*kinds, "```")), line))]


def test_the_chinese_readme_has_the_same_parts() -> None:
    assert outline(README_ZH) == outline(README)
    assert blocks(README_ZH) == blocks(README)
    targets = [[link for link in links(page) if not link.startswith(("#", "README"))] for page in (README, README_ZH)]
    assert targets[0] == targets[1]


def links(page: Path) -> list[str]:
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    return re.findall(r"\]\(([^)\s]+)\)", text)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's heads, as GitHub makes them."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    heads = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    for link in links(page):
        if link.startswith(("https://", "http://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists() and target.is_relative_to(ROOT), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_no_page_names_a_place_outside_the_repository(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"(?<![\w.])(/(work|root|home|tmp|mnt|Users)/|\.\./shared|~/)", text)


def test_decisions_are_numbered_and_of_one_form() -> None:
    pages = sorted((ROOT / "docs/decisions").glob("*.md"))
    assert [page.name[:4] for page in pages] == [f"{n:04d}" for n in range(1, len(pages) + 1)]
    for page in pages:
        head, *parts = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.M)
        assert head.startswith(f"{page.name[:4]}: ") and parts == ["Context", "Choice", "Consequence"], page.name


def test_the_changelog_knows_this_version() -> None:
    assert f"## [{lorica.__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_the_diff_of_the_smallest_method_is_the_source() -> None:
    page = ROOT / "docs" / "adding-a-method.md"
    shown: dict[str, list[str]] = {}
    for line in block_with(page, "+++ b/").splitlines():
        if line.startswith("+++ b/"):
            name = line.removeprefix("+++ b/")
        elif line.startswith("+"):
            shown.setdefault(name, []).append(line[1:])
    source = {name: (ROOT / name).read_text(encoding="utf-8").splitlines() for name in shown}
    assert shown.pop("lorica/methods/ia3.py") == source.pop("lorica/methods/ia3.py")
    # Of the other files, every line that names the method.
    assert all(shown[name] == [line for line in lines if "ia3" in line.lower()] for name, lines in source.items())
    everywhere = {file for folder in ("lorica", "tests") for file in (ROOT / folder).rglob("*.py")}
    knowing = {str(f.relative_to(ROOT)) for f in everywhere if re.search(r"methods[./]ia3", f.read_text("utf-8"))}
    assert {name for name in knowing if name.startswith("lorica/")} <= {"lorica/__init__.py", "lorica/methods/ia3.py"}
    lines = len((ROOT / "tests" / "methods" / "test_ia3.py").read_text(encoding="utf-8").splitlines())
    assert f"`tests/methods/test_ia3.py`, {lines} lines" in page.read_text(encoding="utf-8")
