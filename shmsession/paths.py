"""Which paths a middleware treats apart: prefixes, or a predicate."""

from collections.abc import Callable, Sequence

from .errors import ConfigError

Rule = str | Sequence[str] | Callable[[str], bool]
"""`"/static"` covers /static and what is below it; several prefixes; or a function of the path."""


def matcher(rule: Rule) -> Callable[[str], bool] | None:
    """A predicate for `rule`; None when it covers nothing. Raises ConfigError for a prefix without a leading /."""
    if callable(rule):
        return rule
    prefixes = (rule,) if isinstance(rule, str) else tuple(rule)
    if not prefixes:
        return None
    for prefix in prefixes:
        if not prefix.startswith("/"):
            raise ConfigError(f"the path prefix {prefix!r} must begin with /")
    below = tuple(prefix if prefix.endswith("/") else prefix + "/" for prefix in prefixes)
    exact = frozenset(prefixes)
    return lambda path: path in exact or path.startswith(below)
