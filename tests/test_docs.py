"""The documentation keeps its promises: scripts run, names and tests that it cites exist."""

import re
import runpy
from importlib import import_module
from pathlib import Path

import matplotlib
import pytest

import spectralshell

ROOT = Path(__file__).parent.parent
PARTS = ("datasets", "displays", "dynamics", "krylov", "operators", "runs", "shells")
GALLERY = sorted((ROOT / "docs" / "examples").glob("plot_*.py"))
CITING = {"docs/theory.rst": 8, "docs/user_guide/refusals.rst": 25}
CITED_TESTS = [
    cited
    for page in CITING
    for cited in re.findall(r"``(tests/[\w/]+\.py)::(\w+)``", (ROOT / page).read_text())
]


@pytest.mark.parametrize("script", GALLERY, ids=lambda path: path.stem)
def test_gallery_script_runs_and_draws(script):
    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    try:
        runpy.run_path(str(script), run_name="__main__")
        assert plt.get_fignums()
    finally:
        plt.close("all")


def test_gallery_has_scripts():
    assert len(GALLERY) >= 3


@pytest.mark.parametrize("part", [None, *PARTS])
def test_api_page_lists_every_public_name(part):
    listed = set(re.findall(r"^   (\w+)$", (ROOT / "docs/api.rst").read_text(), re.MULTILINE))
    module = spectralshell if part is None else import_module(f"spectralshell.{part}")
    assert set(module.__all__) - {"__version__"} <= listed


@pytest.mark.parametrize(("path", "name"), sorted(set(CITED_TESTS)))
def test_pages_cite_tests_that_exist(path, name):
    assert f"def {name}(" in (ROOT / path).read_text()


@pytest.mark.parametrize("page", CITING)
def test_a_page_cites_tests(page):
    assert (ROOT / page).read_text().count("``tests/") >= CITING[page]


def test_every_refusal_cites_its_test():
    page = (ROOT / "docs/user_guide/refusals.rst").read_text()
    items = re.split(r"^- ", page, flags=re.MULTILINE)[1:]
    assert all("``tests/" in item for item in items)


@pytest.mark.parametrize("page", ["README.md", "docs/references.rst"])
def test_citation_has_the_current_version(page):
    assert spectralshell.__version__ in (ROOT / page).read_text()
