"""Who asks: the address that declared proxies tell of, never what the client wrote itself; networks, not machines."""

from typing import Any

import pytest

from shmsession.client import Binding, network_of
from shmsession.config import SessionConfig
from shmsession.errors import ConfigError


def binding(*bind_to: str, **settings: Any) -> Binding:
    return Binding(SessionConfig(**settings), bind_to)


@pytest.mark.parametrize(
    ("address", "network"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("192.0.2.7:8080", "192.0.2.7"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("[::ffff:192.0.2.7]:443", "192.0.2.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:DB8:1:2::9", "2001:db8:1:2::/64"),
        ("[2001:db8:1:2::9]", "2001:db8:1:2::/64"),
        ("[2001:db8:1:2::9]:4711", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("unknown", "unknown"),
        ("_hidden", "_hidden"),
        ("", ""),
        ("999.1.1.1", "999.1.1.1"),
        ("1.2.3.4.5:6", "1.2.3.4.5:6"),
    ],
)
def test_an_address_counts_as_its_network(address: str, network: str) -> None:
    """64 bits of IPv6, for its owner changes the rest; ports, brackets, zones and spellings make no difference."""
    assert network_of(address) == network


CHAIN = "203.0.113.9, 198.51.100.1, 10.0.0.1"


@pytest.mark.parametrize(
    ("proxies", "forwarded", "same_as"),
    [
        (0, CHAIN, "10.9.9.9"),
        (1, CHAIN, "10.0.0.1"),
        (2, CHAIN, "198.51.100.1"),
        (3, CHAIN, "203.0.113.9"),
        (4, CHAIN, "203.0.113.9"),
        (1, "", "10.9.9.9"),
        (1, "203.0.113.9", "203.0.113.9"),
        (2, "203.0.113.9", "203.0.113.9"),
    ],
)
def test_what_stands_in_front_of_the_declared_proxies_anybody_may_have_written(
    proxies: int, forwarded: str, same_as: str
) -> None:
    """Each proxy notes at the end who asked it."""
    found = binding("ip", trusted_proxies=proxies).client("10.9.9.9", forwarded, b"")
    assert found == binding("ip").client(same_as, "", b"")


@pytest.mark.parametrize(
    ("forwarded", "address"),
    [
        ("for=192.0.2.43", "192.0.2.43"),
        ('for="[2001:db8:cafe::17]:4711"', "2001:db8:cafe::17"),
        ("proto=https;For=192.0.2.43;by=203.0.113.60", "192.0.2.43"),
        ("for=203.0.113.9, for=192.0.2.43;host=a", "192.0.2.43"),
        ('for=203.0.113.9;host="a, for=1.2.3.4", for=192.0.2.43', "192.0.2.43"),
        ('for=198.51.100.66;host="x;for=203.0.113.9"', "198.51.100.66"),
        (r'for=198.51.100.66;host="x\",for=203.0.113.9;y=\"z"', "198.51.100.66"),
        (r'for=198.51.100.66;host="x\";for=203.0.113.9;y=\"z"', "198.51.100.66"),
        (r'for=203.0.113.9;host="\", for=192.0.2.43', "192.0.2.43"),
        ('for=192.0.2.43;host="' + "a" * 20_000, "192.0.2.43"),
        ("a" * 20_000, "10.9.9.9"),
        ('for="203.0.113.9, for=192.0.2.43', "192.0.2.43"),
        ('x="; for=203.0.113.9, y=", for=192.0.2.43', "192.0.2.43"),
        ('host="for=203.0.113.9";for="192.0.2.43:80"', "192.0.2.43"),
        ("for=203.0.113.9, by=192.0.2.1;proto=https", "10.9.9.9"),
        ("for=unknown", "unknown"),
        ("proto=https", "10.9.9.9"),
        ("", "10.9.9.9"),
    ],
)
def test_forwarded_is_read_by_rfc_7239(forwarded: str, address: str) -> None:
    """With the last proxy's word at the end."""
    found = binding("ip", trusted_proxies=1, proxy_header="Forwarded").client("10.9.9.9", forwarded, b"")
    assert found == binding("ip").client(address, "", b"")


def test_a_quotation_that_never_ends_says_nothing() -> None:
    """Nor does an address longer than any."""
    bound = binding("ip", trusted_proxies=2, proxy_header="Forwarded")
    assert bound.client("10.9.9.9", 'for="203.0.113.9, for=192.0.2.43', b"") == binding("ip").client(
        "10.9.9.9", "", b""
    )
    assert len(binding("ip", trusted_proxies=1).client("10.9.9.9", "a" * 70_000, b"")) == 17


def test_x_real_ip_is_one_address() -> None:
    found = binding("ip", trusted_proxies=1, proxy_header="X-Real-IP").client("10.9.9.9", "192.0.2.43", b"")
    assert found == binding("ip").client("192.0.2.43", "", b"")


def test_only_what_is_bound_counts() -> None:
    """Nothing: everybody is the same."""
    one, other = ("192.0.2.1", b"Firefox"), ("192.0.2.2", b"Chrome")
    assert binding().client(one[0], "", one[1]) == b""

    def differ(bind_to: tuple[str, ...], a: tuple[str, bytes], b: tuple[str, bytes]) -> bool:
        bound = binding(*bind_to)
        return bound.client(a[0], "", a[1]) != bound.client(b[0], "", b[1])

    assert differ(("ip",), one, other)
    assert not differ(("ip",), one, (one[0], other[1]))
    assert differ(("user_agent",), one, other)
    assert not differ(("user_agent",), one, (other[0], one[1]))
    assert differ(("ip", "user_agent"), one, (one[0], other[1]))
    assert differ(("ip", "user_agent"), one, (other[0], one[1]))
    assert differ(("ip", "user_agent"), ("a", b"b"), ("ab", b""))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bind_to": "ip"}, "sequence of words"),
        ({"bind_to": ("port",)}, 'write .*"ip"'),
        ({"bind_to": (1,)}, "sequence of words"),
        ({"trusted_proxies": -1}, "write 0 to 16"),
        ({"trusted_proxies": True}, "how many proxies"),
        ({"proxy_header": "x-forwarded-for"}, "write X-Forwarded-For or"),
    ],
)
def test_a_wrong_binding_is_refused_with_what_to_write(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SessionConfig(**settings)
