"""The objectives by name, see asymflow/training/objectives/__init__.py. Here, because the configuration checks it."""

TABLE = {
    "class_conditional": "asymflow.training.objectives.class_conditional:ClassConditional",
    "latent_to_pixel": "asymflow.training.objectives.latent_to_pixel:LatentToPixel",
}
