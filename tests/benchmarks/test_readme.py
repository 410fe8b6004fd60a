"""Tables in README and documents are those of the stored results."""

import pytest

from benchmarks import readme


@pytest.mark.parametrize("name", readme.FILES)
def test_tables_are_those_of_the_results(name: str) -> None:
    text = (readme.ROOT / name).read_text()
    assert readme.render(text) == text


def test_every_result_is_shown_somewhere() -> None:
    texts = "".join((readme.ROOT / name).read_text() for name in readme.FILES)
    for path in (readme.ROOT / "benchmarks" / "results").glob("*.json"):
        assert f"<!-- benchmarks/results/{path.name} -->" in texts


def test_an_excerpt_has_the_columns_and_rows_that_it_names() -> None:
    tables = "| a | b, c | d |\n|---|---|---|\n| x, 1 | 1 | 2 |\n| y | 3 |  |\n\n| a |\n|---|\n| z |"
    assert readme.excerpt(tables, "d; a", "y; x, 1") == "| d | a |\n|---|---|\n|  | y |\n| 2 | x, 1 |"
    with pytest.raises(KeyError, match="z"):
        readme.excerpt(tables, "a", "z")
    with pytest.raises(ValueError, match="e"):
        readme.excerpt(tables, "e", "y")
