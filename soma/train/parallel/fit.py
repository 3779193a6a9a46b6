"""Whether a training stage's layout fits its batch and its model: asked before any stage is made, and by training."""

from soma.model.config import ModelConfig
from soma.train.config import TrainConfig
from soma.train.parallel.config import Layout
from soma.train.parallel.pipeline.plan import layers_for, make_plan


def check_fit(config: TrainConfig, layout: Layout, model: ModelConfig | None) -> None:
    """Raise UserError with the arithmetic where a resolved layout does not fit batch or model.

    model: None where its shape is known only when training begins; `vocab_size` may be missing (the tokenizer's).
    """
    layout.check_batch(config.batch_size, config.microbatch_size)
    plan = make_plan(layout, config.batch_size, config.microbatch_size) if layout.pp > 1 else None
    if model is None:
        return
    layout.check_model(model)
    if plan is not None:
        # A default split weighs the head by the vocabulary; whether there are layers enough does not depend on it.
        sized = model if model.vocab_size else model.model_copy(update={"vocab_size": model.hidden_size})
        layers_for(layout, plan, sized, config.sequence_length)
