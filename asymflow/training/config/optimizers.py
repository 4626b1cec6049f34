"""Optimizers by name: functions of parameter groups, the learning rate and options.

    make(params=groups, lr=..., **options) -> torch.optim.Optimizer

ZeRO cuts the flattened weights into pieces, so an optimizer has to treat every number by itself, as AdamW does, and to
keep nothing but moments, which begin at zero, and a count called `step`. The loop sets `lr` anew in every step.

One of your own is named as `optimizer.kind: mypackage.optim:Lion`. It gets those of `betas`, `eps` and `weight_decay`
that it has arguments for, and `optimizer.options`.
"""

TABLE = {"AdamW": "torch.optim:AdamW"}
