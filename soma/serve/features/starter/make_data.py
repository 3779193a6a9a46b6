"""From facts.csv: data/answers.parquet, what a knowledge base had at what time, and data/questions.parquet, when who
was asked for. An answer is written down one to nine days after it became true; every fifth is wrong at first (the one
before stays, under the new date) and put right ten to thirty days later, which is a correction: the same event_time, a
later created_time. The same seed makes the same files.
"""

import csv
import random
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

HERE = Path(__file__).parent
SEED = 5
QUESTIONS = 200


def question_of(country: str) -> str:
    """The entity."""
    return f"who is the president of {country}?"


def main() -> None:
    """Write both files."""
    draw = random.Random(SEED)
    with open(HERE / "facts.csv", encoding="utf-8", newline="") as file:
        facts = list(csv.DictReader(file))
    rows = []
    before: dict[str, str] = {}
    for number, fact in enumerate(facts):
        country, president = fact["country"], fact["president"]
        since = datetime.fromisoformat(fact["since"]).replace(tzinfo=UTC)
        known = since + timedelta(days=draw.randint(1, 9), hours=draw.randint(0, 23))
        if number % 5 == 4 and country in before:
            rows.append((question_of(country), before[country], fact["since"], since, known))
            known += timedelta(days=draw.randint(10, 30))
        rows.append((question_of(country), president, fact["since"], since, known))
        before[country] = president
    draw.shuffle(rows)  # files are in no order
    times = pa.timestamp("us", "UTC")
    columns = list(zip(*rows, strict=True))
    (HERE / "data").mkdir(exist_ok=True)
    pq.write_table(
        pa.table({
            "question": pa.array(columns[0]), "answer": pa.array(columns[1]), "since": pa.array(columns[2]),
            "event_time": pa.array(columns[3], times), "created_time": pa.array(columns[4], times),
        }), HERE / "data" / "answers.parquet",
    )  # fmt: skip
    first, last = datetime(2006, 1, 1, tzinfo=UTC), datetime(2025, 10, 1, tzinfo=UTC)
    countries = sorted(before)
    asked = [
        (number, question_of(draw.choice(countries)), first + draw.random() * (last - first))
        for number in range(QUESTIONS)
    ]
    ids, questions, at = zip(*asked, strict=True)
    pq.write_table(
        pa.table({"id": pa.array(ids), "question": pa.array(questions), "event_timestamp": pa.array(at, times)}),
        HERE / "data" / "questions.parquet",
    )


if __name__ == "__main__":
    main()
