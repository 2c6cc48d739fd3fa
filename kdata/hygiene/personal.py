"""Personal data and secrets in a text, with the span of each: email, card, IBAN, IP address, phone number, secret.

Candidates are searched for with RE2 (google-re2, BSD-3-Clause), whose time is linear in the text whatever the text is.
Numbers that stand behind one another look like one: from each place where one may begin, ends between groups of digits are
tried, and none is further away than some 50 characters, so that time stays linear. Each candidate is then checked: a card by
Luhn's sum and its issuer's length, an IBAN by its country's length and mod 97, an IP address by being a public one, a phone
number by phonenumbers (Apache-2.0), a secret by the forms of `kdata.check.secret_texts`. Names and addresses of streets are
not searched for: that takes a model of the language (presidio), and finds less surely.

Digits of every script, and spaces and hyphens that do not break, count as the plain ones that they stand for; in numbers
dashes do, too. A letter ends a number that it touches only where its script has two cases: others write a number between
words, or before a particle, without a space.

Addresses that RFC 2606 keeps for examples, and IP addresses that are private or reserved, are nobody's.
"""

from __future__ import annotations

import ipaddress
import re
import unicodedata
from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

from kdata.check.secret_texts import ANY_FORM, spans_in
from kdata.errors import DependencyError

KINDS = ("email", "iban", "card", "ip", "phone", "secret")  # where two overlap, the first one counts
MOST_SPANS = 1_000  # of a text that are written; the numbers count all

# Whatever is no ASCII may stand in the local part; `_email_begin` then says where it begins.
_EMAIL = (
    r"[A-Za-z0-9_\x{80}-\x{10FFFF}](?:[A-Za-z0-9._%+\x{80}-\x{10FFFF}-]{0,62}[A-Za-z0-9_%+\x{80}-\x{10FFFF}-])?"
    r"@(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.){1,6}[A-Za-z]{2,24}"
)
_IBAN = r"[A-Z]{2}[0-9]{2}"  # where one begins
_CARD = r"[0-9](?:[ -]?[0-9]){12,}"  # numbers one behind the other
_CARD_GROUPS = ((4, 4, 4, 4, 3), (4, 4, 4, 4), (4, 6, 5), (4, 6, 4))  # digits of the groups in which a card is written
_IP4 = r"[0-9]{1,3}(?:\.[0-9]{1,3}){3}"
_IP6 = rf"(?:[0-9A-Fa-f]{{0,4}}:){{2,7}}(?:{_IP4}|[0-9A-Fa-f]{{0,4}})"
_PHONE = r"(?:\+|00)[1-9]"  # where one begins
# Python's own, which goes on from any place: its classes are disjoint and its numbers bounded, so time stays linear.
_INTERNATIONAL_FORM = re.compile(r"(?:\+|00)[1-9](?:[ ().\-/]{0,2}[0-9]){6,14}")
_NATIONAL_FORM = re.compile(r"[(]?[0-9](?:[ ().\-/]{0,2}[0-9]){6,13}")
_DIGITS = re.compile(r"[0-9]+")
_NUMBER_BEFORE = re.compile(r"[0-9][ ().\-/]{1,2}\Z")
_NUMBER_BEHIND = re.compile(r"[ ().\-/]{1,2}[0-9]")
# One character for one, so that spans stay: decimal digits, full-width forms of ASCII, spaces and hyphens.
_PLAIN = {
    **{chr(c): str(unicodedata.decimal(chr(c))) for c in range(0x80, 0x1D800) if unicodedata.category(chr(c)) == "Nd"},
    **{chr(c): chr(c - 0xFEE0) for c in range(0xFF01, 0xFF5F)},
    **{chr(c): " " for c in (0xA0, *range(0x2000, 0x200B), 0x202F, 0x205F, 0x3000)},
    **dict.fromkeys("\u2010\u2011\ufe63", "-"),
}
_NOT_PLAIN = re.compile(f"[{''.join(char for char in _PLAIN if ord(char) < 0x10000)}\U0001d7ce-\U0001d7ff]")
_DASH = re.compile("[\u2012\u2013\u2212]")  # hyphens in numbers alone: between words they part sentences
_IP6_PUBLIC = ipaddress.ip_network("2000::/3")  # IANA's global unicast; "dead::beef" and "a::b" are no addresses
_EXAMPLES = (".example", ".invalid", ".test", ".localhost", ".example.com", ".example.org", ".example.net")

# Characters of an IBAN by country, from SWIFT's registry.
_IBAN_CHARS = {
    country: int(length)
    for length, countries in {
        "15": "NO", "16": "BE", "18": "DK FK FI FO GL NL SD", "19": "MK SI", "20": "AT BA EE KZ LT LU MN XK",
        "21": "CH HR LI LV", "22": "BG BH CR DE GB GE IE ME RS VA", "23": "AE GI IL IQ OM SO TL",
        "24": "AD CZ ES MD PK RO SA SE SK TN VG", "25": "LY PT ST", "26": "IS TR", "27": "BI DJ FR GR IT MC MR SM",
        "28": "AL AZ BY CY DO GT HN HU LB NI PL SV", "29": "BR EG PS QA UA", "30": "JO KW MU YE", "31": "MT SC", "32": "LC",
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
    if not text.isascii():
        text = _NOT_PLAIN.sub(lambda match: _PLAIN[match[0]], text)
    numbers = _DASH.sub("-", text)
    for kind in KINDS:
        spans = sorted(set(_spans(kind, text if kind in ("email", "secret") else numbers, region)))
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
        return
    found = {"email": _emails, "iban": _ibans, "card": _cards, "ip": _ips}.get(kind)
    yield from (Span(kind, a, b) for a, b in (_phones(text, region) if found is None else found(text)))


def _matches(name: str, text: str) -> Iterator[tuple[int, int]]:
    return (match.span() for match in _form(name).finditer(text))


@cache
def _form(name: str) -> Any:
    try:
        import re2
    except ImportError as error:
        raise DependencyError("the check `personal` needs google-re2: pip install 'kdata[hygiene]'") from error
    patterns = {
        "email": _EMAIL, "iban": _IBAN, "card": _CARD, "ip4": _IP4, "ip6": _IP6, "phone": _PHONE,
        "secret": ANY_FORM,
    }  # fmt: skip
    return re2.compile(patterns[name])


def _goes_on(char: str) -> bool:
    """Whether a number that this character touches is part of something longer: a digit, or a letter of two cases."""
    return char.isalnum() and (char.isascii() or char.isdigit() or char.lower() != char.upper())


def _emails(text: str) -> Iterator[tuple[int, int]]:
    if "@" not in text:
        return
    for begin, end in _matches("email", text):
        domain = text[begin:end].rpartition("@")[2].lower()
        own = _email_begin(text, begin, end - len(domain) - 1)
        before, after = text[own - 1 : own] if own == begin else "", text[end : end + 1]
        # Where a script has no spaces, the next word follows at once.
        is_whole = not (before.isalnum() or before == "@" or (after.isascii() and after.isalnum()) or after == "@")
        is_example = f".{domain}".endswith(_EXAMPLES)
        if own < end - len(domain) - 1 and is_whole and ".." not in text[own:end] and not is_example:
            yield own, end


def _email_begin(text: str, begin: int, at: int) -> int:
    """Where a local part begins: behind whatever is neither ASCII, nor a mark, nor a letter with two cases (quotes, kana)."""
    for place in range(at - 1, begin - 1, -1):
        char = text[place]
        if not (char.isascii() or char.lower() != char.upper() or unicodedata.category(char)[0] == "M"):
            begin = place + 1
            while begin < at and (text[begin] in ".%+-" or unicodedata.category(text[begin])[0] == "M"):
                begin += 1  # marks here belong to the letter that is left out
            break
    return begin


def _ibans(text: str) -> Iterator[tuple[int, int]]:
    last = 0
    for begin, _ in _matches("iban", text):
        end = _iban_end(text, begin) if begin >= last else None
        if end is not None:
            yield begin, end
            last = end


def _iban_end(text: str, begin: int) -> int | None:
    """Where the IBAN ends that begins here; None where there is none."""
    wanted = _IBAN_CHARS.get(text[begin : begin + 2])
    if wanted is None or _goes_on(text[begin - 1 : begin]):
        return None
    compact, place = "", begin
    while len(compact) < wanted:
        place += text[place : place + 1] == " " and bool(compact)
        char = text[place : place + 1]
        if not ("A" <= char <= "Z" or "0" <= char <= "9"):
            return None
        compact, place = compact + char, place + 1
    number = "".join(str(int(char, 36)) for char in compact[4:] + compact[:4])
    return place if int(number) % 97 == 1 and not _goes_on(text[place : place + 1]) else None


def _cards(text: str) -> Iterator[tuple[int, int]]:
    for begin, end in _matches("card", text):
        groups = [(begin + match.start(), begin + match.end()) for match in _DIGITS.finditer(text[begin:end])]
        first = 0
        while first < len(groups):
            counts = [b - a for a, b in groups[first : first + 5]]
            shapes = [len(shape) for shape in _CARD_GROUPS if tuple(counts[: len(shape)]) == shape]
            if first == 0 and 13 <= sum(b - a for a, b in groups[:19]) <= 19 >= len(groups):
                shapes.insert(0, len(groups))  # all of it, in whatever groups
            if 13 <= counts[0] <= 19:
                shapes.append(1)
            ends = (first + shape for shape in shapes)
            last = next((n for n in ends if _is_card(text, groups[first][0], groups[n - 1][1])), None)
            if last is not None:
                yield groups[first][0], groups[last - 1][1]
            first = first + 1 if last is None else last


def _is_card(text: str, begin: int, end: int) -> bool:
    digits = text[begin:end].replace(" ", "").replace("-", "")
    goes_on = text[begin - 2 : begin][:1].isdigit() and text[begin - 1] in "-."
    goes_on = goes_on or (text[end : end + 1] in ("-", ".") and text[end + 1 : end + 2].isdigit())
    goes_on = goes_on or _goes_on(text[begin - 1 : begin]) or _goes_on(text[end : end + 1])
    return not goes_on and _has_issuer(digits) and _luhn(digits)


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


def _ips(text: str) -> Iterator[tuple[int, int]]:
    for begin, end in _matches("ip4", text):
        # A port may follow, and a name with a colon go before it.
        if _is_ip(text, begin, end, port=True) and text[begin - 2 : begin] != "::":
            yield begin, end
    for begin, end in _matches("ip6", text):
        own = begin + (text[begin] == ":" and text[begin + 1] != ":")
        last = end - (text[end - 1] == ":" and text[end - 2] != ":")
        if _is_ip(text, own, last, port=own > begin or last < end):
            yield own, last


def _is_ip(text: str, begin: int, end: int, *, port: bool) -> bool:
    """Whether a span is a public address.

    Args:
        port: whether a colon may touch it.
    """
    before, after = text[begin - 1 : begin], text[end : end + 2]
    if before and (_goes_on(before) or before == "." or (before == ":" and not port)):
        return False
    if after and (_goes_on(after[0]) or (after[0] == ":" and not port) or (after[0] == "." and _goes_on(after[1:]))):
        return False
    try:
        address = ipaddress.ip_address(text[begin:end])
    except ValueError:
        return False
    address = getattr(address, "ipv4_mapped", None) or address
    return address.is_global and not address.is_multicast and (address.version == 4 or address in _IP6_PUBLIC)


def _phones(text: str, region: str | None) -> Iterator[tuple[int, int]]:
    last = 0
    for begin, _ in _matches("phone", text):
        if begin >= last and (match := _INTERNATIONAL_FORM.match(text, begin)):
            end = _phone_end(text, *match.span(), None)
            if end is not None:
                yield begin, end
                last = end
    place = 0
    while region is not None and (match := _NATIONAL_FORM.search(text, place)):
        end = _phone_end(text, *match.span(), region)
        if end is not None:
            yield match.start(), end
        # Not from each group inside of what is none: a long table of numbers would take minutes.
        place = match.end() if end is None else end


def _phone_end(text: str, begin: int, end: int, region: str | None) -> int | None:
    """Where the number ends that begins at a candidate's begin: between groups, the last such place; None where none is.

    A last group of one or two digits behind a space is another number ("17 Uhr") where the one without it is written in
    the groups of its country. Without a country code a number that stands in a longer row of numbers has to be written in
    these groups: cut out anywhere, three years or two cells of a table are a valid number, too.
    """
    before = text[begin - 1 : begin]
    if _goes_on(before) or before == "+":
        return None
    ends = [begin + match.end() for match in _DIGITS.finditer(text[begin:end])][::-1]
    follows = region is not None and _NUMBER_BEFORE.search(text[max(begin - 3, 0) : begin])
    for number, own in enumerate(ends):
        groups = _phone(text, begin, own, region)
        if groups is None:
            continue
        in_row = follows or (region is not None and _NUMBER_BEHIND.match(text, own))
        if in_row and groups != _groups(text[begin:own]):
            continue
        if number + 1 < len(ends):
            shorter = ends[number + 1]
            is_apart = text[shorter] == " " and own - shorter <= 3
            if is_apart and _phone(text, begin, shorter, region) == _groups(text[begin:shorter].removeprefix("00")):
                return shorter
        return own
    return None


def _groups(number: str) -> list[str]:
    return _DIGITS.findall(number)


def _phone(text: str, begin: int, end: int, region: str | None) -> list[str] | None:
    """Groups of digits in which the country of a valid number writes it; None where a span is none."""
    try:
        import phonenumbers
    except ImportError as error:
        raise DependencyError("the check `personal` needs phonenumbers: pip install 'kdata[hygiene]'") from error
    candidate = text[begin:end]
    if _goes_on(text[end : end + 1]) or text[end : end + 1] == "+" or sum(map(str.isdigit, candidate)) < 7:
        return None
    if candidate.startswith("00"):
        candidate = "+" + candidate[2:]
    elif not candidate.startswith("+") and not {" ", "-", ")", "/", "."} & set(candidate):
        return None  # a plain run of digits is any number
    is_international = candidate.startswith("+")
    try:
        number = phonenumbers.parse(candidate, None if is_international else region)
    except phonenumbers.NumberParseException:
        return None
    if not phonenumbers.is_valid_number(number):
        return None
    form = phonenumbers.PhoneNumberFormat
    return _groups(phonenumbers.format_number(number, form.INTERNATIONAL if is_international else form.NATIONAL))
