"""Published model cards import the pipeline from here, so this module stays, wherever the pipeline moves."""

from asymflow.backbones.flux2.pipeline import AsymFlux2KleinPipeline as AsymFlux2KleinPipeline
