"""Everything that knows DeepSpeed: the engine, and what ZeRO keeps of the model on each rank."""
