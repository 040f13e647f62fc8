"""The forms of names and actions: without articles, in the singular, with the verb in "-ing"."""

from __future__ import annotations

import functools
import re
from typing import Any

from scenarioclip_fast.data.texts import normalise
from scenarioclip_fast.requirements import require

_ARTICLES = ("a ", "an ", "the ", "some ")


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# A name's head is the word before the first of these: "pieces of cake".
_LINKS = _words("at for from in near of on to under with")

# inflect takes these for plurals, or their singular is another thing. Words in -us, -is and -ss are kept by rule.
_KEPT = _words(
    """
    adidas alias athletics atlas barracks bias billiards binoculars bellows briefs canvas chaos
    christmas cleats clothes cosmos crossroads cutoffs darts data dice dregs dungarees earphones earbuds
    economics electronics fries gallows gas glasses goggles graphics groceries gymnastics headphones headquarters
    innings jeans kudos leggings lens madras mathematics means media molasses outskirts overalls pajamas pancreas
    pants pathos physics pliers pyjamas remains rhinoceros savings scissors series shades shears shorts species
    spectacles stairs suds sunglasses eyeglasses sweats surroundings sweatpants texas thanks thermos tights tongs
    trousers tweezers underpants waterworks
    """
)
_SINGULARS = {
    "aunties": "auntie", "birdies": "birdie", "cacti": "cactus", "cookies": "cookie", "doggies": "doggie",
    "emus": "emu", "fungi": "fungus", "genies": "genie", "gnus": "gnu", "hippies": "hippie", "hoodies": "hoodie",
    "indices": "index", "matrices": "matrix", "menus": "menu", "bayous": "bayou", "caribous": "caribou",
    "gurus": "guru", "haikus": "haiku", "tofus": "tofu", "tutus": "tutu", "plateaus": "plateau", "bureaus": "bureau",
    "busses": "bus", "bikinis": "bikini", "zucchinis": "zucchini", "kiwis": "kiwi", "rabbis": "rabbi", "skis": "ski",
    "jet-skis": "jet-ski", "taxis": "taxi", "safaris": "safari",
    "martinis": "martini", "paninis": "panini", "alibis": "alibi",
    "khakis": "khakis", "selfies": "selfie", "smoothies": "smoothie", "veggies": "veggie", "vertices": "vertex",
    "waltzes": "waltz", "yuppies": "yuppie", "hankies": "hankie", "townies": "townie", "foodies": "foodie",
    "buddies": "buddy", "passers-by": "passer-by", "passersby": "passerby", "runners-up": "runner-up",
}  # fmt: skip

_PASTS = {
    "ate": "eating", "beat": "beating", "began": "beginning", "bent": "bending", "blew": "blowing",
    "broke": "breaking", "brought": "bringing", "built": "building", "bought": "buying", "caught": "catching",
    "chose": "choosing", "came": "coming", "crept": "creeping", "dealt": "dealing", "did": "doing", "drew": "drawing",
    "drank": "drinking", "drove": "driving", "dug": "digging", "fed": "feeding", "fought": "fighting",
    "fled": "fleeing", "flew": "flying", "flung": "flinging", "forgot": "forgetting", "froze": "freezing",
    "gave": "giving", "got": "getting", "grew": "growing", "had": "having", "held": "holding", "hid": "hiding",
    "hung": "hanging", "heard": "hearing", "kept": "keeping", "knelt": "kneeling", "knew": "knowing",
    "leapt": "leaping", "leant": "leaning", "led": "leading", "lit": "lighting", "lost": "losing", "made": "making",
    "met": "meeting", "overtook": "overtaking", "paid": "paying", "ran": "running", "rang": "ringing",
    "rode": "riding", "sang": "singing", "sat": "sitting", "sent": "sending", "shook": "shaking",
    "shone": "shining", "shot": "shooting", "slept": "sleeping", "slid": "sliding", "slung": "slinging",
    "sold": "selling", "spent": "spending", "spoke": "speaking", "spun": "spinning", "spat": "spitting",
    "sprang": "springing", "stole": "stealing", "stood": "standing", "struck": "striking", "stuck": "sticking",
    "strode": "striding", "swam": "swimming", "swept": "sweeping", "swung": "swinging", "taught": "teaching",
    "threw": "throwing", "told": "telling", "took": "taking", "tore": "tearing", "understood": "understanding",
    "wept": "weeping", "went": "going", "withdrew": "withdrawing", "woke": "waking", "won": "winning",
    "wore": "wearing", "wove": "weaving", "wrote": "writing",
    # Regular pasts whose form in "-ing" is not that of the rules below.
    "dyed": "dyeing", "eyed": "eyeing", "singed": "singeing", "skied": "skiing", "taxied": "taxiing",
}  # fmt: skip

# Words in "-ed" that are no pasts; of those in "-eed", only the ones in _EED_PASTS are.
_NO_PASTS = _words(
    """
    aged bed biped crooked cursed embed hatred hotbed hundred infrared jagged kindred learned linseed moped naked
    newlywed quadruped ragged red rugged sacred seabed shed sled sunbed unwed watershed waterbed wed
    wicked wretched zed
    """
)
_EED_PASTS = _words("agreed decreed disagreed freed guaranteed kneed pedigreed peed refereed teed treed")

# Verbs of several syllables with the stress on another than the last.
_SINGLE = _words("enter cover open offer order water visit follow gather happen listen edit exit utter")


def clean_name(text: str) -> str:
    """`normalise`, without leading articles. The result can be empty."""
    text = normalise(text)
    while (start := next((a for a in _ARTICLES if text.startswith(a)), None)) is not None:
        text = text.removeprefix(start)
    return text


@functools.lru_cache(maxsize=1 << 16)
def singular(name: str) -> str:
    """The singular of a name in lower case: of its head, the last word or the one before a preposition.

    >>> singular("young men"), singular("pieces of cake"), singular("scissors")
    ('young man', 'piece of cake', 'scissors')
    """
    words = name.split(" ")
    head = next((i for i, word in enumerate(words[1:]) if word in _LINKS), len(words) - 1)
    words[head] = _singular_word(words[head])
    return " ".join(words)


def _singular_word(word: str) -> str:
    last = re.split(r"[-/]", word)[-1]
    if word in _SINGULARS:
        return _SINGULARS[word]
    if last in _SINGULARS:
        return word.removesuffix(last) + _SINGULARS[last]
    # "bus", "tennis", "glass"; no possessives, abbreviations and numbers.
    if last in _KEPT or last.endswith(("us", "is", "ss")) or len(last) < 4 or not last.isalpha():
        return word if last != "men" else word.removesuffix("men") + "man"
    found = _inflect().singular_noun(last)
    return word.removesuffix(last) + found if found else word


@functools.cache
def _inflect() -> Any:
    return require("inflect").engine()


@functools.lru_cache(maxsize=1 << 16)
def gerund(action: str) -> str:
    """An action in lower case whose first word is a past, with that word in "-ing"; others as they are.

    >>> gerund("played football"), gerund("rode a horse"), gerund("red carpet")
    ('playing football', 'riding a horse', 'red carpet')
    """
    first, space, rest = action.partition(" ")
    return f"{_gerund_word(first)}{space}{rest}"


def _gerund_word(word: str) -> str:
    if word in _PASTS:
        return _PASTS[word]
    if not word.endswith("ed") or len(word) < 4 or word in _NO_PASTS or not re.search("[aeiouy]", word[:-2]):
        return word
    if word.endswith("eed"):
        return f"{word[:-1]}ing" if word in _EED_PASTS else word
    if word.endswith("ied"):  # tied, cried
        return f"{word[:-3]}ying"
    if word.endswith("oed"):  # canoed
        return f"{word[:-1]}ing"
    return f"{word[:-2]}ing"  # played, hiked, stopped


@functools.lru_cache(maxsize=1 << 16)
def present_participle(verb: str) -> str | None:
    """The form in "-ing" of a verb in the third person or the past; None if `verb` is neither.

    >>> present_participle("holds"), present_participle("sits"), present_participle("carried")
    ('holding', 'sitting', 'carrying')
    """
    if (found := _gerund_word(verb)) != verb:
        return found
    if not verb.endswith("s") or verb.endswith("ss") or len(verb) < 4:
        return None
    if verb.endswith("ies"):
        return f"{verb[:-3]}ying"
    base = verb[:-2] if verb.endswith(("ches", "shes", "sses", "xes", "zes", "oes")) else verb[:-1]
    if base.endswith("e") and not base.endswith(("ee", "oe", "ye")):
        return f"{base[:-1]}ing"
    doubled = re.search(r"(?<![aeiou])[aeiou][bdgmnprt]$", base) and base not in _SINGLE
    return f"{base}{base[-1] if doubled else ''}ing"
