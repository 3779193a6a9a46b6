"""What is in a corpus: counts for a run's report, and the profile that `soma data report` draws.

* `counts.py`: the figures of a corpus's `report.json`, counted while it is written.
* `scan.py`: any corpus or source, once over, in parts; `summary.py`: one version's figures out of them, with
  `schema.py` (types), `sketch.py` (mergeable statistics), `bias.py`, `anomalies.py`, `leaks.py` (duplicates across
  splits).
* `drift.py` compares two versions by `significance.py`; `expect.py` holds figures against a recipe's bounds.
* `page.py` draws it, `card.py` writes a corpus's data card, `scaling.py` scales attributes for a model.
"""

from soma.data.profile.counts import Profile as Profile
from soma.data.profile.counts import character_classes as character_classes
from soma.data.profile.counts import drop_reasons as drop_reasons
from soma.data.profile.counts import drop_summary as drop_summary
from soma.data.profile.counts import excerpt as excerpt
from soma.data.profile.counts import histogram as histogram
from soma.data.profile.counts import ordered as ordered
