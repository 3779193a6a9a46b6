"""What a rule counts in, and what a call asks of it. All numbers are whole: milliseconds, requests, tokens, and, in
buckets, parts of a token, so that this process, Redis and the oracle of the tests agree to the last unit.
"""

from dataclasses import dataclass, field
from functools import lru_cache
from ipaddress import ip_network
from math import gcd

from soma.serve.calls import Call
from soma.serve.limits.config import Rule, Scope

CODES = {
    "fixed_window": 1, "sliding_window_log": 2, "sliding_window_counter": 3, "token_bucket": 4, "leaky_bucket": 5,
    "concurrency": 6,
}  # fmt: skip
NEVER = -1  # a call that asks for more than there can be


@dataclass(frozen=True)
class Bucket:
    """A rule in numbers. `up` parts of a token come (or leave) in a millisecond, `per` parts are a token."""

    rule: Rule
    code: int
    limit: int
    window: int  # ms
    up: int
    per: int
    capacity: int  # parts
    numbers: tuple[int, ...] = field(repr=False)  # as the script takes them

    @classmethod
    def of(cls, rule: Rule) -> "Bucket":
        """The rule's rate as a fraction in lowest terms: 90 requests a minute are 3 parts in 2000 a millisecond."""
        shared = gcd(rule.limit, rule.window)
        up, per, code = rule.limit // shared, rule.window // shared, CODES[rule.algorithm]
        capacity = (rule.burst or rule.limit) * per
        return cls(rule, code, rule.limit, rule.window, up, per, capacity,
                   (code, rule.limit, rule.window, up, per, capacity))  # fmt: skip

    @property
    def prefix(self) -> str:
        """Name of the rule and what its counts are in: after a reload they go on, or begin anew where they cannot."""
        parts = f".{self.per}" if self.code in (4, 5) else ""
        return f"{self.rule.name}|{self.code}.{self.window}{parts}"

    @property
    def most(self) -> int:
        """The largest call that can pass at all."""
        return self.capacity // self.per if self.code in (4, 5) else self.limit

    @property
    def is_leased(self) -> bool:
        """Whether calls hold something that comes back if their gateway dies."""
        return self.code == 6 or self.rule.unit == "tokens"


@dataclass(frozen=True, slots=True)
class Ask:
    """What a call asks of one bucket. `cost` is at least 1 except for a call of no tokens."""

    bucket: Bucket
    key: str  # rule and who, readable
    cost: int


@dataclass(frozen=True, slots=True)
class Decision:
    """The answer for all asks of a call together. `states`: for each what remains, and ms until it is as new."""

    admitted: bool
    now: int  # ms, of the clock that decided
    delay: int  # ms: to wait in the queue of a leaky bucket; if refused, until it would pass, or NEVER
    refused: int | None  # which ask, the one with the longest delay
    states: tuple[tuple[int, int], ...]


def scope_value(scope: Scope, call: Call) -> str:
    """The call's key, team, address, model or route. An IPv6 client owns 2^64 addresses: its network counts."""
    if scope == "key":
        return call.caller.key_id if call.caller else ""
    if scope == "team":
        return (call.caller.team or "") if call.caller else ""
    if scope == "address":
        return network_of(call.address)
    return call.model if scope == "model" else call.route


@lru_cache(maxsize=4096)
def network_of(address: str) -> str:
    """An IPv4 address as it is, the /64 of an IPv6 address."""
    return str(ip_network(f"{address}/64", strict=False)) if ":" in address else address


def asks_of(buckets: list[Bucket], call: Call) -> list[Ask]:
    """What the rules that hold for this call ask."""
    found = []
    for bucket in buckets:
        rule = bucket.rule
        if all(scope_value(scope, call) in allowed for scope, allowed in rule.only.items()):
            who = "|".join(scope_value(scope, call).replace("|", "%7C") for scope in rule.per)
            cost = call.prompt_tokens + call.max_tokens if rule.unit == "tokens" else 1
            found.append(Ask(bucket, f"{bucket.prefix}|{who}", cost))
    return found
