"""How often the number of components is found, and what a million rows cost.

    python benchmarks/components.py rates --repeats 40 --seed 100
    python benchmarks/components.py rates --folder MIXTURE --repeats 20    # of the *.jsonl files of a folder
    python benchmarks/components.py scale --rows 200000

`rates` draws mixtures of 1 to 6 topics (tests/planted.py) of unequal sizes, or of up to 5 files, and counts for each
criterion how often it names the planted number. `scale` repeats rows with variation and reports rows/s and peak memory.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from planted import TOPICS, mixture, rows

from lorica.data.components import find_components
from lorica.data.sources import load_examples
from lorica.recipes.components import text_of


def agreement(first: list[int], second: list[int]) -> float:
    """Adjusted Rand index, Hubert & Arabie 1985."""
    pairs = lambda counts: sum(n * (n - 1) / 2 for n in counts)  # noqa: E731
    both = pairs(Counter(zip(first, second, strict=True)).values())
    a, b = pairs(Counter(first).values()), pairs(Counter(second).values())
    expected = a * b / pairs([len(first)])
    return 1.0 if (a + b) / 2 == expected else (both - expected) / ((a + b) / 2 - expected)


def planted(generator: random.Random, num: int, files: dict[str, list[str]]) -> tuple[list[str], list[int], str]:
    if files:
        names = generator.sample(sorted(files), num)
        sizes = {name: generator.choice([150, 300, 600]) for name in names}
        pairs = [(t, i) for i, n in enumerate(names) for t in generator.sample(files[n], min(sizes[n], len(files[n])))]
        generator.shuffle(pairs)
        return [text for text, _ in pairs], [index for _, index in pairs], str(sizes)
    sizes = {name: generator.choice([60, 120, 240, 480]) for name in generator.sample(sorted(TOPICS), num)}
    return *mixture(sizes, generator.randrange(1 << 30)), str(sizes)


def rates(repeats: int, seed: int, folder: Path | None) -> None:
    files = {}
    if folder is not None:
        files = {f.stem: list(map(text_of, load_examples(f).examples)) for f in sorted(folder.glob("*.jsonl"))}
    generator = random.Random(seed)
    right: Counter[tuple[str, int]] = Counter()
    tried: Counter[int] = Counter()
    scores = []
    for repeat in range(repeats):
        num = 1 + repeat % min(6, len(files) or 6)
        texts, truth, what = planted(generator, num, files)
        found = find_components(texts, seed=seed + repeat)
        tried[num] += 1
        right.update((name, num) for name, choice in found.choices.items() if choice == num)
        if found.num != num:
            print(f"planted {num}, found {found.num}: {what}", flush=True)
        elif num > 1:
            scores.append(agreement(truth, found.labels.tolist()))
    print("criterion   " + "  ".join(f"of {num}" for num in sorted(tried)))
    for name in ("overlap", "elbow", "silhouette", "held_out"):
        print(f"{name:11s} " + "  ".join(f"{right[name, num]}/{tried[num]}" for num in sorted(tried)))
    print(f"adjusted Rand index where the number was right: worst {min(scores, default=1):.3f}")


def scale(num_rows: int) -> None:
    names = sorted(TOPICS)[:5]
    stock = [rows(name, 2_000, 0) for name in names]

    def texts() -> Iterator[str]:
        generator = random.Random(0)
        for row in range(num_rows):
            topic = stock[generator.randrange(5)]
            # About 300 characters, no two rows alike.
            yield " ".join(generator.choice(topic) for _ in range(4)) + f" {row}"

    started = time.perf_counter(), time.process_time()
    found = find_components(texts)
    seconds, processor = time.perf_counter() - started[0], time.process_time() - started[1]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    report = {
        "rows": num_rows,
        "num": found.num,
        "seconds": round(seconds, 1),
        "processor_seconds": round(processor, 1),
        "rows_per_second": round(num_rows / seconds),
        "peak_bytes": peak,
        "json_bytes": len(found.to_json()),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["rates", "scale"])
    parser.add_argument("--repeats", type=int, default=36)
    parser.add_argument("--seed", type=int, default=100)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--rows", type=int, default=200_000)
    arguments = parser.parse_args()
    if arguments.what == "scale":
        scale(arguments.rows)
    else:
        rates(arguments.repeats, arguments.seed, arguments.folder)
