"""Train a pixel transformer as an asymmetric flow.

    deepspeed train_ddp.py --config imagenet256_h16 --set data.path=/data/imagenet/train --out runs/h16
    torchrun --nproc-per-node 8 train_ddp.py --config ...
    python train_ddp.py                                   # the embedded default, shapes_tiny, in this process alone

The same command again continues where it stopped. See docs/training.md, and asymflow/configs for the configurations.
"""

import sys

from asymflow.packages import importing

with importing(__name__):
    from asymflow.training.start import main

if __name__ == "__main__":
    sys.exit(main())
