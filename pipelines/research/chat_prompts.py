"""Prompts of many kinds for general drafts of a chat model, from texts that lie on a machine.

    python -m pipelines.research.chat_prompts OUTPUT.jsonl [PROMPTS.jsonl ..]

Which prompts show a chat model's own text in all its kinds?

Passages come from Python's documentation, the descriptions of installed Python and Debian packages, and translations of
Debian's programs. Topics, countries and tasks fill forms. Given files add prompts of their own. The order is drawn
with a fixed seed, but the passages differ from machine to machine.
"""

import argparse
import gettext
import json
import random
import re
import sys
import zoneinfo
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from pydoc_data import topics

from tidar_core.artifacts.text.prompts import read_prompts
from tidar_core.errors import TidarError

__all__ = ["chat_prompts"]

PASSAGES, LONG_PASSAGES, TRANSLATIONS, QUESTIONS, PLACES = 800, 100, 250, 900, 160
"""Prompts of each kind."""
LENGTHS = range(200, 1400)
"""Characters of a passage."""
ABOUT_A_PASSAGE = (
    "Summarize: {text}",
    "Summarize the following text in two sentences.\n\n{text}",
    "{text}\n\nWhat is {name}?",
    "{text}\nQuestion: What is the main point of this text?\nAnswer:",
    "Rewrite this text in simple words:\n{text}",
    "Use the passage to answer the question.\n\nPassage: {text}\n\nQuestion: What does it say about {name}?",
    "List the key points of this text:\n{text}",
    "Extract the main facts as JSON from this text:\n{text}",
)
ABOUT_A_TOPIC = (
    "What is {topic}?", "Explain {topic} to a child.", "Why is {topic} important?", "How does {topic} work?",
    "Write a short story about {topic}.", "Write a poem about {topic}.", "Give me five facts about {topic}.",
    "List three tips about {topic} for beginners.", "What are the advantages and disadvantages of {topic}?",
    "Tell me about the history of {topic}.", "Write an email to a friend about {topic}.",
    "Describe {topic} in two sentences.", "Compare {topic} and {other}.", "How are {topic} and {other} related?",
    "Pretend that you are a teacher. Give a short lesson about {topic}.", "When did {topic} begin?",
    "Who was the most important person in the history of {topic}?", "Write a blog post about {topic}.",
    "Write a dialogue between two people about {topic}.", "Give arguments for and against {topic}.",
    "What is the difference between {topic} and {other}?", "Name ten words about {topic}.",
)  # fmt: skip
ABOUT_A_PLACE = (
    "What is the capital of {place}?", "Where is {place}?", "Describe {place} in three sentences.",
    "What language do people speak in {place}?", "What is {place} famous for?", "Who is the leader of {place}?",
    "What is the population of {place}?", "Plan a trip of three days to {place}.",
)  # fmt: skip
ABOUT_CODE = (
    "Write a Python function that {task}.", "Write a JavaScript function that {task}.",
    "Show me how to write code that {task}. Explain each step.", "Write a unit test for a function that {task}.",
    'Complete this code:\n\ndef solve(x):\n    """A function that {task}."""\n', "Write a C function that {task}.",
)  # fmt: skip
TOPICS = """gravity, inflation, photosynthesis, democracy, evolution, electricity, the water cycle, black holes,
vaccines, machine learning, the French Revolution, the Roman Empire, the Cold War, jazz, chess, soccer, basketball,
yoga, climate change, renewable energy, the stock market, taxes, insurance, marketing, leadership, teamwork, stress,
sleep, exercise, coffee, tea, bread, cheese, chocolate, gardening, cooking, painting, photography, poetry, novels,
theatre, music, guitars, dogs, cats, horses, elephants, whales, bees, butterflies, volcanoes, earthquakes, mountains,
deserts, forests, oceans, the moon, the sun, Mars, comets, galaxies, atoms, molecules, DNA, cells, bacteria, viruses,
the heart, the brain, bones, blood, vitamins, antibiotics, psychology, philosophy, ethics, logic, algebra, geometry,
probability, computers, programming, the internet, email, smartphones, robots, satellites, rockets, airplanes, trains,
bicycles, bridges, castles, pyramids, museums, libraries, schools, teachers, doctors, nurses, lawyers, engineers,
farmers, chefs, writers, actors, kings, presidents, elections, courts, human rights, justice, peace, money, banks,
factories, farms, cities, tourism, hotels, restaurants, weather, winter, summer, holidays, weddings, friendship,
family, happiness, fear, courage, honesty, patience, memory, dreams, English, Spanish, Chinese, history, geography,
economics, chemistry, physics, biology""".replace("\n", " ").split(", ")
TASKS = """reverses a string, counts the vowels of a text, returns the largest number of a list, merges two sorted
lists, checks whether a number is prime, reads a CSV file, removes duplicates from a list, sorts words by length,
computes the factorial of n, finds the median of numbers, converts Celsius to Fahrenheit, checks for a palindrome,
counts words in a file, flattens a nested list, computes Fibonacci numbers, finds the longest word, groups items by a
key, transposes a matrix, validates an email address, generates a random password, finds common elements of two lists,
rotates a list by k, parses a date, downloads a web page, implements a stack, implements binary search, implements
bubble sort, computes the greatest common divisor""".replace("\n", " ").split(", ")


def chat_prompts(given: list[str], seed: int = 0) -> list[dict[str, str]]:
    """Prompts of all kinds in a drawn order: `id`, `kind` and `prompt` of each.

    given  prompts to add
    """
    rng = random.Random(seed)
    passages = sorted(set(_passages()))
    rng.shuffle(passages)
    found = [("given", prompt) for prompt in given]
    for index, (name, text) in enumerate(passages[:PASSAGES]):
        found.append(("passage", ABOUT_A_PASSAGE[index % len(ABOUT_A_PASSAGE)].format(text=text, name=name)))
    rest = passages[PASSAGES : PASSAGES + 2 * LONG_PASSAGES]
    for (name, text), (_, other) in zip(rest[::2], rest[1::2]):
        found.append(("passages", f"{text}\n\n{other}\n\nQuestion: What is {name}?"))
    sentences = sorted(set(_german()))
    for sentence in rng.sample(sentences, min(TRANSLATIONS, len(sentences))):
        found.append(("translation", f"Translate German to English: {sentence}"))
    questions = [(form, topic) for form in ABOUT_A_TOPIC for topic in TOPICS]
    for form, topic in rng.sample(questions, QUESTIONS):
        found.append(("question", form.format(topic=topic, other=rng.choice(TOPICS))))
    places = sorted(
        {name.rsplit("/", 1)[1].replace("_", " ") for name in zoneinfo.available_timezones() if "/" in name}
    )
    for index, place in enumerate(rng.sample(places, PLACES)):
        found.append(("place", ABOUT_A_PLACE[index % len(ABOUT_A_PLACE)].format(place=place)))
    found += [("code", form.format(task=task)) for task in TASKS for form in rng.sample(ABOUT_CODE, 4)]
    rng.shuffle(found)
    return [{"id": f"{kind}-{n:05d}", "kind": kind, "prompt": prompt} for n, (kind, prompt) in enumerate(found)]


def _passages() -> Iterator[tuple[str, str]]:
    """Names and texts of passages in plain English."""
    texts = list(topics.topics.items())
    for package in metadata.distributions():
        _, _, about = (package.read_text("METADATA") or "").partition("\n\n")
        texts.append((package.name, about))
    status = Path("/var/lib/dpkg/status")
    for entry in status.read_text(errors="replace").split("\n\n") if status.exists() else ():
        named, described = (re.search(rf"^{key}: (.*(?:\n .*)*)", entry, re.M) for key in ("Package", "Description"))
        if named and described:
            texts.append((named[1], described[1].replace("\n .\n", " ").replace("\n", " ")))
    for name, text in texts:
        for paragraph in re.split(r"\n\s*\n", text):
            line = " ".join(paragraph.split())
            if len(line) in LENGTHS and line[0].isalpha() and not re.search(r"\]\(|`_|\.\. |\|", line):
                yield name, line


def _german() -> Iterator[str]:
    """Sentences in German, of programs that speak it."""
    for path in Path("/usr/share/locale/de/LC_MESSAGES").glob("*.mo"):
        try:
            with path.open("rb") as file:
                catalogue: dict[object, str] = gettext.GNUTranslations(file)._catalog  # pyrefly: ignore[missing-attribute]
        except UnicodeDecodeError:  # a catalogue that does not name its encoding
            continue
        yield from (text.strip() for text in catalogue.values() if len(text) in range(40, 180) and "%" not in text)


def main() -> int:
    """Write a file of prompts, a JSON object a line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("output", type=Path)
    parser.add_argument("prompts", type=Path, nargs="*")
    arguments = parser.parse_args()
    try:
        given = [prompt for path in arguments.prompts for prompt in read_prompts(path, sys.maxsize)]
        lines = [json.dumps(prompt, ensure_ascii=False) for prompt in chat_prompts(given)]
        arguments.output.write_text("\n".join(lines) + "\n", encoding="utf-8")
    except (TidarError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
