#!/usr/bin/env python3
"""A recall set: documents of filler that hide several secret numbers, one of which is asked for.

    python examples/recall/make_recall.py --model .cache/SmolLM2-135M-Instruct --output out/recall.jsonl
    spillway run --model .cache/SmolLM2-135M-Instruct --input out/recall.jsonl --output out/recall-results.jsonl
    python examples/recall/score_recall.py out/recall-answers.jsonl out/recall-results.jsonl

Beside the batch file (`NAME.jsonl`) goes `NAME-answers.jsonl`: for each line its length, the number asked for, and how
deep in the document it was said. The same seed gives the same set. What an exact cache scores on it is the baseline for
every mode that drops or rounds part of the cache.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

LENGTHS = (256, 512, 1024, 2048, 4096, 6144)
FACTS = 3
OPENING = "Read the following notes. They hold some secret numbers.\n\n"
FILLER = (
    "The morning was quiet and the street was still wet from the rain.",
    "A cart went by with baskets of apples for the market.",
    "Somebody had left a window open on the second floor.",
    "The baker put the first loaves on the shelf and opened the door.",
    "Two children waited for the school bus beside the fountain.",
    "The river had risen a little since the week before.",
    "An old map of the town hung in the hall of the library.",
    "The train was late, as it often was on a Monday.",
    "A dog slept in the sun in front of the post office.",
    "The gardener cut the hedge and gathered the leaves in a sack.",
    "There was a smell of coffee on the stairs.",
    "The painter mixed a grey that was nearly blue.",
    "In the afternoon the wind turned and the flags hung still.",
    "The cook wrote the menu on a board with white chalk.",
    "A boat was tied to the pier with a yellow rope.",
    "The clock in the square struck the hour a moment too soon.",
    "Nobody could say who had planted the tree behind the church.",
    "The shop sold paper, ink, string and all kinds of pencils.",
    "A letter lay on the table, but nobody had opened it yet.",
    "The fields beyond the bridge were green after the long spring.",
    "He mended the fence before the evening and put the tools away.",
    "She read the newspaper from the last page to the first.",
    "The soup was warm, and there was enough of it for everyone.",
    "Late at night a single lamp burned in the tower.",
)
NAMES = (
    *("Ada", "Boris", "Clara", "Dmitri", "Elena", "Felix", "Greta", "Hugo", "Irene", "Jonas", "Karin", "Leo", "Maria"),
    *("Nadia", "Oscar", "Paula", "Quentin", "Rosa", "Simon", "Teresa", "Ulrich", "Vera", "Walter", "Xenia", "Zoe"),
)

Count = Callable[[str], int]


@dataclass(frozen=True)
class Try:
    """One document with its question. `depth` is where the number is said: 0 at the start, 1 at the end."""

    custom_id: str
    length_tokens: int
    text: str
    name: str
    number: str
    depth: float

    def line(self, model: str) -> dict[str, object]:
        """As an OpenAI batch line."""
        asked = f"\n\nWhat is the secret number of {self.name}? Answer with the number."
        messages = [{"role": "user", "content": OPENING + self.text + asked}]
        body = {"model": model, "messages": messages, "max_tokens": 24, "temperature": 0}
        return {"custom_id": self.custom_id, "method": "POST", "url": "/v1/chat/completions", "body": body}

    def answer(self) -> dict[str, object]:
        """What the scorer needs to know."""
        return {
            "custom_id": self.custom_id,
            "length_tokens": self.length_tokens,
            "number": self.number,
            "depth": round(self.depth, 3),
        }


def make_try(length_tokens: int, number: int, seed: int, count: Count) -> Try:
    """A document of about `length_tokens` tokens (at most one sentence short), with `FACTS` facts spread over it."""
    rng = random.Random(f"{seed}/{length_tokens}/{number}")
    names = rng.sample(NAMES, FACTS)
    numbers = rng.sample(range(1000, 10000), FACTS)
    facts = [f"The secret number of {who} is {what}." for who, what in zip(names, numbers, strict=True)]
    left = length_tokens - sum(count(" " + fact) for fact in facts)
    sentences: list[str] = []
    while True:
        sentence = rng.choice(FILLER)
        left -= count(" " + sentence)
        if left < 0:
            break
        sentences.append(sentence)
    for fact in facts:
        sentences.insert(rng.randint(0, len(sentences)), fact)
    asked = rng.randrange(FACTS)
    depth = sentences.index(facts[asked]) / max(1, len(sentences) - 1)
    text = " ".join(sentences)
    return Try(f"recall-{length_tokens}-{number}", length_tokens, text, names[asked], str(numbers[asked]), depth)


def make_set(lengths: list[int], tries: int, seed: int, count: Count) -> list[Try]:
    """`tries` documents of each length."""
    return [make_try(length, number, seed, count) for length in lengths for number in range(tries)]


def main() -> None:
    """Write the batch file and the answers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="checkpoint whose tokenizer measures the documents")
    parser.add_argument("--output", type=Path, required=True, help="the batch file, ending in .jsonl")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, metavar="TOKENS")
    parser.add_argument("--tries", type=int, default=20, help="documents of each length (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)

    def count(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    tries = make_set(list(arguments.lengths), arguments.tries, arguments.seed, count)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    answers = arguments.output.with_name(arguments.output.stem + "-answers.jsonl")
    arguments.output.write_text("".join(json.dumps(each.line(arguments.model.name)) + "\n" for each in tries))
    answers.write_text("".join(json.dumps(each.answer()) + "\n" for each in tries))
    print(f"{len(tries)} documents: {arguments.output}, {answers}")


if __name__ == "__main__":
    main()
