"""What a session adds to a response: Vary and Cache-Control by RFC 9110 and RFC 9111."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shmsession.headers import RawHeaders, with_session_headers
from tests.properties import examples

COOKIE = b"session=x; Path=/"
ADDED: RawHeaders = [(b"set-cookie", COOKIE)]


@pytest.mark.parametrize(
    ("vary", "expected"),
    [
        ([], b"Cookie"),
        ([b"Accept"], b"Accept, Cookie"),
        ([b"Cookie"], b"Cookie"),
        ([b"cookie"], b"Cookie"),
        ([b"Accept, COOKIE ,Origin"], b"Accept, Origin, Cookie"),
        ([b"Accept", b"Origin"], b"Origin, Accept, Cookie"),
        ([b"Accept", b"accept, Cookie"], b"Accept, Cookie"),
        ([b"*"], b"*"),
        ([b"Accept, *"], b"*"),
        ([b"*", b"Accept"], b"*"),
        ([b"Accept", b" * "], b"*"),
        ([b""], b"Cookie"),
        ([b"X-Cookie"], b"X-Cookie, Cookie"),
    ],
)
@pytest.mark.parametrize("added", [[], ADDED])
def test_vary_says_cookie_once_and_keeps_what_else_it_said(
    vary: list[bytes], expected: bytes, added: RawHeaders
) -> None:
    """One Vary header afterwards, whatever there was; `*` covers all."""
    headers: RawHeaders = [(b"Content-Type", b"text/plain"), *((b"VaRy", value) for value in vary)]
    result = with_session_headers(headers, added, b"Cookie")
    assert [value for name, value in result if name.lower() == b"vary"] == [expected]
    assert result[0] == (b"Content-Type", b"text/plain")


@examples(5_000, 200)
@given(st.lists(st.sampled_from([b"Accept", b"accept", b"Cookie", b"Origin", b"*", b"", b"a, b,cookie"]), max_size=5))
def test_vary_is_the_union_of_all_it_said_and_cookie(vary: list[bytes]) -> None:
    """Nothing is lost, nothing is twice, in any case."""
    ((_, merged),) = [
        it for it in with_session_headers([(b"vary", it) for it in vary], [], b"Cookie") if it[0] == b"vary"
    ]
    said = {field.strip().lower() for value in [*vary, b"cookie"] for field in value.split(b",")} - {b""}
    fields = [field.strip().lower() for field in merged.split(b",")]
    assert fields == [b"*"] if b"*" in said else sorted(fields) == sorted(said)


def test_a_response_that_sets_the_cookie_is_kept_by_nobody() -> None:
    """Cache-Control: no-store takes the place of whatever said otherwise, in all its spellings."""
    headers = [
        (b"Cache-Control", b"public, max-age=3600"),
        (b"cache-control", b"immutable"),
        (b"Expires", b"Thu, 01 Dec 2099 16:00:00 GMT"),
        (b"PRAGMA", b"cache"),
        (b"ETag", b'"x"'),
        (b"Set-Cookie", b"theirs=1"),
    ]
    assert with_session_headers(headers, ADDED, b"Cookie") == [
        (b"ETag", b'"x"'),
        (b"Set-Cookie", b"theirs=1"),
        (b"vary", b"Cookie"),
        (b"cache-control", b"no-store"),
        *ADDED,
    ]


def test_a_response_that_sets_none_keeps_its_caching() -> None:
    """Only Vary is added; the application's list is not changed."""
    headers: RawHeaders = [(b"Cache-Control", b"public, max-age=3600"), (b"Expires", b"x")]
    before = list(headers)
    assert with_session_headers(headers, [], b"Cookie") == [*before, (b"vary", b"Cookie")]
    assert headers == before
