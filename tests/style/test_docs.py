"""Pages say what is there: links resolve, named files exist, cited headings stand."""

from __future__ import annotations

import re

from tests.support import tree
from vmm.qmp.registry import load

PAGES = tree.named(".md")
# A name in backquotes that begins with a folder of ours; * and {a,b} as in a shell.
PATH = re.compile(r"`(?:\./)?((?:bench|docs|native|shared|tests|tools|vmm|workers)/[^`\s:]*)`")
LINK = re.compile(r"\]\(([^)\s]+)\)")
CITED = re.compile(r'(ARCHITECTURE|CONTRIBUTING)\.md,\s+[#/\s]*"([^"]+)"')


def heading_ids(page: str) -> set[str]:
    """The anchors that a Markdown viewer makes."""
    titles = re.findall(r"^#+ (.+)$", tree.text(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def expand(path: str) -> list[str]:
    match = re.search(r"\{([^}]*)\}", path)
    if not match:
        return [path]
    return [name for part in match[1].split(",")
            for name in expand(path[:match.start()] + part.strip() + path[match.end():])]


def exists(path: str) -> bool:
    """A file or folder under version control."""
    pattern = re.escape(path.rstrip("/")).replace(r"\*", "[^/]*")
    return any(re.match(pattern + "(/|$)", name) for name in tree.files())


def test_links_resolve() -> None:
    wrong = []
    for page in PAGES:
        for link in LINK.findall(tree.text(page)):
            if re.match(r"\w+:", link):
                continue
            target, _, anchor = link.partition("#")
            folder = page.rpartition("/")[0]
            path = (tree.ROOT / folder / target).resolve() if target else tree.ROOT / page
            name = str(path.relative_to(tree.ROOT))
            if not exists(name) or (anchor and anchor not in heading_ids(name)):
                wrong.append(f"{page}: {link}")
    assert not wrong


def test_the_first_page_leads_to_all() -> None:
    linked = set(LINK.findall(tree.text("README.md")))
    assert not {page for page in PAGES if page.startswith("docs/")} - linked


def test_named_files_exist() -> None:
    """A code map that names what isn't there is worse than none."""
    wrong = [f"{page}: {path}" for page in PAGES if page != "CHANGELOG.md"
             for written in PATH.findall(tree.text(page))
             for path in expand(written)
             if not path.endswith(".rst") and not exists(path)]  # .rst: QEMU's pages
    assert not wrong


def test_cited_headings_stand() -> None:
    """Comments that send the reader to a section of a page."""
    wrong = []
    for name in tree.named(".py", ".c", ".h", ".md", ".policy"):
        for page, title in CITED.findall(re.sub(r"\n\s*(//|#|\*)?\s*", " ", tree.text(name))):
            titles = re.findall(r"^#+ (.+)$", tree.text(f"{page}.md"), re.MULTILINE)
            if title.lower() not in (t.lower() for t in titles):
                wrong.append(f"{name}: {page}.md, {title}")
    assert not wrong


def test_every_folder_is_on_the_code_map() -> None:
    """Each folder of the product with sources appears in ARCHITECTURE.md."""
    text = tree.text("ARCHITECTURE.md")
    folders = {name.rpartition("/")[0] for name in tree.named(".py", ".c")
               if name.split("/")[0] in ("vmm", "shared", "workers", "native")}
    assert not [folder for folder in folders if f"{folder}/" not in text]


def test_commands_and_events_are_described() -> None:
    """docs/qmp.md has every command and event that there is, and no other event."""
    registry = load()
    text = tree.text("docs/qmp.md")
    words = set(re.findall(r"`([\w-]+)`", text))
    assert not set(registry.commands) - words
    assert not set(registry.events) - words
    assert not set(re.findall(r"^\| `([A-Z_]{4,})`", text, re.MULTILINE)) - set(registry.events)
