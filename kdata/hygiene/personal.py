"""Personal data and secrets in a text, with the span of each: email, card, IBAN, IP address, phone number, secret.

Candidates are searched for with RE2 (google-re2, BSD-3-Clause), whose time is linear in the text whatever the text is, and
then checked: a card by Luhn's sum and its issuer's length, an IBAN by its country's length and mod 97, an IP address by being
a public one, a phone number by phonenumbers (Apache-2.0), a secret by the forms of `kdata.check.secret_texts`. Names and
addresses of streets are not searched for: that takes a model of the language (presidio), and finds less surely.

Addresses that RFC 2606 keeps for examples, and IP addresses that are private or reserved, are nobody's.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

from kdata.check.secret_texts import ANY_FORM, spans_in
from kdata.errors import DependencyError

KINDS = ("email", "iban", "card", "ip", "phone", "secret")  # where two overlap, the first one counts
MOST_SPANS = 1_000  # of a text that are written; the numbers count all

_EMAIL = (
    r"[A-Za-z0-9_](?:[A-Za-z0-9._%+-]{0,62}[A-Za-z0-9_%+-])?@(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.){1,6}"
    r"[A-Za-z]{2,24}"
)
_IBAN = r"[A-Z]{2}[0-9]{2}(?: ?[A-Z0-9]{1,4}){3,9}"
_CARD = r"[0-9](?:[ -]?[0-9]){12,18}"
_IP4 = r"[0-9]{1,3}(?:\.[0-9]{1,3}){3}"
_IP6 = r"(?:[0-9A-Fa-f]{0,4}:){2,7}[0-9A-Fa-f]{0,4}"
_PHONE = r"(?:\+|00)[1-9](?:[ ().\-/]{0,2}[0-9]){6,14}"
_NATIONAL = r"[(]?[0-9](?:[ ().\-/]{0,2}[0-9]){6,13}"
_EXAMPLES = (".example", ".invalid", ".test", ".localhost", ".example.com", ".example.org", ".example.net")

# Characters of an IBAN by country, from SWIFT's registry.
_IBAN_CHARS = {
    country: int(length)
    for length, countries in {
        "15": "NO", "16": "BE", "18": "DK FK FI FO GL NL SD", "19": "MK SI", "20": "AT BA EE KZ LT LU MN XK",
        "21": "CH HR LI LV", "22": "BG BH CR DE GB GE IE ME RS VA", "23": "AE GI IL IQ OM SO TL",
        "24": "AD CZ ES MD PK RO SA SE SK TN VG", "25": "LY PT ST", "26": "IS TR", "27": "BI DJ FR GR IT MC MR SM",
        "28": "AL AZ BY CY DO GT HU LB NI PL SV", "29": "BR EG PS QA UA", "30": "JO KW MU", "31": "MT SC", "32": "LC",
        "33": "RU",
    }.items()
    for country in countries.split()
}  # fmt: skip


class Span(NamedTuple):
    """Where something personal is: its kind, of KINDS, and the characters [start, end) of the text."""

    kind: str
    start: int
    end: int


def personal_of(text: str, region: str | None = None) -> list[Span]:
    """Spans of personal data, in their order, without overlap.

    Args:
        region: two letters of the country whose phone numbers are searched for without a country code, too; None: none.
    """
    taken: list[Span] = []
    for kind in KINDS:
        spans = sorted(set(_spans(kind, text, region)))
        taken += _free(spans, taken)
    return sorted(taken, key=lambda span: (span.start, span.end))


def _free(spans: list[Span], taken: list[Span]) -> list[Span]:
    """Those spans that overlap none of `taken` and none of those before them."""
    others = sorted((span.start, span.end) for span in taken)
    free: list[Span] = []
    place, end = 0, -1
    for span in spans:
        while place < len(others) and others[place][1] <= span.start:
            place += 1
        if span.start >= end and (place == len(others) or others[place][0] >= span.end):
            free.append(span)
            end = span.end
    return free


def _spans(kind: str, text: str, region: str | None) -> Iterator[Span]:
    if kind == "secret":
        if _form("secret").search(text) is not None:
            yield from (Span(kind, begin, end) for _, begin, end in spans_in(text))
    elif kind == "email":
        if "@" in text:
            yield from (Span(kind, a, b) for a, b in _matches(kind, text) if _is_email(text, a, b))
    elif kind == "iban":
        yield from (Span(kind, a, end) for a, b in _matches(kind, text) if (end := _iban_end(text, a, b)) is not None)
    elif kind == "card":
        yield from (Span(kind, a, b) for a, b in _matches(kind, text) if _is_card(text, a, b))
    elif kind == "ip":
        yield from (Span(kind, a, b) for name in ("ip4", "ip6") for a, b in _matches(name, text) if _is_ip(text, a, b))
    else:
        for name in ["phone"] if region is None else ["phone", "national"]:
            yield from (Span(kind, a, b) for a, b in _matches(name, text) if _is_phone(text, a, b, region))


def _matches(name: str, text: str) -> Iterator[tuple[int, int]]:
    return (match.span() for match in _form(name).finditer(text))


@cache
def _form(name: str) -> Any:
    try:
        import re2
    except ImportError as error:
        raise DependencyError("the check `personal` needs google-re2: pip install 'kdata[hygiene]'") from error
    patterns = {
        "email": _EMAIL, "iban": _IBAN, "card": _CARD, "ip4": _IP4, "ip6": _IP6, "phone": _PHONE, "national": _NATIONAL,
        "secret": ANY_FORM,
    }  # fmt: skip
    return re2.compile(patterns[name])


def _stands_alone(text: str, begin: int, end: int, more: str = "") -> bool:
    """Whether no letter, digit or character of `more` touches a span."""
    before, after = text[begin - 1 : begin], text[end : end + 1]
    return not any(side and (side.isalnum() or side in more) for side in (before, after))


def _is_email(text: str, begin: int, end: int) -> bool:
    domain = text[begin:end].rpartition("@")[2].lower()
    is_example = f".{domain}".endswith(_EXAMPLES)
    return _stands_alone(text, begin, end, "@") and ".." not in text[begin:end] and not is_example


def _iban_end(text: str, begin: int, end: int) -> int | None:
    """Where the IBAN ends that begins at a candidate's begin; None where it is none."""
    wanted = _IBAN_CHARS.get(text[begin : begin + 2])
    if wanted is None or (begin and text[begin - 1].isalnum()):
        return None
    places = [place for place in range(begin, end) if text[place] != " "]
    if len(places) < wanted:
        return None
    own = places[wanted - 1] + 1
    compact = "".join(text[place] for place in places[:wanted])
    number = "".join(str(int(char, 36)) for char in compact[4:] + compact[:4])
    return own if int(number) % 97 == 1 and not text[own : own + 1].isalnum() else None


def _is_card(text: str, begin: int, end: int) -> bool:
    digits = "".join(filter(str.isdigit, text[begin:end]))
    goes_on = text[begin - 2 : begin][:1].isdigit() and text[begin - 1] in "-."
    goes_on = goes_on or (text[end : end + 1] in ("-", ".") and text[end + 1 : end + 2].isdigit())
    return _stands_alone(text, begin, end) and not goes_on and _has_issuer(digits) and _luhn(digits)


def _has_issuer(digits: str) -> bool:
    """Whether length and first digits are those of Visa, Mastercard, American Express, Discover, Diners, JCB or UnionPay."""
    length, four, two = len(digits), int(digits[:4]), int(digits[:2])
    return (
        (digits[0] == "4" and length in (13, 16, 19))
        or ((51 <= two <= 55 or 2221 <= four <= 2720) and length == 16)
        or (two in (34, 37) and length == 15)
        or ((four == 6011 or 6440 <= four <= 6599) and length == 16)
        or ((two in (36, 38) or 3000 <= four <= 3059) and length == 14)
        or (3528 <= four <= 3589 and length == 16)
        or (two == 62 and 16 <= length <= 19)
    )


def _luhn(digits: str) -> bool:
    doubled = [int(digit) * (1 + place % 2) for place, digit in enumerate(reversed(digits))]
    return sum(number - 9 * (number > 9) for number in doubled) % 10 == 0


def _is_ip(text: str, begin: int, end: int) -> bool:
    before, after = text[begin - 1 : begin], text[end : end + 2]
    if before and (before.isalnum() or before in ".:"):
        return False
    if after and (after[0].isalnum() or after[0] == ":" or (after[0] == "." and after[1:].isalnum())):
        return False
    try:
        return ipaddress.ip_address(text[begin:end]).is_global
    except ValueError:
        return False


def _is_phone(text: str, begin: int, end: int, region: str | None) -> bool:
    try:
        import phonenumbers
    except ImportError as error:
        raise DependencyError("the check `personal` needs phonenumbers: pip install 'kdata[hygiene]'") from error
    candidate = text[begin:end]
    if not _stands_alone(text, begin, end, "+"):
        return False
    if candidate.startswith("00"):
        candidate = "+" + candidate[2:]
    elif not candidate.startswith("+") and not {" ", "-", ")", "/", "."} & set(candidate):
        return False  # a plain run of digits is any number
    try:
        number = phonenumbers.parse(candidate, None if candidate.startswith("+") else region)
    except phonenumbers.NumberParseException:
        return False
    return bool(phonenumbers.is_valid_number(number))
