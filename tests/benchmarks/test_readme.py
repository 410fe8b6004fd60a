"""The tables in the README files are those of the results that are kept."""

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
