"""
Write the demo's data, `train.jsonl`, `held_out.jsonl` and `test.jsonl`: requests in plain English,
answered by a call.

    python recipes/demo/make_data.py

The prompts do not list the functions: which there are, and how to call them, is what training must
teach. Training and test share no phrasing and no value of a slot, so sentences learned by heart do
not help. The held-out rows, which choose a checkpoint, are like the training rows, but none of
them.
"""

import itertools
import json
import random
from collections.abc import Iterator
from pathlib import Path

ROWS_PER_FUNCTION = {"train": 8, "held_out": 3, "test": 10}

# The values of each slot: those for training, those for the test
VALUES = {
    "amount": ("20, 35, 50, 80, 120, 200, 450, 1000", "15, 40, 75, 90, 150, 300, 500, 700"),
    "artist": (
        "Abba, Adele, Bob Dylan, Elton John, Mozart, Nirvana, Queen, Shakira",
        "Bach, Coldplay, David Bowie, Madonna, Prince, Rihanna, Tina Turner, Vivaldi",
    ),
    "city": (
        "Boston, Cairo, Madrid, Mumbai, Oslo, Rome, Tokyo, Vienna",
        "Berlin, Delhi, Dublin, Lima, Paris",
    ),
    "currency": ("dollars, euros, yen", "francs, pesos, pounds"),
    "day": ("Monday, Wednesday, Friday, Sunday", "Tuesday, Thursday, Saturday"),
    "device": (
        "fan, heater, lamp, radio, speaker, toaster",
        "camera, freezer, oven, printer, television",
    ),
    "item": (
        "bread, carrots, coffee, milk, olive oil, rice, soap, toothpaste",
        "apples, batteries, butter, eggs, green tea, pasta, salt, sugar, toilet paper, tomatoes",
    ),
    "language": ("French, German, Italian, Polish, Turkish", "Dutch, Greek, Spanish, Swedish"),
    "minutes": ("2, 5, 8, 10, 20, 35, 50, 90", "3, 7, 12, 15, 25, 30, 40, 45"),
    "name": (
        "Anna, Ben, Carlos, Lucy, Maria, Peter, Tom, Wei",
        "Alice, David, Emma, John, Omar, Sarah, Yuki",
    ),
    "room": ("bedroom, garage, kitchen, office", "bathroom, basement, hall, nursery"),
    "text": (
        "call me back, dinner is ready, good luck, I am late, I lost my keys, the train is delayed",
        "happy birthday, I am at home, see you soon, thank you, the meeting is over, we won",
    ),
    "time": (
        "5:45, 6:30, 7:00, 7:20, 8:15, 9:10, 9:50",
        "5:30, 6:10, 6:45, 7:40, 8:05, 8:30, 9:25",
    ),
    "word": (
        "bread, good morning, snow, the red car, where are you, winter",
        "apple, good night, I am hungry, river, the old house, window",
    ),
}

# Each function: its call, phrasings for training, phrasings for the test
FUNCTIONS = [
    (
        'add_to_list(item="{item}")',
        [
            "Put {item} on the shopping list.",
            "Add {item} to my list.",
            "We need {item}.",
            "Don't let me forget {item}.",
        ],
        [
            "I have to buy {item}.",
            "Can you add {item} to the shopping?",
            "Please put {item} on my list.",
        ],
    ),
    (
        'get_weather(city="{city}", day="{day}")',
        [
            "What is the weather in {city} on {day}?",
            "Will it rain in {city} on {day}?",
            "{day}'s weather in {city}?",
        ],
        [
            "How is the weather in {city} on {day}?",
            "Is it sunny in {city} on {day}?",
            "Weather for {city}, {day}, please.",
        ],
    ),
    (
        'play_music(artist="{artist}")',
        [
            "Play something by {artist}.",
            "I want to hear {artist}.",
            "Put on some {artist}.",
            "Music by {artist}, please.",
        ],
        [
            "Can you play {artist}?",
            "Play me a song by {artist}.",
            "I would like to listen to {artist}.",
        ],
    ),
    (
        'send_message(to="{name}", text="{text}")',
        ['Text {name} "{text}".', 'Send "{text}" to {name}.', 'Write {name} a message: "{text}".'],
        [
            'Message {name} "{text}".',
            'Tell {name} "{text}".',
            'Send {name} a text saying "{text}".',
        ],
    ),
    (
        'send_money(to="{name}", amount={amount}, currency="{currency}")',
        [
            "Pay {name} {amount} {currency}.",
            "Send {amount} {currency} to {name}.",
            "I owe {name} {amount} {currency}.",
        ],
        [
            "Transfer {amount} {currency} to {name}.",
            "Send {name} {amount} {currency}.",
            "{name} gets {amount} {currency}.",
        ],
    ),
    (
        'set_alarm(time="{time:0>5}", day="{day}")',
        [
            "Wake me up at {time} on {day}.",
            "Set an alarm for {time} on {day}.",
            "Alarm on {day}, {time}.",
        ],
        [
            "I have to get up at {time} on {day}.",
            "Set my alarm on {day} to {time}.",
            "On {day}, wake me at {time}.",
        ],
    ),
    (
        "set_timer(minutes={minutes})",
        [
            "Set a timer for {minutes} minutes.",
            "Tell me when {minutes} minutes are over.",
            "{minutes} minutes, go!",
        ],
        [
            "Start a timer of {minutes} minutes.",
            "Time {minutes} minutes.",
            "I need a {minutes} minute timer.",
        ],
    ),
    (
        'translate(text="{word}", language="{language}")',
        [
            'How do you say "{word}" in {language}?',
            'Translate "{word}" into {language}.',
            '"{word}" in {language}?',
        ],
        [
            'What is "{word}" in {language}?',
            'Give me the {language} for "{word}".',
            'Say "{word}" in {language}.',
        ],
    ),
    (
        'turn_off(device="{device}", room="{room}")',
        [
            "Turn off the {device} in the {room}.",
            "Switch the {room} {device} off.",
            "No more {device} in the {room}.",
        ],
        [
            "Please turn the {room} {device} off.",
            "Switch off the {device} in the {room}.",
            "Stop the {room} {device}.",
        ],
    ),
    (
        'turn_on(device="{device}", room="{room}")',
        [
            "Turn on the {device} in the {room}.",
            "Switch the {room} {device} on.",
            "Start the {device} in the {room}.",
        ],
        [
            "Please turn the {room} {device} on.",
            "Switch on the {device} in the {room}.",
            "I need the {room} {device} on.",
        ],
    ),
]


def make_rows(split: str, taken: set[str]) -> list[dict]:
    """
    Return the rows of a split, in TRL's conversational prompt-completion format, without the
    requests `taken`.
    """
    rng = random.Random(split)
    column = int(split == "test")
    rows = []
    for call, *phrasings in FUNCTIONS:
        # Each list is gone through again and again in an order of its own, so that all of it is
        # used alike
        requests = itertools.cycle(phrasings[column])
        slots = {slot: shuffled(both[column], rng) for slot, both in VALUES.items()}
        made = 0
        while made < ROWS_PER_FUNCTION[split]:
            filled = {slot: next(values) for slot, values in slots.items()}
            request = next(requests).format(**filled)
            if request not in taken:
                made += 1
                rows.append(
                    {
                        "prompt": [{"role": "user", "content": request}],
                        "completion": [{"role": "assistant", "content": call.format(**filled)}],
                    }
                )
    rng.shuffle(rows)
    return rows


def shuffled(values: str, rng: random.Random) -> Iterator[str]:
    """Go through a list of values endlessly, in a random order."""
    listed = values.split(", ")
    return itertools.cycle(rng.sample(listed, len(listed)))


def main() -> None:
    """Check that the splits share nothing, and write them."""
    for slot, (train, test) in VALUES.items():
        assert not set(train.split(", ")) & set(test.split(", ")), (
            f"training and test share a {slot}"
        )
    for call, train, test in FUNCTIONS:
        assert not set(train) & set(test), f"training and test share a phrasing of {call}"
    folder = Path(__file__).parent / "data"
    taken: set[str] = set()
    for split in ROWS_PER_FUNCTION:
        rows = make_rows(split, taken)
        requests = {row["prompt"][0]["content"] for row in rows}
        assert len(requests) == len(rows), f"{split} has a row twice"
        assert not requests & taken, f"{split} has a row of another split"
        taken |= requests
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
