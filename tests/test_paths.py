"""Which paths a middleware treats apart."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shmsession.errors import ConfigError
from shmsession.paths import Rule, matcher
from tests.properties import examples


@pytest.mark.parametrize(
    ("rule", "path", "covered"),
    [
        ("/static", "/static", True),
        ("/static", "/static/a.css", True),
        ("/static", "/static/", True),
        ("/static", "/statics", False),
        ("/static", "/", False),
        ("/static", "/a/static", False),
        ("/static", "/Static", False),
        ("/static/", "/static/a", True),
        ("/static/", "/static", False),
        ("/", "/anything", True),
        (["/a", "/b"], "/b/c", True),
        (("/a", "/b"), "/c", False),
        (lambda path: path.endswith(".css"), "/x.css", True),
        (lambda path: path.endswith(".css"), "/x.js", False),
    ],
)
def test_a_prefix_covers_itself_and_what_is_below_it(rule: Rule, path: str, covered: bool) -> None:
    """By whole segments; or what a predicate says."""
    covers = matcher(rule)
    assert covers is not None
    assert covers(path) is covered


@pytest.mark.parametrize("rule", [(), []])
def test_no_prefix_is_no_matcher(rule: Rule) -> None:
    """So that a middleware without skip= pays nothing."""
    assert matcher(rule) is None


@pytest.mark.parametrize("rule", ["static", "", ["/a", "b"], [""]])
def test_a_prefix_without_a_leading_slash_is_an_error(rule: Rule) -> None:
    """It would never match, silently."""
    with pytest.raises(ConfigError, match="must begin with /"):
        matcher(rule)


@examples(20_000, 300)
@given(st.text("ab/", min_size=1, max_size=6).map(lambda text: "/" + text.strip("/")), st.text("ab/", max_size=8))
def test_a_prefix_is_compared_by_segments(prefix: str, rest: str) -> None:
    """Nothing that merely begins alike is covered."""
    covers = matcher(prefix)
    assert covers is not None
    path = prefix + rest
    assert covers(path) is (rest == "" or rest.startswith("/") or prefix == "/")
