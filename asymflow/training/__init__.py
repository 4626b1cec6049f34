"""Training with DeepSpeed ZeRO: configuration, random streams, loss, sharded state, checkpoints and the loop."""
