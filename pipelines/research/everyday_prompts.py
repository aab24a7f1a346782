"""Short prompts of the five kinds that the quickstart's prompts have, as many as one wants.

    python -m pipelines.research.everyday_prompts OUTPUT.jsonl COUNT

Which prompts show a chat model's own text on everyday tasks, where a few hundred hand-written ones are too few?

Kinds are stories with a sum, small Python functions, sentences to rewrite, facts to extract as JSON, and lists. Each
prompt is a form with names, numbers and things drawn for it. A function, a sentence or a list that a held-out prompt of
the quickstart has is left out. Stories and extractions differ from held-out ones in names and numbers alone.
"""

import argparse
import json
import random
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from tidar_core.errors import ConfigError, TidarError

__all__ = ["everyday_prompts"]

NAMES = """Ada, Amir, Ben, Bruno, Carlos, Clara, Daria, Dev, Elena, Elsa, Emil, Farid, Felix, Greta, Hana, Hugo,
Ingrid, Iris, Jamal, Jonas, Kofi, Lars, Leila, Lena, Lucia, Mara, Mateo, Maya, Mei, Nadia, Nina, Noor, Olga, Omar,
Otto, Pavel, Priya, Ravi, Rosa, Ruth, Samir, Sofia, Tariq, Tom, Uma, Vera, Viktor, Wanda, Yusuf, Zoe"""
FAMILIES = """Adler, Bauer, Brandt, Castro, Chen, Costa, Diaz, Eriksen, Fischer, Garcia, Haddad, Ito, Jensen, Kaya,
Keller, Larsen, Lopez, Meyer, Mori, Nilsson, Novak, Okafor, Park, Patel, Peters, Quinn, Rossi, Sato, Silva, Singh,
Tanaka, Vogel, Wagner, Weber, Wolf, Young, Zhang"""
CITIES = """Accra, Athens, Bergen, Bern, Bilbao, Boston, Bremen, Cairo, Chicago, Cork, Dakar, Delhi, Denver, Dresden,
Geneva, Ghent, Graz, Hanoi, Havana, Izmir, Kyoto, Lagos, Lima, Lisbon, Lyon, Madrid, Manila, Milan, Mumbai, Nairobi,
Nice, Oslo, Ottawa, Paris, Porto, Prague, Quito, Riga, Rome, Seoul, Seville, Sofia, Split, Tunis, Turin, Utrecht,
Vienna, Warsaw, York, Zurich"""
JOBS = """doctor, nurse, teacher, pilot, baker, carpenter, lawyer, farmer, driver, gardener, chemist, plumber, tailor,
librarian, engineer, dentist, painter, cook, architect, photographer, electrician, waiter, translator, mechanic"""
GOODS = """steel water bottle, desk lamp, blue backpack, tennis racket, paper notebook, red wool scarf, coffee
grinder, wooden chair, phone case, rain jacket, frying pan, alarm clock, yoga mat, leather belt, bicycle helmet,
travel mug, garden hose, office desk, pair of boots, reading lamp, wall clock, cotton towel, kitchen scale, electric
kettle"""
BRANDS = """Alpina, Brightway, Corvo, Delmar, Eastwind, Fernhill, Glowline, Harbor, Ironleaf, Juno, Kestrel, Lumen,
Marlow, Northpeak, Oakridge, Pinecrest, Quill, Riverton, Solis, Tamarind, Umbra, Verano, Westbrook, Zephyr"""
EVENTS = """spring concert, flea market, science fair, summer run, film night, cooking class, dance workshop, jazz
evening, plant sale, chess tournament, harvest fair, book club, art show, choir practice, street festival, town
meeting, charity dinner, photo walk, pottery class, swimming race, poetry reading, bake sale, quiz night"""
PLACES = """the town hall, the old harbour, the city theatre, the fire station, the sports hall, the roof garden,
Central Park, the public library, Hill School, the main square, the community centre, Lake House, the art museum, the
market hall, River Street 8, the garden cafe"""
ORDERS = """large pizzas, folding chairs, rose bushes, boxes of tea, sandwiches, bags of flour, notebooks, jars of
honey, wool blankets, printer cartridges, office lamps, bottles of water, cheese cakes, light bulbs, garden tools,
desk calendars, packs of paper, fruit baskets"""
STREETS = "Hill Road, Market Street, Park Lane, Mill Street, Station Road, Oak Avenue, Lake Street, Church Lane"
WEATHERS = """sunshine, light rain, heavy rain, snow, fog, strong wind, clear sky, thunderstorms, drizzle, a light
breeze, hail, clouds"""
MONTHS = "January, February, March, April, May, June, July, August, September, October, November, December"
ENDINGS = ("", "", " Answer in one short sentence.", " Explain in one sentence.", " Show the calculation.",
           " Think step by step, but be brief.")  # fmt: skip
STORIES = (
    "{a} has {n} apples and buys {m} more at the market. How many apples does {a} have now?",
    "A box holds {s} pencils. {a} orders {m} boxes for the school. How many pencils is that in all?",
    "{a} reads {n} pages every evening. How many pages does {a} read in {s} evenings?",
    "There are {n} children on a bus. At the next stop {s} get off and {m} get on. How many children are there now?",
    "{a} saves {n} euros a week. After {s} weeks, how many euros has {a} saved?",
    "A baker made {b} rolls in the morning and sold {n} of them by noon. How many rolls are left?",
    "{a} and {c} share {e} marbles equally. How many marbles does each of them get?",
    "One ticket for the museum costs {s} dollars. How much do {m} tickets cost?",
    "{a} walked {s} kilometres on Monday, {m} on Tuesday and {t} on Wednesday. How far did {a} walk in the three days?",
    "A farmer has {n} hens and {m} ducks. How many birds does the farmer have altogether?",
    "A train leaves with {b} passengers. {n} passengers get off at the first station. How many stay on the train?",
    "{a} plants {s} rows of tulips with {m} tulips in each row. How many tulips does {a} plant?",
    "A notebook costs {s} dollars and a pen costs {t} dollars. {a} buys one of each. How much does {a} pay?",
    "A water tank holds {b} litres. {a} uses {n} litres to water the garden. How many litres remain?",
    "{a} scored {n} points in the first game and {m} points in the second. What is the total?",
    "There are {s} tables in a cafe with {t} chairs each. How many chairs are there?",
    "{a} has {n} coins. {c} has twice as many. How many coins does {c} have?",
    "A shop had {b} umbrellas. After a rainy day {n} were left. How many umbrellas were sold?",
    "{a} runs {s} laps every day for {t} days. How many laps does {a} run?",
    "{a} picked {b} strawberries, ate {s} of them and gave {t} to {c}. How many strawberries does {a} still have?",
    "A garden has {s} beds. In each bed grow {m} carrots. How many carrots grow in the garden?",
    "{a} had {b} stickers and gave {s} of them to {c}. How many stickers are left?",
    "{a} is {n} years old. {c} is {s} years older. How old is {c}?",
    "A film lasts {b} minutes. {a} has already watched {n} minutes. How many minutes are left?",
    "A parking lot has {b} spaces. {n} cars are parked there. How many spaces are free?",
    "{a} bakes {s} trays of cookies with {m} cookies on each tray. How many cookies does {a} bake?",
    "{a} earns {m} dollars an hour and works {s} hours. How much does {a} earn?",
    "A rope is {b} metres long. {a} cuts off {n} metres. How long is the rest of the rope?",
    "A school has {n} boys and {m} girls in the choir. How many children sing in the choir?",
    "{a} drinks {s} glasses of water a day. How many glasses does {a} drink in {t} days?",
    "{a} sends {n} letters and {c} sends {s} letters. How many letters do they send together?",
    "A library lends {n} books on Friday and {m} on Saturday. How many books does it lend on both days?",
)  # fmt: skip
PYTHON = (
    "Write a Python function `{f}` that {d}.", "Write a short Python function `{f}` that {d}. Give only the code.",
    "In Python, define `{f}`, a function that {d}.", "Please write the Python function `{f}`. It {d}.",
    "I need a Python function `{f}` that {d}. Keep it simple.",
)  # fmt: skip
FUNCTIONS = """absolute(x): returns the absolute value of x; add(a, b): adds two numbers; age_in(year, born): returns
the age in a year; area_of_circle(r): returns the area of a circle; average_word_length(text): returns the average
length of the words; backwards(text): returns a text backwards; between(x, low, high): checks whether x lies between
low and high; binary(n): returns the binary digits of n; bmi(weight, height): returns the body mass index; cube(x):
returns the cube of x; ceil_div(a, b): divides and rounds up; change(paid, price): returns the change of a payment;
common(a, b): returns the items that two lists share; compound_interest(sum, rate, years): returns a sum with
interest; concat(words): joins words with a comma; contains(items, item): checks whether a list contains an item;
copy_list(items): returns a copy of a list; count_consonants(text): counts the consonants of a text; count_down(n):
prints the numbers from n to 1; count_true(flags): counts the true values of a list; days_in_month(month): returns the
number of days of a month; decimal(bits): turns binary digits into a number; difference(a, b): returns the items of a
that are not in b; distance(x1, y1, x2, y2): returns the distance of two points; divides(a, b): checks whether a
divides b; divisors(n): returns all divisors of n; drop_first(items): returns a list without its first item;
drop_none(items): removes None from a list; ends_with(text, end): checks whether a text has an ending;
even_index(items): returns the items at even positions; every_second(items): returns every second item of a list;
farthest(numbers): returns the number farthest from zero; feet_to_meters(feet): converts feet to meters; fill(item,
n): returns a list with an item n times; first_even(numbers): returns the first even number; fizz(n): returns Fizz for
multiples of three; format_price(x): returns a price with two decimals; frequency(text): returns how often each letter
occurs; from_pairs(pairs): makes a dictionary from pairs; full_name(first, last): joins a first and a last name;
gallons_to_liters(x): converts gallons to liters; grade(score): returns a letter grade for a score; half(x): returns
half of x; has_duplicates(items): checks whether a list has duplicates; has_upper(text): checks for a capital letter;
hex_color(r, g, b): returns a color in hex; hours_to_seconds(h): converts hours to seconds; inches_to_cm(x): converts
inches to centimeters; insert_at(items, i, x): inserts x at a position; interest(sum, rate): returns the interest of a
year; is_anagram(a, b): checks whether two words are anagrams; is_digit(c): checks whether c is a digit;
is_divisible(a, b): checks whether a can be divided by b; is_negative(x): checks whether x is negative;
is_perfect_square(n): checks for a perfect square; is_positive(x): checks whether x is above zero; is_sorted(items):
checks whether a list is sorted; is_vowel(c): checks whether c is a vowel; is_weekend(day): checks whether a day is on
the weekend; join_lines(lines): joins lines into one text; keep_long(words, n): keeps words with at least n letters;
kilograms(pounds): converts pounds to kilograms; last_word(text): returns the last word of a text; lcm(a, b): returns
the least common multiple; letters(text): returns the letters of a text as a list; longest(words): returns the longest
text of a list; lower(text): turns a text into small letters; max_of_three(a, b, c): returns the largest of three
numbers; median(numbers): returns the median of a list; min_max(numbers): returns the smallest and the largest number;
mode(numbers): returns the most frequent number; negate(x): changes the sign of x; next_even(n): returns the next even
number; nth_item(items, n): returns the item at position n; odd_numbers(n): returns the odd numbers below n;
only_letters(text): keeps only the letters of a text; pad(text, n): fills a text with spaces; pairs(items): returns
all pairs of neighbours; percent(part, whole): returns a part in percent; pop_last(items): removes the last item of a
list; price_with_tax(price, rate): adds tax to a price; print_table(n): prints a multiplication table;
random_item(items): returns a random item of a list; read_file(path): returns the text of a file; remainder(a, b):
returns the remainder of a division; remove_item(items, x): removes all x from a list; replace_spaces(text): replaces
spaces by underscores; rotate(items): moves the first item to the end; round_to(x, digits): rounds x to some digits;
same_length(a, b): checks whether two texts are equally long; second_largest(numbers): returns the second largest
number; seconds_to_minutes(s): converts seconds to minutes; shorten(text, n): cuts a text to n characters;
shout(text): adds an exclamation mark to a text; shuffle(items): returns a list in random order; sign(x): returns the
sign of x; slope(x1, y1, x2, y2): returns the slope of a line; sort_down(numbers): sorts numbers from large to small;
split_half( items): splits a list in two halves; split_words(text): returns the words of a text; square_root(x):
returns the square root of x; squares(n): returns the squares of 1 to n; sum_even(numbers): adds the even numbers of a
list; sum_to(n): returns the sum of 1 to n; surface_of_cube(a): returns the surface of a cube; time_to_text(h, m):
returns a time as text; total(prices): returns the sum of prices; triangle_area(b, h): returns the area of a triangle;
triple(x): returns three times x; truncate(x): cuts off the decimals of x; union(a, b): returns the items of both
lists once; upper_first( text): makes the first letter large; values(d): returns the values of a dictionary;
vowels(text): returns the vowels of a text; weekday(n): returns the name of a day; without_last(items): returns a list
without its last item; word_lengths( text): returns the length of each word; write_lines(path, lines): writes lines to
a file; zeros(n): returns a list of n zeros; square(x): returns the square of x; is_palindrome(text): checks whether a
text is a palindrome; largest(numbers): returns the largest number of a list; reverse(text): returns a text in reverse
order; unique(items): returns a list without duplicates; is_prime(n): checks whether n is a prime number;
celsius_to_fahrenheit(c): converts Celsius to Fahrenheit; count_vowels(text): counts the vowels of a text;
sum_list(numbers): adds all numbers of a list"""
SENTENCES = """The cat sleeps on the sofa; We eat dinner at seven; She writes a letter to her aunt; The children play
in the garden; My brother repairs old radios; They drive to the lake every Sunday; He drinks coffee without milk; The
shop closes at six; I read the newspaper in the morning; Our neighbour waters the plants; The train leaves from
platform two; She teaches mathematics at a school; The dog runs after the ball; We visit our grandparents in spring;
He sings in a choir; The river flows through the town; They build a house near the forest; I forget the names of
flowers; The baker sells fresh rolls; She paints the door green; The students write a test; He carries the boxes
upstairs; We watch a film on Friday; The wind moves the leaves; My mother cooks soup for the guests; You play the
guitar well; The team wins every game; He loses his keys often; They sell apples at the market; The museum opens at
ten; She rides her bicycle to work; The engineer checks the machine; I clean my room on Saturday; The bird builds a
nest in the tree; We travel by train to the coast; The teacher answers our questions; He cuts the bread with a knife;
The doctor visits the patient; They learn Spanish at home; The gardener plants roses; My friend collects stamps; She
closes the window at night; The boy throws a stone into the water; We buy vegetables on Monday; The company makes
shoes; You speak too fast; He waits for the bus; The cook prepares the fish; I like quiet mornings; The artist draws a
horse; They dance until midnight; The farmer feeds the cows; She finds a coin on the street; The lamp stands beside
the bed; We celebrate the new year with friends; The police stop the car; My sister wears a red coat; The machine
counts the bottles; He sends a message to his boss; The children sing a song"""
WISHES = """Give me the salt; Open the door; Send me the report today; I want a coffee; Tell me your name; Move your
car; Be quiet; Wait here; Show me the way to the station; Come to my office; Bring me the bill; Fix this error now;
Turn down the music; Help me with the box; Call me tomorrow; Sign this form; Give the book back; Do not smoke here;
Answer my email; Speak slower; Lend me your pen; I need the room at nine; Clean the kitchen; Sit down; Let me pass;
Check the numbers again; Tell your team about the change; Stop the noise; Write your address here; Explain this to
me"""
LONG = """Due to the fact that it was raining, we stayed at home; At this point in time we do not have any tickets
left; She is a person who likes to help other people; The meeting that was planned for Monday has been moved to
Tuesday; It is possible that the shop will be closed on the holiday; In my opinion, I think that the plan is good; He
made the decision to leave the company at the end of the year; The reason why I am late is that the train was late;
There are many people who believe that tea is healthy; We would like to inform you that your order has been sent; The
house that is located on the corner is for sale; It is necessary for all of us to save water; The book that I bought
last week is very interesting; She spoke in a very quiet voice so that nobody could hear her; He is of the opinion
that the price is too high; In the near future we will open a second shop; The car is red in colour and large in size;
They came to the conclusion that the test had failed; For the purpose of safety, doors must stay closed; The weather
was so bad that we could not go outside at all"""
WRONG = """She dont like fish; Me and him went too the shop; I has two brothers; The childs are playing outside; He go
to school by bus; Their is a dog in the garden; We was happy to see you; This are my new shoes; I recieved your letter
yesturday; She have lost here keys; The wether is nice today; They is going home; He didnt knew the answer; I am agree
with you; She sing very good; Its a beautifull day; The peoples were tired; I forgot to bougt milk; Where you are
going; He speak three langauges; We goed to the beech; Your my best freind; The cat drinked the milk; I can swimming
well; She is more taller than me; There car is to small; An dog barked all night; The informations are wrong; He come
from Germany; I seen that film"""
THINGS = {
    "name": NAMES, "family": FAMILIES, "city": CITIES, "job": JOBS, "product": GOODS, "brand": BRANDS, "event": EVENTS,
    "place": PLACES, "goods": ORDERS, "street": STREETS, "weather": WEATHERS,
    "airline": "LH, BA, AF, KL, SK, TP, LX, OS, AY, EK",
}  # fmt: skip
EXTRACTIONS = (
    ('Extract the name, age and city as JSON: "{}"', ("{name} {family} is {age} years old and lives in {city}.",)),
    ('Extract the name, age, job and city as JSON: "{}"', ("{name} {family}, {age}, is a {job} from {city}.",)),
    (
        'Extract the name, job, city and age as JSON: "{}"',
        ("My friend {name} {family} works as a {job} in {city} and has just turned {age}.",),
    ),
    (
        'Read the text and return JSON with the keys "product", "brand" and "price". Text: {}',
        (
            "{brand} sells a {product} for {price}.",
            "I bought a {product} by {brand} for {price}.",
            "On sale: a {product}, made by {brand}, {price}.",
        ),
    ),
    (
        'Extract event, date, time and place as a JSON object: "{}"',
        (
            "The {event} takes place on {date} at {time} in {place}.",
            "Join us on {date}: the {event} begins at {time} at {place}.",
            "The {event} is on {date}, {time}, at {place}.",
        ),
    ),
    (
        'Turn this order into JSON with the keys "customer", "items" and "address". Order: {}',
        (
            "{name} {family} ordered {count} {goods}. Deliver to {street} {number}.",
            "Please bring {count} {goods} to {street} {number}; the customer is {name} {family}.",
        ),
    ),
    (
        'Give the city, temperature and weather of this report as JSON: "{}"',
        (
            "In {city} it is {degrees} with {weather}.",
            "Weather report for {city}: {weather}, {degrees}.",
            "{city} has {weather} at {degrees}.",
        ),
    ),
    (
        'Extract flight, origin, destination and departure as JSON: "{}"',
        ("{airline} {number} from {city} to {other} departs at {leaves}.",),
    ),
)
REWRITES = (
    ("Rewrite this sentence in the past tense: {x}.", SENTENCES),
    ("Rewrite this sentence in the future tense: {x}.", SENTENCES),
    ("Turn this statement into a question: {x}.", SENTENCES),
    ("Rewrite this for a child of six: {x}.", LONG),
    ("Make this sentence more polite: {x}.", WISHES),
    ("Make this sentence shorter without changing its meaning: {x}.", LONG),
    ("Make this sentence shorter without changing its meaning: {x}.", SENTENCES),
    ("Correct the spelling and grammar: {x}.", WRONG),
    ("Rewrite this sentence in the passive voice: {x}.", SENTENCES),
)
FIVE = """animals that live on a farm, fruits that are sweet, vegetables that are green, countries in Asia, countries
in Europe, sports for two people, musical instruments, kitchen tools, kinds of cheese, kinds of soup, things in a
bathroom, things in an office, things to take to a picnic, things that fly, things that are round, things made of
wood, things made of paper, ways to save money, ways to relax, ways to stay healthy, ways to learn faster, reasons to
learn a language, reasons to plant trees, healthy drinks, desserts without sugar, dishes with rice, dishes with
potatoes, winter clothes, summer activities, hobbies for older people, indoor plants, garden flowers, trees of the
forest, wild animals, pets for a small flat, insects, sea animals, famous scientists, famous painters, famous books,
famous buildings, famous rivers, large cities, islands, languages of Asia, subjects at university, jobs in a school,
jobs in a restaurant, jobs with animals, jobs that need a computer, parts of a car, parts of a computer, parts of a
tree, parts of the body, parts of a letter, colours, materials for clothes, tools for the garden, toys for small
children, games for a party, card games, outdoor games, gifts for a teacher, gifts for a child, ideas for a birthday
cake, ideas for a family weekend, apps for a phone, uses of a computer, forms of energy, renewable energy sources,
chemical elements, gases, natural disasters, types of clouds, types of houses, types of boats, types of dance, kinds
of tea, kinds of nuts, kinds of pasta, kinds of music, kinds of films, breakfast foods, holidays of the year, good
habits, feelings, questions to ask a new neighbour, questions about history, words that rhyme with day, words for a
happy person, inventions of the last century, things to do on a train, things to do before a trip, things to do in
winter, safety tips for cyclists, rules for a classroom"""
THREE = """tips for a good presentation, tips for writing an email, tips for cooking rice, tips for a long flight,
tips for buying a used car, tips for a healthy back, tips for remembering names, tips for working at home, rules for a
good team, rules for a meeting, reasons to exercise, reasons to read books, reasons why bees are important, reasons to
cook at home, uses of vinegar, uses of baking soda, uses of a smartphone, uses of an empty box, ideas for a dinner
with friends, ideas for a gift that costs nothing, ideas for a rainy Sunday, ways to calm down, ways to learn
mathematics, ways to save paper, ways to use less plastic, ways to stay cool in summer, ways to say thank you, ways to
start a conversation, facts about the sun, facts about elephants, facts about the ocean, facts about Japan, facts
about honey, steps to make a sandwich, steps to change a tyre, steps to paint a wall, steps to write a letter, steps
to bake a cake, steps to clean a bicycle, steps to learn a song, steps to solve a conflict, steps to prepare for an
exam, signs of a cold, signs of a good leader, signs that you need a break, habits of healthy people, habits of good
writers, qualities of a good teacher, qualities of a leader, questions to ask before buying a house, questions to ask
a chef, things to check before a hike, things to do in the morning, things to remember in an emergency, benefits of
walking, benefits of music, benefits of learning to cook, advantages of trains, disadvantages of cars, examples of
kindness, examples of renewable energy"""
FIVES = ("List five {x}.", "Name five {x}.", "Give me a list of five {x}.", "Write a numbered list of five {x}.")
THREES = ("List three {x}.", "Name three {x}.", "Give three {x}.", "What are three {x}?")


def everyday_prompts(count: int, *, held_out: Iterable[str], seed: int = 0) -> list[dict[str, str]]:
    """`count` different prompts, the kinds in turns: `id`, `kind` and `prompt` of each.

    held_out  prompts whose subjects are left out
    Raises ConfigError if a kind has too few prompts for the count.
    """
    rng = random.Random(seed)
    unseen = " ".join(held_out).lower()
    made: dict[str, dict[str, None]] = {kind: {} for kind in KINDS}
    share = -(-count // len(KINDS))
    for kind, prompt_of in KINDS.items():
        for _ in range(40 * share):
            if len(made[kind]) == share:
                break
            subject, prompt = prompt_of(rng)
            if subject.lower() not in unseen:
                made[kind][prompt] = None
        if len(made[kind]) < share:
            raise ConfigError(
                f"kind {kind} has {len(made[kind])} different prompts, {share} are needed; lower the count"
            )
    turns = [(kind, prompt) for prompts in zip(*made.values()) for kind, prompt in zip(made, prompts)]
    return [{"id": f"{kind}-{n:05d}", "kind": kind, "prompt": prompt} for n, (kind, prompt) in enumerate(turns[:count])]


def _entries(listed: str, separator: str = ",") -> list[str]:
    """Entries of a list that is written as a text."""
    return [" ".join(entry.split()) for entry in listed.split(separator)]


def _one(rng: random.Random, listed: str, separator: str = ",") -> str:
    """An entry, drawn."""
    return rng.choice(_entries(listed, separator))


def _arithmetic(rng: random.Random) -> tuple[str, str]:
    a, c = rng.sample(_entries(NAMES), 2)
    numbers = {
        "n": rng.randint(11, 49), "m": rng.randint(3, 24), "s": rng.randint(2, 9), "t": rng.randint(3, 12),
        "b": rng.randint(50, 150), "e": 2 * rng.randint(8, 40),
    }  # fmt: skip
    prompt = rng.choice(STORIES).format(a=a, c=c, **numbers) + rng.choice(ENDINGS)
    return prompt, prompt


def _python(rng: random.Random) -> tuple[str, str]:
    function, does = _one(rng, FUNCTIONS, ";").split(": ")
    return f"`{function.split('(')[0]}(", rng.choice(PYTHON).format(f=function.replace("( ", "("), d=does)


def _rewriting(rng: random.Random) -> tuple[str, str]:
    form, listed = rng.choice(REWRITES)
    sentence = _one(rng, listed, ";")
    return sentence, form.format(x=sentence)


def _list(rng: random.Random) -> tuple[str, str]:
    forms, listed = rng.choice(((FIVES, FIVE), (THREES, THREE)))
    thing = _one(rng, listed)
    return f" {thing}.", rng.choice(forms).format(x=thing)


def _extraction(rng: random.Random) -> tuple[str, str]:
    drawn = {name: _one(rng, listed) for name, listed in THINGS.items()}
    hour, minute = rng.randint(1, 11), rng.choice(("05", "20", "35", "50"))
    drawn |= {
        "age": str(rng.randint(18, 79)), "price": f"{rng.randint(4, 180)} {rng.choice(('euros', 'dollars'))}",
        "date": f"{rng.randint(1, 28)} {_one(rng, MONTHS)}", "time": f"{hour} {rng.choice(('am', 'pm'))}",
        "count": str(rng.randint(2, 40)), "number": str(rng.randint(1, 90)), "other": _one(rng, CITIES),
        "degrees": f"{rng.choice(('', '', 'minus '))}{rng.randint(1, 29)} degrees",
        "leaves": f"{hour + 9:02d}:{minute}",
    }  # fmt: skip
    task, forms = rng.choice(EXTRACTIONS)
    text = rng.choice(forms).format(**drawn)
    return text, task.format(text)


KINDS: dict[str, Callable[[random.Random], tuple[str, str]]] = {
    "arithmetic": _arithmetic, "python": _python, "rewriting": _rewriting, "extraction": _extraction, "list": _list,
}  # fmt: skip


def main() -> int:
    """Write a file of prompts, a JSON object a line."""
    parser = argparse.ArgumentParser(description="Make short prompts of five kinds.")
    parser.add_argument("output", type=Path)
    parser.add_argument("count", type=int)
    arguments = parser.parse_args()
    held_out = Path(__file__).parents[1] / "quickstart/prompts/held_out.jsonl"
    prompts = [json.loads(line)["prompt"] for line in held_out.read_text().splitlines()]
    try:
        found = everyday_prompts(arguments.count, held_out=prompts)
        arguments.output.write_text("".join(json.dumps(entry) + "\n" for entry in found))
    except (TidarError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
