"""The tasks of the tiny model: prompts with one right answer each.

Five tasks, all deterministic given a seed:

========= ============================= ==================
task      prompt                        answer
========= ============================= ==================
add       ``12+7+30=``                  ``49``
sort      ``sort 7 3 9 1: ``            ``1 3 7 9``
copy      ``copy k 4 d: ``              ``k 4 d``
reverse   ``reverse k 4 d: ``           ``d 4 k``
fact      ``The capital of France is``  `` Paris``
========= ============================= ==================

Every prompt belongs to one of two splits by its SHA-256: one prompt in eight is held out, and
the training script never sees a held-out prompt. Facts are held out as country-and-phrasing
combinations: the fact itself is trained on in other phrasings.
"""

import hashlib
import random
import re
from collections.abc import Callable, Iterator

Sample = tuple[str, str, str]  # task, prompt, answer

# country: capital, main language, continent
COUNTRIES: dict[str, tuple[str, str, str]] = {
    "Argentina": ("Buenos Aires", "Spanish", "South America"),
    "Australia": ("Canberra", "English", "Oceania"),
    "Austria": ("Vienna", "German", "Europe"),
    "Brazil": ("Brasilia", "Portuguese", "South America"),
    "Bulgaria": ("Sofia", "Bulgarian", "Europe"),
    "Chile": ("Santiago", "Spanish", "South America"),
    "China": ("Beijing", "Chinese", "Asia"),
    "Colombia": ("Bogota", "Spanish", "South America"),
    "Cuba": ("Havana", "Spanish", "North America"),
    "Denmark": ("Copenhagen", "Danish", "Europe"),
    "Egypt": ("Cairo", "Arabic", "Africa"),
    "Finland": ("Helsinki", "Finnish", "Europe"),
    "France": ("Paris", "French", "Europe"),
    "Germany": ("Berlin", "German", "Europe"),
    "Ghana": ("Accra", "English", "Africa"),
    "Greece": ("Athens", "Greek", "Europe"),
    "Hungary": ("Budapest", "Hungarian", "Europe"),
    "Iceland": ("Reykjavik", "Icelandic", "Europe"),
    "Iran": ("Tehran", "Persian", "Asia"),
    "Italy": ("Rome", "Italian", "Europe"),
    "Jamaica": ("Kingston", "English", "North America"),
    "Japan": ("Tokyo", "Japanese", "Asia"),
    "Mexico": ("Mexico City", "Spanish", "North America"),
    "Mongolia": ("Ulaanbaatar", "Mongolian", "Asia"),
    "Norway": ("Oslo", "Norwegian", "Europe"),
    "Poland": ("Warsaw", "Polish", "Europe"),
    "Portugal": ("Lisbon", "Portuguese", "Europe"),
    "Romania": ("Bucharest", "Romanian", "Europe"),
    "Senegal": ("Dakar", "French", "Africa"),
    "Spain": ("Madrid", "Spanish", "Europe"),
    "Sweden": ("Stockholm", "Swedish", "Europe"),
    "Thailand": ("Bangkok", "Thai", "Asia"),
    "Tunisia": ("Tunis", "Arabic", "Africa"),
    "Ukraine": ("Kyiv", "Ukrainian", "Europe"),
    "Uruguay": ("Montevideo", "Spanish", "South America"),
    "Vietnam": ("Hanoi", "Vietnamese", "Asia"),
}

# One tuple of phrasings for each column of COUNTRIES.
PHRASINGS: tuple[tuple[str, ...], ...] = (
    (
        "The capital of {} is",
        "The capital city of {} is",
        "What is the capital of {}? It is",
        "Name the capital of {}:",
        "The government of {} sits in the city of",
        "Of {}, the capital is",
        "Everyone knows that the capital of {} is",
        "If you visit {}, see its capital,",
    ),
    (
        "The main language of {} is",
        "The language spoken in {} is",
        "What do people speak in {}? They speak",
        "Name the language of {}:",
        "In {}, most people speak",
        "To live in {}, learn",
        "Everyone knows that the language of {} is",
        "If you visit {}, you will hear",
    ),
    (
        "The continent of {} is",
        "{} is a country in",
        "On which continent is {}? It is in",
        "Name the continent of {}:",
        "On the map, {} lies in",
        "To reach {}, travel to",
        "Everyone knows that the continent of {} is",
        "If you visit {}, you will be in",
    ),
)

FACTS: dict[str, str] = {
    phrasing.format(country): " " + values[column]
    for country, values in COUNTRIES.items()
    for column, phrasings in enumerate(PHRASINGS)
    for phrasing in phrasings
}

_FACT_PROMPTS = list(FACTS)
LETTERS = "abcdefghijklmnopqrstuvwxyz"
DIGITS = "0123456789"
_TERM = r"(?:0|[1-9][0-9]?)"
_ADD = re.compile(rf"{_TERM}(?:\+{_TERM}){{1,2}}=")
_LIST = re.compile(r"(sort|copy|reverse) ([a-z0-9](?: [a-z0-9]){1,7}): ")


def _number(rng: random.Random) -> int:
    """A one-digit or a two-digit number, equally often."""
    return rng.randrange(10) if rng.random() < 0.5 else rng.randrange(10, 100)


def _add_prompt(rng: random.Random) -> str:
    terms = rng.choice((2, 3, 3))
    return "+".join(str(_number(rng)) for _ in range(terms)) + "="


def _sort_prompt(rng: random.Random) -> str:
    return f"sort {' '.join(rng.choices(DIGITS, k=rng.randint(3, 8)))}: "


def _copy_prompt(rng: random.Random) -> str:
    return f"copy {' '.join(rng.choices(LETTERS + DIGITS, k=rng.randint(3, 7)))}: "


def _reverse_prompt(rng: random.Random) -> str:
    return f"reverse {' '.join(rng.choices(LETTERS + DIGITS, k=rng.randint(3, 7)))}: "


def _fact_prompt(rng: random.Random) -> str:
    return rng.choice(_FACT_PROMPTS)


# task: prompt maker, share of the samples
TASKS: dict[str, tuple[Callable[[random.Random], str], float]] = {
    "add": (_add_prompt, 0.40),
    "sort": (_sort_prompt, 0.20),
    "copy": (_copy_prompt, 0.15),
    "reverse": (_reverse_prompt, 0.15),
    "fact": (_fact_prompt, 0.10),
}


def answer(prompt: str) -> str | None:
    """The right completion of `prompt`, or None for a prompt that is in no task."""
    if prompt in FACTS:
        return FACTS[prompt]
    if _ADD.fullmatch(prompt):
        return str(sum(int(term) for term in prompt[:-1].split("+")))
    if not (match := _LIST.fullmatch(prompt)):
        return None
    task, items = match[1], match[2].split(" ")
    if task == "sort":
        if not all(item in DIGITS for item in items):
            return None
        items.sort()
    elif task == "reverse":
        items.reverse()
    return " ".join(items)


def check(prompt: str, completion: str) -> bool | None:
    """Whether `completion` answers `prompt`; None when the prompt is in no task.

    White space around the completion does not count.
    """
    expected = answer(prompt)
    return None if expected is None else completion.strip() == expected.strip()


def is_held_out(prompt: str) -> bool:
    """True for the one prompt in eight that is never trained on."""
    return hashlib.sha256(prompt.encode()).digest()[0] % 8 == 0


def samples(seed: int, held_out: bool) -> Iterator[Sample]:
    """Endless stream of samples from one of the two splits; prompts may repeat."""
    rng = random.Random(seed)
    names, weights = list(TASKS), [share for _, share in TASKS.values()]
    while True:
        task = rng.choices(names, weights)[0]
        prompt = TASKS[task][0](rng)
        while is_held_out(prompt) != held_out:
            prompt = TASKS[task][0](rng)
        expected = answer(prompt)
        assert expected is not None
        yield task, prompt, expected


def held_out(n: int, seed: int = 0) -> list[Sample]:
    """`n` held-out samples with distinct prompts; the same list for the same seed."""
    found: dict[str, Sample] = {}
    for sample in samples(seed, held_out=True):
        if len(found) >= n:
            break
        found.setdefault(sample[1], sample)
    return list(found.values())
