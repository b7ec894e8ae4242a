"""Mathematical answers: the number that one states, without a hedge, and its plain letters."""

from __future__ import annotations

import re
from fractions import Fraction

from mmdlm.tasks.countdown import worth

LONGEST = 1000  # digits of a number that is looked at
# A minus belongs to a number unless it takes it from, or ties it to, what stands before.
NUMBER = re.compile(
    r"(?:(?<![\w)\]}.])-\s?\$?)?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|(?<!\d)-?\.\d+"
)
TYPESET = str.maketrans(
    {
        **dict.fromkeys("\N{MINUS SIGN}\N{EN DASH}", "-"),
        **dict.fromkeys("\N{LEFT SINGLE QUOTATION MARK}\N{RIGHT SINGLE QUOTATION MARK}", "'"),
        **dict.fromkeys("\N{LEFT DOUBLE QUOTATION MARK}\N{RIGHT DOUBLE QUOTATION MARK}", '"'),
        **dict.fromkeys("\N{MULTIPLICATION SIGN}\N{MIDDLE DOT}\N{DOT OPERATOR}", "*"),
        "\N{DIVISION SIGN}": "/",
    }
)

_SMALL = (
    "\u00b2\u00b3\u00b9\u2070-\u209f\u00bc-\u00be\u2150-\u218f"  # digits above, below, in halves
)
_LETTER = rf"[^\W\d_{_SMALL}]"
# Typography that changes no number -> what is left of it.
_TYPOGRAPHY = (
    (re.compile(r"</?[a-zA-Z]\w*>"), "\n"),
    (re.compile(r"\\(?:(?:text|math)(?:bf|it|rm|sf|tt)?|f?box(?:ed)?)\s*\{([^{}]*)\}"), r" \1 "),
    (re.compile(r"(\*{1,3}|_{1,3}|`{1,3})(?=\S)([^*_`]*)(?<=\S)\1"), r"\2"),
    (re.compile(r"\^\s*\{?\s*\\circ\s*\}?"), "°"),
    (re.compile(r"\\[()\[\],;:! ]|\\(?:left|right|quad|displaystyle)\b"), " "),
    (re.compile(r"\\([%$])"), r"\1"),
    (re.compile(r"\{,\}"), ","),
    (re.compile(rf"(?<={_LETTER})\s*(?:\^\s*(?:\{{\s*[23]\s*\}}|[23](?!\d))|[²³])"), " "),  # m^2
)
_FRACTION = re.compile(
    r"(-?)\s?\\[dt]?frac\s*\{\s*(-?\d+)\s*\}\s*\{\s*(\d+)\s*\}|(?<![\w.)])(-?)\s?(\d+)\s?/\s?(\d+)"
)
_NUMBER = re.compile(rf"{_FRACTION.pattern}|(?P<plain>{NUMBER.pattern})")
_MARK = rf"{_LETTER}|[\s'\",.;:()\[\]{{}}$€£%°&#]"  # letters, and marks that change no number
_BEFORE = re.compile(rf"(?:{_MARK}|(?<={_LETTER})-(?={_LETTER})|(?<=\s)-+(?=\s))*")
_UNIT = (
    r"(?:[km]?g|[kcm]?m|m?l|h|hrs?|hours?|mins?|minutes?|s|secs?|ft|in|lbs?|oz|mph|st|nd|rd|th)\b"
)
_AFTER = re.compile(
    rf"(?:{_UNIT})?(?!{_LETTER})(?:{_MARK}|/(?=\s?{_LETTER})|-(?=\s?{_LETTER}{{2}}))*",
    re.IGNORECASE,
)
_TIED = re.compile(r"[\w-]\Z")  # what a number must not hang on
_CURRENCY = re.compile(r"\b(?:usd|eur|gbp|rs)\Z", re.IGNORECASE)
# Words that leave open what the answer is, or say what it is not.
_HEDGE = re.compile(
    r"\b(?:not|never|neither|nor|cannot|cant|or|either|maybe|perhaps|possibly|probably|might|"
    r"could\s+be|approx|approximately|roughly|unsure|unlikely|impossible|doubt\w*|guess\w*|wrong|"
    r"incorrect|false|except|excluding|instead|unless|if|between|versus|vs|unknown)\b|n't\b",
    re.IGNORECASE,
)
# Words that make another number of it.
_CHANGE = re.compile(
    r"\b(?:minus|negative|plus|divided|multiplied|squared|cubed|factorial|half|twice|double|triple|"
    r"root|sqrt|log|power|hundred|thousand|million|billion|trillion)\b",
    re.IGNORECASE,
)
_RIGHT_BEFORE = re.compile(
    r"\b(?:over|under|above|below|than|least|most|about|around|nearly|almost|circa|no|non|times|but|"
    r"without|up\s+to|until)\W*\Z",
    re.IGNORECASE,
)
# Signs that do so.
_DOUBT = re.compile(r"\\(?:neq?|not|approx|sim|simeq|cong)(?![a-zA-Z])|[?≠≈~]")
# Another number, and nothing but a sign between: 10:18, 7-18, 5^18, 3 x 18, "7, 18", "7 and 18".
_LISTED = re.compile(r"\d\s*(?:[^\w\s=.:]|[.:](?!\s)|x\s|and\s|to\s)[^\w=]*\Z", re.IGNORECASE)
_ENDS = re.compile(r"[.!?;\n](?=\s|$)")  # of a sentence
_PAUSES = re.compile(r"[.!?;\n,:](?=\s|$)")  # of a clause
_ARITHMETIC = re.compile(r"(?<![\w+*/^-])[\d(.$][\d+\-*/().,$\s]*\Z")


def stated_number(answer: str) -> str | None:
    r"""Return the one number of a marked answer in plain digits; None where it states none.

    Words and units may stand around it ("$18", "18.00", "it is **18** dollars", "x = 18"), but no
    second number, no operator ("18!", "5^18", "10:18"), and no word that hedges or negates. Of an
    equation both sides are looked at: "6*3 = 18" states 18, "5*3 = 18" states nothing.
    """
    text = _plain(answer)
    *lefts, right = re.split("=+", text)
    numbers = list(_NUMBER.finditer(right))
    if len(numbers) != 1 or _HEDGE.search(text) or _CHANGE.search(text):
        return None
    number = numbers[0]
    before, after = right[: number.start()], right[number.end() :]
    if not _stands_alone(re.sub(r"\A\s*\+\s*\Z", "", before), after):
        return None
    for left in lefts:
        if re.search(r"\d", left):
            if _value(left) != value_of(number[0]):
                return None
        elif not _BEFORE.fullmatch(left):
            return None
    return _digits(number[0])


def concluded_number(text: str) -> str | None:
    """Return the last number of a free text in plain digits; None where the text does not state it.

    Other numbers may stand before it, but no operator beside it, no list or range that it ends, and
    no word in its clause that hedges or negates.
    """
    text = _plain(text)
    numbers = list(_NUMBER.finditer(text))
    if not numbers:
        return None
    number = numbers[-1]
    earlier = text[: number.start()]
    clause = earlier[max((one.end() for one in _PAUSES.finditer(earlier)), default=0) :]
    end = _ENDS.search(text, number.end())
    after = text[number.end() : len(text) if end is None else end.start()]
    if end is not None and (end[0] == "?" or (end[0] == "!" and not after)):
        return None
    before = re.split(r"[\d=]", clause)[-1]
    if _HEDGE.search(f"{clause} 0 {after}") or _CHANGE.search(f"{before} 0 {after}"):
        return None
    if _LISTED.search(earlier) or not _stands_alone(before, after):
        return None
    left = _ARITHMETIC.search(clause.rpartition("=")[0][-200:])
    if left is not None and re.search(r"[+*/-]", left[0]):
        value = _value(left[0])
        if value is not None and value != value_of(number[0]):
            return None
    return _digits(number[0])


def is_doubtful(text: str) -> bool:
    """Whether a text hedges or negates, or is an equation of numbers that does not hold."""
    text = _plain(text)
    sides = (_value(side) for side in re.split("=+", text))
    worths = {value for value in sides if value is not None}
    return bool(_HEDGE.search(text) or _DOUBT.search(text)) or len(worths) > 1


def value_of(number: str) -> Fraction | None:
    """Return what a number as it is written is worth, exactly; None for a division by 0."""
    if len(number) > LONGEST:
        return None
    fraction = _FRACTION.fullmatch(number)
    if fraction is None:
        return Fraction(_digits(number))
    sign, above, below = (part for part in fraction.groups() if part is not None)
    value = None if int(below) == 0 else Fraction(int(above), int(below))
    return -value if sign and value is not None else value


def _digits(number: str) -> str:
    """Return a number without thousands, spaces and currency."""
    return re.sub(r"[,\s$]", "", number)


def _plain(text: str) -> str:
    """Return the text without typography."""
    text = text.translate(TYPESET)
    for pattern, replacement in _TYPOGRAPHY:
        text = pattern.sub(replacement, text)
    return text


def _stands_alone(before: str, after: str) -> bool:
    """Whether nothing around a number makes another one of it, or takes it back."""
    if _TIED.search(before) and not _CURRENCY.search(before):
        return False
    fits = _BEFORE.fullmatch(before) and _AFTER.fullmatch(after)
    return bool(fits) and not _RIGHT_BEFORE.search(before)


def _value(expression: str) -> Fraction | None:
    """Return what a side of an equation is worth; decimals and thousands are read, too."""
    expression = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", expression.strip().strip("$"))
    expression = re.sub(r"(?<=[\d\s)])x(?=[\d\s(])", "*", expression)
    exact = re.sub(r"(\d*)\.(\d+)", lambda m: f"({m[1] or 0}{m[2]}/1{'0' * len(m[2])})", expression)
    found = worth(exact)
    return None if found is None else found.value


def plain(answer: str) -> str:
    """Return the answer without what is only its typography."""
    answer = " ".join(answer.split()).removeprefix("$").removesuffix("$").strip()
    answer = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", answer)
    return answer.removesuffix(".").strip()
