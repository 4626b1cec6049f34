"""The only code that knows DeepSpeed: the engine, and the parts of the model that ZeRO keeps on each rank."""
