"""The quickstart's data: the handbook of a company that does not exist, made from a seed.

A base model cannot know a word of it, so what it answers after training was learned from these rows. Three tasks:

    facts     120 facts (12 relations x 10 things), each asked in 6 phrasings; held out: 2 phrasings of each
              relation that no training row of it uses, so a right answer is no remembered line
    records   a structured record -> a sentence; held out: records whose part number and whose combination of the other
              values never occur in training, with three reference sentences each
    sums      ends and starts of shifts, prices with delivery; held out: operands that never occur together in training

Everything is invented and drawn with `random.Random(seed)`: same seed, same bytes, on any machine. It is a small and
tidy world with one right answer to a question: it shows that training works, and says nothing about how good a method
is on real text.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice, product
from pathlib import Path

Row = dict[str, str | list[str]]


@dataclass(frozen=True, slots=True)
class HandbookFiles:
    """The JSONL files of one handbook. Rows: `prompt`, `response`, `task`, and `references` where several are right.

    evaluation: everything held out, the three tasks one after another.
    """

    train: Path
    facts_eval: Path
    records_eval: Path
    sums_eval: Path
    evaluation: Path


@dataclass(frozen=True, slots=True)
class Relation:
    """One kind of fact about `things` of the handbook, and the ways to ask for it.

    Attributes:
        answer: with `{}` for the value.
        numbers: the values are drawn from them; None: they are people.
        training, held_out: questions, with `{}` for the thing.
    """

    things: Sequence[str]
    answer: str
    numbers: range | None
    training: Sequence[str]
    held_out: Sequence[str]


def write_handbook(folder: Path, *, seed: int = 0) -> HandbookFiles:
    """Write the five JSONL files into `folder` (made when missing) and return their paths.

    1,180 training rows; 240 + 40 + 60 held-out rows. Another seed gives other facts, records and sums.
    """
    folder.mkdir(parents=True, exist_ok=True)
    chance = random.Random(seed)
    facts, facts_eval = _facts(chance)
    records, records_eval = _records(chance)
    sums, sums_eval = _sums(chance)
    train = facts + records + sums
    chance.shuffle(train)
    return HandbookFiles(
        train=_write(folder / "train.jsonl", train),
        facts_eval=_write(folder / "facts_eval.jsonl", facts_eval),
        records_eval=_write(folder / "records_eval.jsonl", records_eval),
        sums_eval=_write(folder / "sums_eval.jsonl", sums_eval),
        evaluation=_write(folder / "evaluation.jsonl", [*facts_eval, *records_eval, *sums_eval]),
    )


def _write(path: Path, rows: Iterable[Row]) -> Path:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_bytes(text.encode("utf-8"))
    return path


def _row(task: str, prompt: str, responses: Sequence[str]) -> Row:
    row: Row = {"prompt": prompt, "response": responses[0], "task": task}
    return row if len(responses) == 1 else {**row, "references": list(responses)}


# -- facts ---------------------------------------------------------------------------------------------------------

DEPARTMENTS = (
    "Calibration", "Glassware", "Dispatch", "Optics", "Tooling",
    "Payroll", "Foundry", "Archives", "Coatings", "Packaging",
)  # fmt: skip
PRODUCTS = (
    "Heron gauge", "Kestrel valve", "Plover pump", "Tern sensor", "Curlew filter",
    "Merlin relay", "Dunlin meter", "Siskin probe", "Lapwing coil", "Wigeon lens",
)  # fmt: skip
PROCEDURES = (
    "travel claim", "purchase order", "visitor badge", "tool loan", "leave request",
    "scrap report", "sample return", "key handover", "repair note", "training booking",
)  # fmt: skip
MACHINES = (
    "Bertha lathe", "Oberon mill", "Juno oven", "Titan crane", "Calypso saw",
    "Rhea furnace", "Phoebe drill", "Ariel grinder", "Dione welder", "Mimas plotter",
)  # fmt: skip
FIRST_NAMES = (
    "Orla", "Bram", "Ines", "Tobin", "Maude", "Silas", "Petra", "Ewan", "Lotte", "Conrad",
    "Hanne", "Jory", "Thea", "Magnus", "Vera", "Piers", "Nell", "Osric", "Greta", "Linus",
)  # fmt: skip
LAST_NAMES = (
    "Vint", "Hallam", "Okafor", "Strand", "Pell", "Marsh", "Quill", "Tarn", "Bexley", "Ruddock",
    "Crane", "Loxley", "Harrow", "Sorrel", "Fenn", "Garrick", "Thorne", "Wick", "Ashby", "Dunmore",
)  # fmt: skip


RELATIONS = (
    Relation(
        DEPARTMENTS,
        "{}",
        None,
        (
            "Who heads the {} department?",
            "Who is the head of {}?",
            "Name the person who heads {}.",
            "Which person is head of the {} department?",
            "Tell me who the head of the {} team is.",
            "The {} department is headed by whom?",
        ),
        ("Who is currently the head of the {} department?", "I would like to know who heads the {} team."),
    ),
    Relation(
        DEPARTMENTS,
        "B-{}",
        range(101, 400),
        (
            "In which room is the {} department?",
            "What is the room of {}?",
            "Which room does {} use?",
            "Tell me the room of the {} team.",
            "Where is {}? Give the room.",
            "Name the room where the {} department sits.",
        ),
        ("What room is the {} department in?", "Which room should I go to for {}?"),
    ),
    Relation(
        DEPARTMENTS,
        "{}",
        range(4001, 5000),
        (
            "What is the phone extension of {}?",
            "Which extension reaches the {} department?",
            "Give me the extension for {}.",
            "Tell me the phone extension of the {} team.",
            "On which extension do I call {}?",
            "What extension does the {} department have?",
        ),
        ("Which phone extension belongs to {}?", "I need to call the {} department. Which extension is it?"),
    ),
    Relation(
        DEPARTMENTS,
        "TC-{}",
        range(11, 100),
        (
            "What is the cost code of {}?",
            "Which cost code does the {} department use?",
            "Give me the cost code for {}.",
            "Tell me the cost code of the {} team.",
            "Name the cost code that belongs to {}.",
            "Under which cost code does {} book?",
        ),
        ("Which cost code is right for the {} department?", "What cost code should I write down for {}?"),
    ),
    Relation(
        PRODUCTS,
        "KX-{}",
        range(201, 1000),
        (
            "What is the part number of the {}?",
            "Which part number does the {} have?",
            "Give me the part number for the {}.",
            "Tell me the {} part number.",
            "Under which part number is the {} listed?",
            "Name the part number of a {}.",
        ),
        ("What part number do I order for a {}?", "Which part number belongs to the {}?"),
    ),
    Relation(
        PRODUCTS,
        "{} °C",
        range(2, 30),
        (
            "At what temperature is the {} stored?",
            "What is the storage temperature of the {}?",
            "Give me the storage temperature for the {}.",
            "Which temperature does the {} need in storage?",
            "Tell me the temperature for storing a {}.",
            "How warm may the {} be stored? Give the temperature.",
        ),
        ("Which storage temperature is right for the {}?", "At which temperature do we store the {}?"),
    ),
    Relation(
        PRODUCTS,
        "{} months",
        range(6, 60),
        (
            "How long is the warranty of the {}?",
            "What warranty does the {} have?",
            "Give me the warranty period for the {}.",
            "Tell me the warranty of a {}.",
            "For how many months does the warranty of the {} run?",
            "Name the warranty period of the {}.",
        ),
        ("How many months of warranty come with a {}?", "What is the warranty period of the {}?"),
    ),
    Relation(
        PROCEDURES,
        "F-{}",
        range(11, 100),
        (
            "Which form is used for a {}?",
            "What form do I need for a {}?",
            "Give me the form for a {}.",
            "Tell me which form a {} takes.",
            "Name the form that belongs to a {}.",
            "On which form do I write a {}?",
        ),
        ("What is the right form for a {}?", "Which form should I fill in for a {}?"),
    ),
    Relation(
        PROCEDURES,
        "{}",
        None,
        (
            "Who approves a {}?",
            "Who has to approve a {}?",
            "Name the person who approves a {}.",
            "By whom is a {} approved?",
            "Tell me who approves a {}.",
            "Which person must approve a {}?",
        ),
        ("Who is the one that approves a {}?", "I have a {}. Who should approve it?"),
    ),
    Relation(
        PROCEDURES,
        "{} days",
        range(2, 40),
        (
            "What is the deadline for a {}?",
            "Which deadline does a {} have?",
            "Give me the deadline of a {}.",
            "Tell me the deadline for a {}.",
            "How many days is the deadline for a {}?",
            "Name the deadline that a {} must meet.",
        ),
        ("What deadline applies to a {}?", "I have a {}. What is its deadline?"),
    ),
    Relation(
        MACHINES,
        "bay {}",
        range(1, 60),
        (
            "In which bay is the {}?",
            "What bay does the {} stand in?",
            "Give me the bay of the {}.",
            "Tell me the bay where the {} stands.",
            "Where is the {}? Give the bay.",
            "Name the bay of the {}.",
        ),
        ("Which bay is the {} in?", "I am looking for the {}. Which bay is it?"),
    ),
    Relation(
        MACHINES,
        "{} hours",
        range(110, 900, 10),
        (
            "What is the service interval of the {}?",
            "After how many hours is the {} due for service?",
            "Give me the service interval for the {}.",
            "Tell me the service interval of the {}.",
            "How often does the {} need service?",
            "Name the hours between two services of the {}.",
        ),
        ("How many hours may the {} run between services?", "Which service interval is set for the {}?"),
    ),
)


def _facts(chance: random.Random) -> tuple[list[Row], list[Row]]:
    train: list[Row] = []
    held_out: list[Row] = []
    first, last = chance.sample(FIRST_NAMES, 20), chance.sample(LAST_NAMES, 20)
    people = iter([f"{a} {b}" for a, b in zip(first, last, strict=True)])
    for relation in RELATIONS:
        values = chance.sample(relation.numbers, 10) if relation.numbers else islice(people, 10)
        for thing, value in zip(relation.things, values, strict=True):
            answer = relation.answer.format(value)
            train += [_row("facts", phrasing.format(thing), [answer]) for phrasing in relation.training]
            held_out += [_row("facts", phrasing.format(thing), [answer]) for phrasing in relation.held_out]
    return train, held_out


# -- records -------------------------------------------------------------------------------------------------------

SUPPLIERS = (
    "Norrvik", "Castell", "Ombra", "Lindqvist", "Tavener", "Brightwater", "Delmar", "Hoxton", "Farrow", "Selby",
)  # fmt: skip
STORAGE = ("dry", "cold", "dark", "sealed", "upright")
NUM_RECORDS, NUM_HELD_OUT_RECORDS = 160, 40


def _records(chance: random.Random) -> tuple[list[Row], list[Row]]:
    parts = chance.sample(range(100, 1000), NUM_RECORDS + NUM_HELD_OUT_RECORDS)
    values: set[tuple[str, int, str]] = set()
    while len(values) < len(parts):
        values.add((chance.choice(SUPPLIERS), chance.randrange(2, 31), chance.choice(STORAGE)))
    rows = []
    for number, (supplier, days, storage) in zip(parts, chance.sample(sorted(values), len(parts)), strict=True):
        part = f"{chance.choice('ADGHMRT')}{chance.choice('BKLPSVZ')}-{number}"
        rows.append((_prompt(part, supplier, days, storage), _sentences(part, supplier, days, storage)))
    train = [_row("records", prompt, [chance.choice(sentences)]) for prompt, sentences in rows[:NUM_RECORDS]]
    return train, [_row("records", prompt, sentences) for prompt, sentences in rows[NUM_RECORDS:]]


def _prompt(part: str, supplier: str, days: int, storage: str) -> str:
    return f"part: {part} | supplier: {supplier} | lead time: {days} days | storage: {storage}"


def _sentences(part: str, supplier: str, days: int, storage: str) -> list[str]:
    return [
        f"Part {part} comes from {supplier}, takes {days} days to arrive and is kept {storage}.",
        f"{supplier} delivers part {part} within {days} days; keep it {storage}.",
        f"Keep part {part} {storage}: it is supplied by {supplier} with a lead time of {days} days.",
    ]


# -- sums ----------------------------------------------------------------------------------------------------------

NUM_SUMS, NUM_HELD_OUT_SUMS = 100, 20  # of each kind
SHIFT_ENDS = (
    "A shift starts at {0}:{1} and lasts {2} hours. When does it end?",
    "When does a shift of {2} hours end that starts at {0}:{1}?",
)
SHIFT_STARTS = (
    "A shift ended at {0}:{1} after {2} hours. When did it start?",
    "When did a shift of {2} hours start that ended at {0}:{1}?",
)
TOTALS = (
    "A part costs {0}.{1} and its delivery {2}.00. What is the total?",
    "What is the total of a part for {0}.{1} with delivery for {2}.00?",
)


def _sums(chance: random.Random) -> tuple[list[Row], list[Row]]:
    """The whole numbers are added or subtracted, minutes and cents are carried over."""
    minutes, cents = range(0, 60, 5), range(5, 100, 5)
    kinds = (
        (SHIFT_ENDS, product(range(5, 13), minutes, (4, 8)), "{}:{}", 1),
        (SHIFT_STARTS, product(range(13, 21), minutes, (4, 8)), "{}:{}", -1),
        (TOTALS, product(range(2, 12), cents, (2, 5)), "{}.{}", 1),
    )
    train: list[Row] = []
    held_out: list[Row] = []
    for phrasings, operands, answer, sign in kinds:
        chosen = chance.sample(list(operands), NUM_SUMS + NUM_HELD_OUT_SUMS)
        for index, (whole, part, change) in enumerate(chosen):
            prompt = phrasings[index % len(phrasings)].format(whole, f"{part:02d}", change)
            row = _row("sums", prompt, [answer.format(whole + sign * change, f"{part:02d}")])
            (train if index < NUM_SUMS else held_out).append(row)
    return train, held_out
