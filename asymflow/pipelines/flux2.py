"""The name by which the cards of adapters import the pipeline: it stays, wherever the pipeline itself is."""

from asymflow.backbones.flux2.pipeline import AsymFlux2KleinPipeline as AsymFlux2KleinPipeline
