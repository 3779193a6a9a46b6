"""The stages that a recipe can have: what each reads, what shapes it, and the room's function that makes it.

* `stage.py`: what a stage is; `start.py`: the model that a recipe starts from.
* `data.py`, `training.py`, `evaluation.py`: the stages, with the artefacts that each reads and makes.
* `order.py`: which of them a recipe has, in the order in which they run.

To add one, see docs/stages.md. Rooms that need torch are imported when a stage runs.
"""
