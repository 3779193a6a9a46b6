"""Personal data and secrets in text: found by form, checked where they have a check digit, counted and masked.

E-mail addresses, IP addresses (v4, v6), phone numbers, payment cards (Luhn, ISO/IEC 7812), IBANs (ISO 13616, modulo
97), keys and tokens of known services, private keys, JSON Web Tokens. Names and postal addresses have no form and are
not looked for. What is found is replaced by `<email>`, `<ip>`, …
"""

import ipaddress
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from soma.data.signals.parse import Batch

EMAIL = re.compile(
    r"(?<![\w.+-])[A-Za-z0-9][\w.+-]{0,63}@(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.){1,8}"
    r"[A-Za-z]{2,24}(?![\w-])"
)
IPV4 = re.compile(r"(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?![\w]|\.\d)")
IPV6 = re.compile(r"(?<![\w:.])(?:[0-9A-Fa-f]{0,4}:){2,7}[0-9A-Fa-f]{0,4}(?![\w:])")
CARD = re.compile(r"(?<![\w.-])\d(?:[ -]?\d){12,18}(?![\w-]|\.\d)")
IBAN = re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?\b")
PHONE = re.compile(
    r"(?<![\w.,/+:=#$€£-])(?:\+\d{1,3}[ .-]?(?:\(0\))?(?:\(\d{1,5}\)[ .-]?)?\d(?:[ .-]?\d){5,12}"
    r"|\(\d{2,5}\)[ .-]?\d{3,4}[ .-]?\d{3,4}|\d{3}[ .-]\d{3}[ .-]\d{4}"
    r"|0\d{2,4}[ /-]\d{3,4}[ -]?\d{3,5})(?![\w-]|[.,]\d)"
)
SECRETS = re.compile(
    r"-----BEGIN (?:[A-Z]+ )*PRIVATE KEY-----.{1,8000}?-----END (?:[A-Z]+ )*PRIVATE KEY-----"
    r"|\bAKIA[0-9A-Z]{16}\b|\bASIA[0-9A-Z]{16}\b|\bgh[pousr]_[A-Za-z0-9]{36,255}\b|\bgithub_pat_[A-Za-z0-9_]{50,255}\b"
    r"|\bglpat-[A-Za-z0-9_-]{20,64}\b|\bxox[abeoprs]-[A-Za-z0-9-]{10,250}"
    r"|\bsk-(?:proj-|ant-[a-z0-9]+-)?[A-Za-z0-9_-]{20,200}"
    r"|\b[rs]k_(?:live|test)_[A-Za-z0-9]{16,99}\b|\bAIza[0-9A-Za-z_-]{35}\b|\bhf_[A-Za-z0-9]{30,60}\b"
    r"|\bnpm_[A-Za-z0-9]{36}\b"
    r"|\bpypi-[A-Za-z0-9_-]{50,250}|\bSG\.[A-Za-z0-9_-]{16,32}\.[A-Za-z0-9_-]{32,64}"
    r"|\beyJ[A-Za-z0-9_-]{8,2000}\.eyJ[A-Za-z0-9_-]{8,4000}\.[A-Za-z0-9_-]{16,2000}",
    re.DOTALL,
)
IBAN_LENGTHS = {
    "AD": 24, "AE": 23, "AL": 28, "AT": 20, "AZ": 28, "BA": 20, "BE": 16, "BG": 22, "BH": 22, "BR": 29, "CH": 21,
    "CR": 22, "CY": 28, "CZ": 24, "DE": 22, "DK": 18, "DO": 28, "EE": 20, "EG": 29, "ES": 24, "FI": 18, "FO": 18,
    "FR": 27, "GB": 22, "GE": 22, "GI": 23, "GL": 18, "GR": 27, "GT": 28, "HR": 21, "HU": 28, "IE": 22, "IL": 23,
    "IS": 26, "IT": 27, "JO": 30, "KW": 30, "KZ": 20, "LB": 28, "LI": 21, "LT": 20, "LU": 20, "LV": 21, "MC": 27,
    "MD": 24, "ME": 22, "MK": 19, "MR": 27, "MT": 31, "MU": 30, "NL": 18, "NO": 15, "PK": 24, "PL": 28, "PS": 29,
    "PT": 25, "QA": 29, "RO": 24, "RS": 22, "SA": 24, "SE": 24, "SI": 19, "SK": 24, "SM": 27, "TN": 24, "TR": 26,
    "UA": 29, "VA": 22, "XK": 20,
}  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """A piece of personal data at `text[start:end]`."""

    kind: str
    start: int
    end: int


def luhn(digits: str) -> bool:
    """Whether the last digit checks the others (ISO/IEC 7812-1, annex B). luhn("4111111111111111") is true."""
    total = 0
    for place, digit in enumerate(reversed(digits)):
        value = int(digit) * (1 + place % 2)
        total += value - 9 * (value > 9)
    return total % 10 == 0


def iban(text: str) -> bool:
    """Whether an IBAN has its country's length and its number modulo 97 is 1. iban("GB82 WEST 1234 5698 7654 32")."""
    bare = text.replace(" ", "")
    if IBAN_LENGTHS.get(bare[:2]) != len(bare):
        return False
    return int("".join(str(int(letter, 36)) for letter in bare[4:] + bare[:4])) % 97 == 1


def _card(text: str) -> bool:
    digits = re.sub(r"\D", "", text)
    # Visa, Mastercard, American Express, Discover, JCB, Diners, UnionPay by their first digits and lengths.
    issued = re.fullmatch(
        r"4(?:\d{12}|\d{15}|\d{18})|5[1-5]\d{14}|2[2-7]\d{14}|3[47]\d{13}"
        r"|6(?:011|5\d\d|4[4-9]\d)\d{12}|35\d{14}|3[068]\d{12}|62\d{14,17}",
        digits,
    )
    return issued is not None and len(set(digits)) > 1 and luhn(digits)


def _address(text: str) -> bool:
    try:
        found = ipaddress.ip_address(text)
    except ValueError:
        return False
    if found.version == 6:  # times and C++ scopes look alike: `::`, `12:30:45`
        return text.count(":") >= 3 and len(text) >= 8
    return not (found.is_unspecified or found.is_loopback)


def _phone(text: str) -> bool:
    digits = re.sub(r"\D", "", text)
    return 8 <= len(digits) <= 15 and len(set(digits)) > 2


# In this order: what is longer and surer first; later ones do not look into what is found.
DETECTORS: tuple[tuple[str, re.Pattern[str], Callable[[str], bool], Callable[[str], bool]], ...] = (
    ("secret", SECRETS, lambda text: True, lambda text: True),
    ("email", EMAIL, lambda text: "@" in text, lambda text: True),
    ("iban", IBAN, lambda text: True, iban),
    ("card", CARD, lambda text: True, _card),
    ("ip", IPV4, lambda text: "." in text, _address),
    ("ip", IPV6, lambda text: "::" in text or text.count(":") > 4, _address),
    ("phone", PHONE, lambda text: True, _phone),
)
KINDS = ("email", "ip", "phone", "card", "iban", "secret")
HAS_DIGIT = re.compile(r"\d")


def find(text: str) -> list[Finding]:
    """All personal data and secrets in a text, in order, without overlaps."""
    if "@" not in text and not HAS_DIGIT.search(text) and "PRIVATE KEY" not in text:
        return []
    found: list[Finding] = []
    for kind, pattern, worth, check in DETECTORS:
        if worth(text):
            for match in pattern.finditer(text):
                start, end = match.span()
                if check(match.group()) and not any(one.start < end and start < one.end for one in found):
                    found.append(Finding(kind, start, end))
    return sorted(found, key=lambda one: one.start)


def mask(text: str) -> tuple[str, Counter[str]]:
    """The text with what was found replaced by its kind in angle brackets, and how many of each there were."""
    findings = find(text)
    if not findings:
        return text, Counter()
    return "".join(_masked(text, findings)), Counter(one.kind for one in findings)


def _masked(text: str, findings: list[Finding]) -> Iterator[str]:
    start = 0
    for one in findings:
        yield text[start : one.start]
        yield f"<{one.kind}>"
        start = one.end
    yield text[start:]


def personal(batch: Batch) -> dict[str, Any]:
    """How many of each kind are in a document: `personal_email`, `personal_ip`, … as int64."""
    counts = [Counter(one.kind for one in find(text)) for text in batch.texts]
    return {f"personal_{kind}": np.array([count[kind] for count in counts], np.int64) for kind in KINDS}
