"""Who is the president of …? The answer changes over time, and some were written down wrong and put right later."""

from datetime import timedelta

from feast import Entity, FeatureView, Field, FileSource, ValueType
from feast.types import String

question = Entity(name="question", join_keys=["question"], value_type=ValueType.STRING)
answers = FileSource(
    name="answers",
    path="data/answers.parquet",
    timestamp_field="event_time",  # the answer is true from here on
    created_timestamp_column="created_time",  # we knew it from here on
)
answer = FeatureView(
    name="answer",
    entities=[question],
    ttl=timedelta(0),  # for ever, until another takes its place
    schema=[Field(name="answer", dtype=String), Field(name="since", dtype=String)],
    source=answers,
)
