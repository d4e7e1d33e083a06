"""Pages of the repository that lie outside docs/ stand in the site too, and links lead to them there.

README.md is the home page. Whatever else a page links to is put under repository/, so that links are
written as a code host reads them, and no page is written twice.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LOG.md")
LINK = re.compile(r'(?:(?<=\]\()|(?<=src=")|(?<=href="))(?!\w+:)([^)\s#"]+)(?=[)#\s"])')
LIST = re.compile(r"(?m)^(?!- |\s)(.+\n)(?=- )")  # right after a line of text


def placed(path: str) -> str:
    """Where a file of the repository stands in the site."""
    inside = path.removeprefix("docs/")
    return "index.md" if path == "README.md" else inside if inside != path else f"repository/{path}"


def linked(page: str, text: str) -> Iterator[tuple[str, str]]:
    """Every link of a page to a file, as it is written and as that file's path in the repository."""
    for link in LINK.findall(text):
        path = os.path.normpath(PurePosixPath(page).parent / link)
        if (ROOT / path).is_file():
            yield link, path


def on_files(files, config):
    """Adds the pages, and all files outside docs/ that any page links to."""
    inside = [f"docs/{file.src_uri}" for file in files.documentation_pages()]
    outside = {
        path
        for page in (*PAGES, *inside)
        for _, path in linked(page, (ROOT / page).read_text(encoding="utf-8"))
        if not path.startswith("docs/")
    }
    for path in sorted({*outside, *PAGES}):
        files.append(File.generated(config, placed(path), abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown, page, **_):
    """Links from the page's place in the site; lists as a code host sees them."""
    source = Path(page.file.abs_src_path).relative_to(ROOT).as_posix()
    here = PurePosixPath(page.file.src_uri).parent
    moved = {link: os.path.relpath(placed(path), here) for link, path in linked(source, markdown)}
    text = LINK.sub(lambda link: moved.get(link[0], link[0]), markdown)
    return LIST.sub(r"\1\n", text)


def on_page_content(html, page, **_):
    """A notebook's links to pages, which are HTML before anybody looks for them."""
    if not page.file.src_uri.endswith(".ipynb"):
        return html
    html = re.sub(r'(href="(?!\w+:)[^"#]*)README\.md(?=["#])', r"\1index.md", html)
    return re.sub(r'(href="(?!\w+:)[^"#]+)\.md(?=["#])', r"\1.html", html)
