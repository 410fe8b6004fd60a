"""Hooks of mkdocs.yml."""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("*.md", "docs/*.md", "[!.]*/README.md")
_LINK = re.compile(r"\]\(([^)#\s]+)")
_ROLE = re.compile(r":(?:attr|class|data|exc|func|meth|mod):(<code>)~?")


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Replaces the pages by all Markdown files, and the files they link to, at their paths in the repository.

    So the same relative links work on GitHub and on the site, and a link to a file that does not exist is an error.
    """
    pages = {page for pattern in PAGES for page in ROOT.glob(pattern)}
    linked = {(page.parent / link).resolve() for page in pages for link in _LINK.findall(page.read_text())}
    used = pages | linked | {ROOT / file for file in config.extra_css}
    names = sorted(str(path.relative_to(ROOT)) for path in used if path.is_file() and ROOT in path.parents)
    of_theme = [file for file in files if file.src_dir != config.docs_dir]
    return Files(of_theme + [File(name, str(ROOT), config.site_dir, config.use_directory_urls) for name in names])


def on_page_content(html: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Removes the Sphinx roles that docstrings have before names in code style."""
    return _ROLE.sub(r"\1", html)
